"""The real engine against its own native path, bit for bit, and with faults put in.

    python bench/shadow_campaign.py CASE... --json PATH [--quick]     (``--help`` lists the cases)

Each case starts one engine in shadow mode: SGLang's own host cache keeps running, and every
record is compared with it row by row inside the engine. The traffic mixes what moves KV
locations about: shared prefixes, chunked prefills, second turns with and without a start,
streams, retraction, hundreds of requests at once. A case fails if a row differs, is missing,
or was not counted. ``fault-*`` cases put a fault in and must see what it does.

The models have random weights that spread (``small_models``; ``full`` initialises the dimensions
of Qwen3-30B-A3B on the GPU), since with SGLang's dummy weights all tokens route alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import result_file
import shadow_faults
from bench_command import end_in_good_order
from engine_process import (
    CPU_ENV,
    inodes_in_use,
    processes_of,
    remove_sglang_files,
    shared_memory_files,
)
from engine_setup import has_gpu, write_model
from result_file import Row
from shadow_traffic import QUICK, Client, attention_ranks, bulk, mixed, paused, reuse
from small_models import deepseek_v3, qwen3_moe

import shmroute
from sglang_bridge.staging import STAGING_BYTES
from shmroute import inspection

Counters = dict[str, int]

_SECONDS = 300
_RETRACTION = "Retract requests"
_TABLE_MADE = "; route table of "
_interrupted = threading.Event()


@dataclass(frozen=True)
class Case:
    """One engine and what is asked of it.

    Attributes
    ----------
    model
        Writes the checkpoint into a folder.
    arguments
        SGLang's, over the common ones; ``shmroute_*`` ones are the bridge's.
    traffic
        Sends requests and returns how many rows came, by name.
    rows
        Rows that must have been compared.
    faults
        Names of ``shadow_faults`` to put in.
    finds
        The fault must make rows differ, or their tags.
    arenas
        One for each data-parallel rank; all of them must have served requests.
    """

    about: str
    model: Callable[[Path], Path]
    traffic: Callable[[Client], None]
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 2000
    faults: tuple[str, ...] = ()
    finds: bool = False
    arenas: int = 1


# -- cases -----------------------------------------------------------------------------------------


def _qwen(path: Path) -> Path:
    return qwen3_moe(path, num_experts=256, top_k=8, layers=6, hidden=256, expert_width=64)


def _qwen_512(path: Path) -> Path:
    return qwen3_moe(path, num_experts=512, top_k=8, layers=4, hidden=256, expert_width=64)


def _deepseek(path: Path) -> Path:
    # The latent widths of the real one: SGLang's Triton attention knows few.
    return deepseek_v3(
        path,
        num_experts=256,
        top_k=8,
        layers=4,
        hidden=256,
        expert_width=64,
        latent=512,
        rotary=64,
    )


def _full(path: Path) -> Path:
    return write_model(path, gpu=has_gpu())


_SMALL = {"max_total_tokens": 30_000, "chunked_prefill_size": 512}
_TIGHT = {**_SMALL, "max_total_tokens": 1536, "disable_radix_cache": True}

CASES: dict[str, Case] = {
    "small": Case(
        "Qwen3-MoE, 256 experts, retraction",
        _qwen,
        mixed,
        {**_SMALL, "schedule_conservativeness": 0.1},
        rows=80_000,
    ),
    "experts-512": Case("Qwen3-MoE, 512 experts: uint16", _qwen_512, mixed, _SMALL, rows=80_000),
    "deepseek": Case("DeepSeek-V3, fused shared experts", _deepseek, mixed, _SMALL, rows=80_000),
    "host-table": Case(
        "the route table in page-locked host memory",
        _qwen,
        mixed,
        {**_SMALL, "shmroute_table": "host"},
        rows=80_000,
    ),
    "no-overlap": Case(
        "without overlap scheduling, pages of 16, mixed chunks",
        _qwen,
        mixed,
        {**_SMALL, "disable_overlap_schedule": True, "page_size": 16, "enable_mixed_chunk": True},
        rows=80_000,
    ),
    "full": Case(
        "dimensions of Qwen3-30B-A3B; snapshots in turn on either stream",
        _full,
        bulk,
        {"load_format": "dummy"},
        rows=1_000_000,
        faults=("timed-snapshots",) if has_gpu() else (),
    ),
    "memory-saver": Case(
        "memory given back and taken again",
        _qwen,
        paused,
        # A pool that is large enough for its table to have memory of its own.
        {**_SMALL, "enable_memory_saver": True, "max_total_tokens": 400_000},
        rows=240_000,
        faults=("counted-memory",) if has_gpu() else (),
    ),
    "reuse": Case(
        "KV locations rewritten at once, gathers that come late",
        _qwen,
        reuse,
        _TIGHT,
        rows=20_000,
        faults=("late-gather",),
    ),
    "fault-no-fence": Case(
        "the same without the wait for the gather",
        _qwen,
        reuse,
        _TIGHT,
        rows=20_000,
        faults=("late-gather", "no-fence"),
        finds=True,
    ),
    "fault-copy": Case(
        "a CUDA error in the copy path in mid-traffic",
        _qwen,
        mixed,
        _SMALL,
        rows=10_000,
        faults=("copy-error",),
    ),
    "prefill-graph": Case(
        "prefill CUDA graphs",
        _qwen,
        mixed,
        {**_SMALL, "disable_prefill_cuda_graph": False, "cuda_graph_bs_prefill": [64, 256, 512]},
        rows=80_000,
    ),
    "tp2": Case("tp_size=2", _qwen, mixed, {**_SMALL, "tp_size": 2}, rows=80_000),
    "dp2-attention": Case(
        "DP attention on two ranks, whose routes transformers computes, too",
        _qwen,
        attention_ranks,
        {**_SMALL, "tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
        rows=80_000,
        arenas=2,
    ),
}


def arguments_for(case: Case, model: Path, arena: str) -> dict[str, Any]:
    common: dict[str, Any] = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "random_seed": 1,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "max_running_requests": 256,
        "log_level": "info",
        "shmroute_arena": arena,
        "shmroute_capacity": "2GiB" if has_gpu() else "256MiB",
        "shmroute_slots": 2048,
        "shmroute_shadow": True,
    }
    if has_gpu():
        common |= {
            "attention_backend": "triton",
            "moe_runner_backend": "triton",
            "mem_fraction_static": 0.88,
            "chunked_prefill_size": 8192,
            "cuda_graph_bs_decode": [1, 2, 4, 8, 16, 32, 64, 128, 160, 256],
            "disable_prefill_cuda_graph": True,
        }
    else:
        common |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            "cuda_graph_backend_decode": "disabled",
            "cuda_graph_backend_prefill": "disabled",
            "mem_fraction_static": 0.2,
        }
    return common | case.arguments


def run_case(name: str, *, quick: bool) -> list[Row]:
    """Serve one case and judge it by the engine's own counters."""
    case, arena = CASES[name], f"shadow-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "measured.txt")
        os.environ[shadow_faults.MEASURED_FILE] = str(measured)
        model = case.model(Path(folder))
        engine = shadow_faults.engine(case.faults)(**arguments_for(case, model, arena))
        try:
            client = Client(engine, model, allow_missing=case.finds, quick=quick)
            began = time.monotonic()
            case.traffic(client)
            seconds = time.monotonic() - began
            arenas = settled(arena)
        finally:
            engine.shutdown()
            shmroute.reap(arena, force=True)
        taken = read_measured(measured)
    print(name, json.dumps(arenas), flush=True)
    least = case.rows // QUICK if quick else case.rows
    judged = [
        *judge(name, case, least, client, total(arenas), seconds),
        *each_rank(name, case, client, arenas),
    ]
    returned = taken.pop("returned", [])
    return [*judged, *memory_returned(name, returned), *snapshot_waits(name, taken)]


