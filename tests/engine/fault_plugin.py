"""A plugin for SGLang that makes faults where the bridge must notice them or stand them.

SGLang finds it before shmroute's: its distribution comes first on the path. The faults are
chosen by ``FAULTS`` (comma-separated); ``FAULT_FOLDER`` holds the files by which a test turns
them on and off while the engine runs, and through which they report.

renamed      ``FAULT_SITE`` has another name, in the process that ``FAULT_IN`` says:
             ``launcher`` or ``scheduler``
perturbed    routes depend on the KV location, too: equal tokens at different locations
             differ, as they may on a GPU; while the file ``salt`` exists (JSON ``{by}``), on that
             number, too
lost         while the file ``lost`` exists, a forward's routes do not get into the table
late         while the file ``late`` exists, KV locations are read at the end of the step
             instead of in the hook
altered      the next record of ``rows`` rows (file ``alter``: JSON ``{rows, row, layer}``) has
             one id changed after the gather; file ``altered`` then holds its rid
unsealed     while the file ``hold`` exists, no record is sealed
unfenced     while the file ``unfenced`` exists, gathers wait and forwards do not wait for them
short        while the file ``short`` exists, the capture buffer has ``FAULT_ROWS`` rows
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any


def register() -> None:
    """Entry point of ``sglang.srt.plugins``."""
    faults = os.environ.get("FAULTS", "").split(",")
    process = "launcher" if multiprocessing.parent_process() is None else "other"
    if process == "other" and "sglang.srt.managers.scheduler" in sys.modules:
        process = "scheduler"
    if "renamed" in faults and process == os.environ["FAULT_IN"]:
        _rename(os.environ["FAULT_SITE"])
    if process == "scheduler":
        for fault in ("perturbed", "lost", "late", "altered", "unsealed", "unfenced", "short"):
            if fault in faults:
                globals()[f"_{fault}"]()


def _flag(name: str) -> Path:
    return Path(os.environ["FAULT_FOLDER"], name)


def _rename(target: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    path, _, name = target.rpartition(".")
    module, _, owner_name = path.rpartition(".")
    owner = getattr(importlib.import_module(module), owner_name)
    setattr(owner, name + "_in_another_version", vars(owner)[name])
    delattr(owner, name)
    first = not any(
        "sglang_bridge" in getattr(hook, "__module__", "")
        for hooks in HookRegistry._hooks.values()
        for _kind, hook, _source in hooks
    )
    print(f"fault_plugin: {name} was renamed, before shmroute's hooks: {first}", flush=True)


def _perturbed() -> None:
    """What the native path reads and what shmroute does, each in its own capture buffer."""
    from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

    from sglang_bridge.table import RouteTable

    original, scatter = RoutedExpertsCapturer._get_local_slice, RouteTable.scatter

    def perturb(captured: Any, locations: Any) -> None:
        salt = json.loads(_flag("salt").read_text())["by"] if _flag("salt").exists() else 0
        captured.add_(locations[: len(captured), None, None].to(captured.dtype) + salt)
        captured.remainder_(int(os.environ["FAULT_EXPERTS"]))

    @functools.wraps(original)
    def by_location(self: Any, forward_batch: Any, *arguments: Any, **options: Any) -> Any:
        captured = original(self, forward_batch, *arguments, **options)
        perturb(captured, forward_batch.out_cache_loc)
        return captured

    def scatter_by_location(
        self: Any, captured: Any, locations: Any, tokens: Any, *arguments: Any
    ) -> None:
        perturb(captured[: len(tokens)], locations)
        scatter(self, captured, locations, tokens, *arguments)

    RoutedExpertsCapturer._get_local_slice = by_location
    RouteTable.scatter = scatter_by_location


def _lost() -> None:
    from sglang_bridge.table import RouteTable

    scatter = RouteTable.scatter

    def losing(self: Any, *arguments: Any) -> None:
        if _flag("lost").exists():
            raise RuntimeError("fault_plugin: these routes are lost")
        scatter(self, *arguments)

    RouteTable.scatter = losing


def _late() -> None:
    import sglang_bridge.collect as collect
    from sglang_bridge.publisher import Publisher

    finished, flush = collect._finished, Publisher.flush
    seen: dict[str, Any] = {}

    def remembering(req: Any, pool: Any, *arguments: Any) -> Any:
        seen[str(req.rid)] = (pool, req.kv.req_pool_idx)
        return finished(req, pool, *arguments)

    def rereading(self: Any) -> None:
        for job in self._pending:
            pool, index = seen.pop(job.request.rid)
            if _flag("late").exists():
                row = pool.req_to_token[index]
                end = job.request.start + job.request.tokens
                job.request.locations = row[job.request.start : end].clone()
        flush(self)

    collect._finished, Publisher.flush = remembering, rereading


def _altered() -> None:
    from sglang_bridge.gather_host import HostGatherer

    gather = HostGatherer._gather

    def altering(self: Any, job: Any) -> None:
        gather(self, job)
        wanted = _flag("alter")
        if wanted.exists() and json.loads(wanted.read_text())["rows"] == job.request.tokens:
            where = json.loads(wanted.read_text())
            wanted.unlink()
            job.record.rows[where["row"], where["layer"], 0] ^= 1
            _flag("altered").write_text(job.request.rid)

    HostGatherer._gather = altering


def _unsealed() -> None:
    from sglang_bridge.publisher import Publisher

    seal = Publisher._seal

    def holding(self: Any, job: Any) -> None:
        while _flag("hold").exists():
            time.sleep(0.01)
        seal(self, job)

    Publisher._seal = holding


def _unfenced() -> None:
    from sglang_bridge.gather_host import HostGatherer

    gather, fence = HostGatherer._gather, HostGatherer.fence

    def waiting(self: Any, job: Any) -> None:
        while _flag("unfenced").exists():
            time.sleep(0.01)
        gather(self, job)

    def open_fence(self: Any) -> None:
        if not _flag("unfenced").exists():
            fence(self)

    HostGatherer._gather, HostGatherer.fence = waiting, open_fence


def _short() -> None:
    from sglang_bridge.capturer import ArenaCapturer

    begin, kept = ArenaCapturer.on_forward_begin, {}

    def shortening(self: Any, forward_batch: Any) -> None:
        whole, ours = kept.setdefault("buffers", (self.device_cache.buffer, self._buffer))
        rows = int(os.environ["FAULT_ROWS"]) if _flag("short").exists() else len(whole)
        self.device_cache.buffer = whole[:rows]
        self._every_row = ours[:rows, :, : self.topk_size]
        begin(self, forward_batch)

    ArenaCapturer.on_forward_begin = shortening
