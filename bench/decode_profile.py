"""What the profiler sees in a window of decode steps: copies to the host, and synchronisations.

    python bench/decode_profile.py --json PATH      (a GPU; about a minute)

One engine each of ``off``, ``native`` and ``arena``, side by side, decodes 64 streams that do not
finish while SGLang's own profiler records. A step is one launch of the decode graph. Natively
each step copies its routes to the host; with an arena a step must copy and synchronise as often
as with routes off.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import result_file
from result_file import Row
from small_models import qwen3_moe

import shmroute

CONFIGURATIONS = ("off", "native", "arena")
STREAMS, OUTPUT = 64, 1500
SYNCHRONISING = tuple(
    prefix + what
    for prefix in ("cuda", "cu")
    for what in ("StreamSynchronize", "EventSynchronize", "DeviceSynchronize", "CtxSynchronize")
)


def serve(configuration: str, model: Path, folder: Path) -> None:
    """Decode and record; the trace is left in ``folder``."""
    arguments: dict[str, Any] = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "random_seed": 1,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "attention_backend": "triton",
        "moe_runner_backend": "triton",
        "disable_prefill_cuda_graph": True,
        "cuda_graph_bs_decode": [1, STREAMS],
        "max_running_requests": STREAMS,
        "max_total_tokens": STREAMS * (OUTPUT + 200),
        "mem_fraction_static": 0.8,
    }
    if configuration == "arena":
        from sglang_bridge import Engine

        name = f"profile-{os.getpid()}"
        engine: Any = Engine(**arguments, shmroute_arena=name, shmroute_capacity="1GiB")
    else:
        from sglang.srt.entrypoints.engine import Engine as NativeEngine

        name = ""
        asked = {"enable_return_routed_experts": configuration == "native"}
        engine = NativeEngine(**arguments, **asked)
    try:
        engine.loop.run_until_complete(_record(engine, configuration != "off", folder))
    finally:
        engine.shutdown()
        if name:
            shmroute.reap(name, force=True)


async def _record(engine: Any, asks: bool, folder: Path) -> None:
    from sglang.srt.managers.io_struct import ProfileReq

    async def one(seed: int) -> None:
        await engine.async_generate(
            input_ids=[3 + (seed * 7 + i) % 900 for i in range(100)],
            sampling_params={"max_new_tokens": OUTPUT, "temperature": 1.0, "ignore_eos": True},
            return_routed_experts=asks,
        )

    running = [asyncio.create_task(one(i)) for i in range(STREAMS)]
    await asyncio.sleep(2.0)
    request = ProfileReq(
        output_dir=str(folder), activities=["CPU", "GPU"], with_stack=False, record_shapes=False
    )
    await engine.tokenizer_manager.start_profile(request)
    await asyncio.sleep(0.4)
    await engine.tokenizer_manager.stop_profile()
    if any(task.done() for task in running):
        raise AssertionError("streams ended within the window: a larger OUTPUT is needed")
    await asyncio.gather(*running)


def counts(folder: Path) -> dict[str, float]:
    """Steps of the trace, and per step its copies to the host, their bytes, synchronisations."""
    found: collections.Counter[str] = collections.Counter()
    for path in folder.rglob("*.trace.json.gz"):
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        for event in events:
            name = event.get("name", "")
            if name == "cudaGraphLaunch":
                found["steps"] += 1
            elif event.get("cat") == "gpu_memcpy" and name.startswith("Memcpy DtoH"):
                found["copies"] += 1
                found["bytes"] += int(event.get("args", {}).get("bytes", 0))
            elif name in SYNCHRONISING:
                found["synchronisations"] += 1
    if not found["steps"]:
        raise AssertionError(f"no decode step in the traces under {folder}")
    steps = found["steps"]
    parts = ("copies", "bytes", "synchronisations")
    return {"steps": steps, **{part: found[part] / steps for part in parts}}


def rows_of(seen: dict[str, dict[str, float]]) -> list[Row]:
    rows = []
    for name, values in seen.items():
        rows += [
            Row(f"{name}: decode steps", values["steps"], "steps"),
            Row(f"{name}: copies to the host a step", round(values["copies"], 3), ""),
            Row(f"{name}: bytes of these a step", round(values["bytes"], 1), "B"),
            Row(f"{name}: synchronisations a step", round(values["synchronisations"], 3), ""),
        ]
    if {"off", "arena"} <= seen.keys():
        # A window begins and ends within steps: less than one in ten is its edge.
        for part in ("copies", "synchronisations"):
            more = max(0.0, seen["arena"][part] - seen["off"][part])
            rows.append(Row(f"arena: {part} added a step", round(more, 3), "", 0.1, "max"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result file")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]), Path(options.serve[2]))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = qwen3_moe(
            folder / "model", num_experts=128, top_k=8, layers=12, hidden=256, expert_width=64
        )
        children = {name: _start(name, model, folder / name) for name in CONFIGURATIONS}
        try:
            codes = {name: child.wait(200) for name, child in children.items()}
        finally:
            for child in children.values():
                _end(child)
        failed = [name for name, code in codes.items() if code]
        for name in failed:
            print(f"{name}:", (folder / f"{name}.log").read_text()[-3000:], file=sys.stderr)
        rows = rows_of({name: counts(folder / name) for name in children if name not in failed})
    rows.append(Row("engines that failed", len(failed), "", 0, "max"))
    if options.json:
        command = shlex.join(["python", "bench/decode_profile.py"])
        result_file.write(options.json, "decode_profile", command, rows)
    result_file.print_table(rows, "a window of decode steps")
    return result_file.exit_code(rows)


def _start(name: str, model: Path, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir()
    with folder.with_name(f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "--serve", name, str(model), str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    shmroute.reap(f"profile-{child.pid}", force=True)


if __name__ == "__main__":
    sys.exit(main())