def read_measured(path: Path) -> dict[str, list[float]]:
    """What the engine's process measured, by the word that it wrote before each number."""
    measured: dict[str, list[float]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        word, number = line.split()
        measured.setdefault(word, []).append(float(number))
    return measured


def memory_returned(name: str, returned: list[float]) -> list[Row]:
    """GPU memory of the table, the staging and their like that a released engine gives back."""
    what = f"{name}: GPU memory of the route table and staging returned, each of {len(returned)}"
    least = STAGING_BYTES / 2**20
    return [Row(what, round(min(returned) / 2**20, 1), "MiB", least, "min")] if returned else []


def snapshot_waits(name: str, taken: dict[str, list[float]]) -> list[Row]:
    """How long snapshots took, by the stream that they were taken on."""
    rows = []
    for way, times in sorted(taken.items()):
        for label, value in (
            ("p50", np.percentile(times, 50)),
            ("p99", np.percentile(times, 99)),
            ("longest", max(times)),
        ):
            what = f"{name}: snapshot on the {way} stream, {label} of {len(times)}"
            rows.append(Row(what, round(float(value), 3), "ms"))
    return rows


def settled(arena: str) -> list[Counters]:
    """Counters of each of the engine's arenas once nothing is in flight."""
    deadline = time.monotonic() + 30
    while True:
        arenas = [dict(report.counters) for report in inspection.inspect_all(arena)]
        if all(one["reserved"] == one["sealed"] + one["failed"] for one in arenas):
            return arenas
        if time.monotonic() > deadline:
            raise AssertionError(f"records stay unsealed: {arenas}")
        time.sleep(0.02)


def total(arenas: Sequence[Counters]) -> Counters:
    """The counters of several arenas, added."""
    names = {name for one in arenas for name in one}
    return {name: sum(one.get(name, 0) for one in arenas) for name in sorted(names)}


def judge(
    name: str,
    case: Case,
    least: int,
    client: Client,
    counters: Counters,
    seconds: float,
) -> list[Row]:
    """What the counters say; ``least`` rows must have been compared."""
    counted = sum(counters[part] for part in ("ticketed", "inline", "failed_requests", "no_routes"))
    rows = [
        Row(f"{name}: rows compared", counters["shadow_rows"], "rows", least, "min"),
        Row(f"{name}: requests", client.requests, "requests"),
        Row(f"{name}: unaccounted requests", abs(counters["finished"] - counted), "", 0, "max"),
        Row(f"{name}: seconds of traffic", round(seconds, 1), "s"),
        Row(f"{name}: inline", counters["inline"], "requests"),
        Row(f"{name}: copies while the arena was not page-locked", counters["pageable_copies"], ""),
        Row(f"{name}: host buffers made on the way", counters["host_buffers_added"], ""),
    ]
    different, missing = counters["shadow_mismatches"], counters["shadow_rows_incomparable"]
    if case.finds:
        rows.append(Row(f"{name}: rows wrong or missing", different + missing, "rows", 1, "min"))
        return rows
    rows += [
        Row(f"{name}: rows that differ", different, "rows", 0, "max"),
        Row(f"{name}: rows missing", missing, "rows", 0, "max"),
        Row(f"{name}: exceptions in hooks", counters["hook_errors"], "", 0, "max"),
    ]
    if "copy-error" in case.faults:
        rows += [
            Row(f"{name}: RouteFailed at readers", client.failed, "requests", 1, "min"),
            Row(f"{name}: inline afterwards", counters["inline_after_failure"], "", 1, "min"),
        ]
    else:
        rows.append(Row(f"{name}: failed", counters["failed_requests"], "requests", 0, "max"))
    return rows


def each_rank(name: str, case: Case, client: Client, arenas: Sequence[Counters]) -> list[Row]:
    """Every data-parallel rank has an arena and served requests, with the rows of its tokens."""
    fewest = min((one["rows_sealed"] for one in arenas), default=0)
    rows = [
        Row(f"{name}: arenas", len(arenas), "", case.arenas, "max"),
        Row(f"{name}: arenas missing", case.arenas - len(arenas), "", 0, "max"),
        Row(f"{name}: rows of the arena with the fewest", fewest, "rows", 1, "min"),
    ]
    if client.agreement:
        ranks, least = len(client.agreement), round(min(client.agreement.values()), 4)
        rows += [
            Row(f"{name}: ranks compared with transformers", ranks, "", case.arenas, "min"),
            Row(f"{name}: least agreement with transformers", least, "", 0.9, "min"),
        ]
    return rows


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described = "; ".join(f"{name}: {case.about}" for name, case in CASES.items())
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=described)
    parser.add_argument("--json", type=Path, help="write the result file")
    parser.add_argument(
        "--quick", action="store_true", help=f"an engine for each case, 1/{QUICK} of the requests"
    )
    parser.add_argument("--parallel", type=int, default=1, help="small cases at a time")
    parser.add_argument("--logs", type=Path, help="folder for each case's output")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv if argv is None else list(argv))
    if not has_gpu():
        os.environ.update(CPU_ENV)
    quick = ["--quick"] * options.quick
    command = shlex.join(["python", "bench/shadow_campaign.py", *options.cases, *quick])
    if options.here:
        return _report(run_case(options.cases[0], quick=options.quick), options.json, command)
    end_in_good_order()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(options.parallel) as workers,
    ):
        logs = options.logs or Path(folder)
        rows: list[Row] = []
        try:
            for found in workers.map(lambda name: _in_child(name, logs, *quick), options.cases):
                rows += found
                _report(rows, options.json, command, quiet=True)
        except BaseException:
            _interrupted.set()  # leaving the pool waits for its threads, and these for their cases
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return _report(rows, options.json, command)


