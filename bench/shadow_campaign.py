"""The real engine against its own native path, bit for bit, and with faults put in.

    python bench/shadow_campaign.py CASE... --json PATH       (``--help`` lists the cases)

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
import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import result_file
import shadow_faults
from engine_setup import has_gpu, write_model
from result_file import Row
from small_models import deepseek_v3, qwen3_moe

import shmroute
from shmroute import RouteFailed, ShmRouteReader, inspection

Outputs = list[dict[str, Any]]

_SECONDS = 300
_RETRACTION = "Retract requests"


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
    """

    about: str
    model: Callable[[Path], Path]
    traffic: Callable[[Client], None]
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int = 2000
    faults: tuple[str, ...] = ()
    finds: bool = False


class Client:
    """Requests to the engine; every record is opened, checked and released."""

    def __init__(
        self, engine: Any, vocabulary: int, *, allow_missing: bool = False, seed: int = 0
    ) -> None:
        self.engine = engine
        self._allow_missing = allow_missing
        self.random = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self.rows = self.requests = self.failed = self.inline = 0

    def prompt(self, length: int) -> list[int]:
        return list(map(int, self.random.integers(3, self._vocabulary, length)))

    def send(
        self, prompts: Sequence[list[int]], outputs: int | Sequence[int], start: int = 0
    ) -> Outputs:
        """Send all at once, wait for all, take their routes."""
        lengths = [outputs] * len(prompts) if isinstance(outputs, int) else list(outputs)
        replies: Outputs = self.engine.generate(
            input_ids=list(prompts),
            sampling_params=[_sampling(length) for length in lengths],
            return_routed_experts=True,
            routed_experts_start_len=start,
        )
        for reply in replies:
            self.take(reply, start)
        return replies

    def stream(self, prompts: Sequence[list[int]], output: int) -> None:
        async def one(prompt: list[int]) -> dict[str, Any]:
            last: dict[str, Any] = {}
            replies = await self.engine.async_generate(
                input_ids=prompt,
                sampling_params=_sampling(output),
                stream=True,
                return_routed_experts=True,
            )
            async for part in replies:
                last = part
            return last

        async def all_of_them() -> Outputs:
            return list(await asyncio.gather(*map(one, prompts)))

        for reply in self.engine.loop.run_until_complete(all_of_them()):
            self.take(reply, 0)

    def take(self, reply: dict[str, Any], start: int) -> None:
        meta = reply["meta_info"]
        self.requests += 1
        try:
            with ShmRouteReader(meta, timeout=20, allow_missing=self._allow_missing) as routes:
                wanted = meta["prompt_tokens"] + meta["completion_tokens"] - 1 - start
                if (routes.tokens, routes.start) != (wanted, start):
                    raise AssertionError(f"{routes}: expected {wanted} rows from {start} on")
                rows = routes.numpy()
                if len(rows) and int(rows.max()) >= routes.layout.num_experts:
                    raise AssertionError(f"{routes}: an expert id of {rows.max()}")
                self.rows += wanted
                self.inline += routes.inline
                routes.release()
        except RouteFailed:
            self.failed += 1


def _sampling(output: int) -> dict[str, Any]:
    return {"max_new_tokens": output, "temperature": 1.0, "ignore_eos": True}


# -- traffic ---------------------------------------------------------------------------------------


def mixed(client: Client) -> None:
    """Prefix hits, two turns, chunked prefills, streams, 256 at once, retraction."""
    shared = [client.prompt(n) for n in (64, 150, 400, 901)]
    prompts = [
        shared[i % 4] + client.prompt(int(client.random.integers(1, 120))) for i in range(256)
    ]
    first = client.send(prompts, [int(n) for n in client.random.integers(1, 90, len(prompts))])
    turns = [
        prompt + reply["output_ids"] + client.prompt(17)
        for prompt, reply in zip(prompts[:96], first[:96], strict=True)
    ]
    client.send(turns[:48], 24)
    client.send(turns[48:], 24, start=min(map(len, turns[48:])) - 10)
    client.send([client.prompt(n) for n in (3001, 2048, 2047, 1537)], 8)
    client.stream([shared[i % 4] + client.prompt(30) for i in range(32)], 40)
    client.send([client.prompt(40) for _ in range(256)], 300)
    same = client.prompt(333)
    client.send([same] * 24, 12)


def reuse(client: Client) -> None:
    """Short requests through a pool of KV locations that holds a few of them."""
    for _ in range(6):
        client.send([client.prompt(24) for _ in range(120)], 9)


def bulk(client: Client) -> None:
    """Many tokens at full width: long prompts, a full batch, second turns, shared prefixes."""
    long_prompts = [client.prompt(8000) for _ in range(48)]
    for begin in range(0, 48, 16):
        client.send(long_prompts[begin : begin + 16], 16)
    replies = client.send([client.prompt(256) for _ in range(160)], 64)
    client.send([client.prompt(100) + reply["output_ids"] for reply in replies], 32)
    shared = client.prompt(7900)
    for _ in range(2):
        client.send([shared + client.prompt(200) for _ in range(34)], 16)
    client.stream([client.prompt(500) for _ in range(32)], 32)