def _report(rows: list[Row], path: Path | None, command: str, *, quiet: bool = False) -> int:
    if path:
        result_file.write(path, "shadow_campaign", command, rows)
    if not quiet:
        result_file.print_table(rows, "shadow campaign")
    return result_file.exit_code(rows)


def _in_child(name: str, logs: Path, *arguments: str) -> list[Row]:
    """A process for each: SGLang keeps state of its own, and the bridge is set up once."""
    logs.mkdir(parents=True, exist_ok=True)
    result, log = logs / f"shadow-{name}.json", logs / f"shadow-{name}.log"
    before, used = set(shared_memory_files().values()), set[int]()
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, __file__, name, "--here", "--json", str(result), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _follow(child, used)
        finally:
            _end(child)
            remove_sglang_files(used - before)
    text = log.read_text(errors="replace")
    logged = [
        Row(f"{name}: retractions", text.count(_RETRACTION), ""),
        Row(
            f"{name}: ranks with a route table",
            text.count(_TABLE_MADE),
            "",
            CASES[name].arenas,
            "max",
        ),
    ]
    if not result.exists():
        print(f"{name}: exit code {code}; its log ends with\n{text[-3000:]}", flush=True)
        return [Row(f"{name}: exit code", code, "", 0, "max"), Row(f"{name}: ran", 0, "", 1, "min")]
    shown = json.loads(result.read_text())["rows"]
    fields = [{key: value for key, value in row.items() if key != "ok"} for row in shown]
    return [*(Row(**one) for one in fields), *logged]


def _follow(child: subprocess.Popen[bytes], used: set[int]) -> int:
    """Wait for a case, and note what its processes use in /dev/shm; its exit code, -1 if it takes
    too long or the campaign is interrupted.
    """
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and not _interrupted.is_set():
        for process in processes_of(child.pid):
            used |= inodes_in_use(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(1.0)
    return -1


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what the child started, and the arena that it can no longer remove."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    shmroute.reap(f"shadow-{child.pid}", force=True)


if __name__ == "__main__":
    sys.exit(main())