def paused(client: Client) -> None:
    """The memory is given back and taken again, as a colocated trainer does."""
    mixed(client)
    for _ in range(2):
        before = _gpu_bytes_used()
        client.engine.release_memory_occupation()
        between = _gpu_bytes_used()
        client.engine.resume_memory_occupation()
        print(f"GPU memory: {before >> 20} MiB, released {between >> 20} MiB", flush=True)
        mixed(client)


def _gpu_bytes_used() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return int(said.split()[0]) << 20


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
        {**_SMALL, "enable_memory_saver": True},
        rows=240_000,
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
        "the same without the scatter's wait for the gather",
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


def run_case(name: str) -> list[Row]:
    """Serve one case and judge it by the engine's own counters."""
    case, arena = CASES[name], f"shadow-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        timings = Path(folder, "snapshots.txt")
        os.environ[shadow_faults.SNAPSHOT_FILE] = str(timings)
        model = case.model(Path(folder))
        engine = shadow_faults.engine(case.faults)(**arguments_for(case, model, arena))
        try:
            config = json.loads((model / "config.json").read_text())
            client = Client(engine, config["vocab_size"], allow_missing=case.finds)
            began = time.monotonic()
            case.traffic(client)
            seconds = time.monotonic() - began
            counters = settled(arena)
            arenas = len(inspection.inspect_all(arena))
        finally:
            engine.shutdown()
            shmroute.reap(arena, force=True)
        waits = snapshot_waits(name, timings)
    print(name, json.dumps(counters), flush=True)
    return [*judge(name, case, client, counters, seconds, arenas), *waits]


def snapshot_waits(name: str, timings: Path) -> list[Row]:
    """How long snapshots took, by the stream that they were taken on."""
    taken: dict[str, list[float]] = {}
    for line in timings.read_text().splitlines() if timings.exists() else ():
        way, milliseconds = line.split()
        taken.setdefault(way, []).append(float(milliseconds))
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


def settled(arena: str) -> dict[str, int]:
    """Counters of all the engine's arenas once nothing is in flight."""
    deadline = time.monotonic() + 30
    while True:
        totals: dict[str, int] = {}
        for report in inspection.inspect_all(arena):
            for name, value in report.counters.items():
                totals[name] = totals.get(name, 0) + value
        if totals["reserved"] == totals["sealed"] + totals["failed"]:
            return totals
        if time.monotonic() > deadline:
            raise AssertionError(f"records stay unsealed: {totals}")
        time.sleep(0.02)


def judge(
    name: str,
    case: Case,
    client: Client,
    counters: dict[str, int],
    seconds: float,
    arenas: int,
) -> list[Row]:
    counted = sum(counters[part] for part in ("ticketed", "inline", "failed_requests", "no_routes"))
    rows = [
        Row(f"{name}: rows compared", counters["shadow_rows"], "rows", case.rows, "min"),
        Row(f"{name}: requests", client.requests, "requests"),
        Row(f"{name}: unaccounted requests", abs(counters["finished"] - counted), "", 0, "max"),
        Row(f"{name}: arenas", arenas, "", 1, "max"),
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


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described = "; ".join(f"{name}: {case.about}" for name, case in CASES.items())
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=described)
    parser.add_argument("--json", type=Path, help="write the result file")
    parser.add_argument("--parallel", type=int, default=1, help="small cases at a time")
    parser.add_argument("--logs", type=Path, help="folder for each case's output")
    options = parser.parse_args(argv if argv is None else list(argv))
    command = shlex.join(["python", "bench/shadow_campaign.py", *options.cases])
    if len(options.cases) == 1 and not options.logs:
        return _report(run_case(options.cases[0]), options.json, command)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(options.parallel) as workers,
    ):
        logs = options.logs or Path(folder)
        rows: list[Row] = []
        for found in workers.map(lambda name: _in_child(name, logs), options.cases):
            rows += found
            _report(rows, options.json, command, quiet=True)
    return _report(rows, options.json, command)


def _report(rows: list[Row], path: Path | None, command: str, *, quiet: bool = False) -> int:
    if path:
        result_file.write(path, "shadow_campaign", command, rows)
    if not quiet:
        result_file.print_table(rows, "shadow campaign")
    return result_file.exit_code(rows)


def _in_child(name: str, logs: Path) -> list[Row]:
    """A process for each: SGLang keeps state of its own, and the bridge is set up once."""
    logs.mkdir(parents=True, exist_ok=True)
    result, log = logs / f"shadow-{name}.json", logs / f"shadow-{name}.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, __file__, name, "--json", str(result)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end(child)
    text = log.read_text(errors="replace")
    retractions = Row(f"{name}: retractions", text.count(_RETRACTION), "")
    if not result.exists():
        print(f"{name}: exit code {code}; its log ends with\n{text[-3000:]}", flush=True)
        return [Row(f"{name}: exit code", code, "", 0, "max"), Row(f"{name}: ran", 0, "", 1, "min")]
    shown = json.loads(result.read_text())["rows"]
    fields = [{key: value for key, value in row.items() if key != "ok"} for row in shown]
    return [*(Row(**one) for one in fields), retractions]


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what the child started, and the arena that it can no longer remove."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    shmroute.reap(f"shadow-{child.pid}", force=True)


if __name__ == "__main__":
    sys.exit(main())
