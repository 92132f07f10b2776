"""What capture, copy and reading cost on a GPU, without an engine around them.

    python bench/gpu.py [--quick] [--json PATH]      (about 60 s on an H100)

Rows are those of Qwen3-30B-A3B: 48 layers, top-8 of 128 experts, 384 bytes a token. The table
holds 200,000 KV tokens and locations are scattered over it. Ceilings are torch's own page-locked
memory, measured in the same run. Host times are of the calling thread, p50 and p99 of many
rounds; GPU times are between events.

The scatter is measured three ways: the fused kernel, the eager torch form, and that form in a
captured CUDA graph, whose static inputs have to be filled first. All that a forward outside of
graphs does for its routes is measured two ways: the routers' tensors kept until its end, and each
layer's copied. The trainer's part runs in a process of its own, see `gpu_trainer`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import result_file
import torch
from gpu_cold import TOKENS, DriverCalls, OtherWork
from gpu_forwards import TOKENS as PREFILL_TOKENS
from gpu_forwards import Prefill
from gpu_timing import Rows, figure, gbs, gpu_us, host_us, percentiles
from result_file import Row

import shmroute
from sglang_bridge.epochs import WeightEpochs
from sglang_bridge.finished import Finished
from sglang_bridge.gather_device import DeviceGatherer
from sglang_bridge.publisher import Publisher
from sglang_bridge.table import RouteTable
from sglang_bridge.ticket_tensor import PickledText
from shmroute import RouteLayout, ShmRouteReader
from shmroute.pinned import PageLock

ROUTES = RouteLayout(128, 8, range(48), model="Qwen/Qwen3-30B-A3B")
DEVICE = torch.device("cuda:0")
KV_TOKENS = 200_000
VOCABULARY = 151_936
TRAINER = Path(__file__).with_name("gpu_trainer.py")


class Rig:
    """An arena, its publisher and a filled table; requests share tokens and locations."""

    def __init__(self, capacity: str, slots: int) -> None:
        self.arena = shmroute.Arena.create(
            f"bench-gpu-{os.getpid()}-{secrets.token_hex(3)}",
            ROUTES,
            capacity=capacity,
            slots=slots,
            maintained=True,
        )
        self.table = RouteTable(ROUTES, KV_TOKENS, DEVICE, vocabulary=VOCABULARY)
        self.gatherer = DeviceGatherer(self.table, self.arena, self.arena.writer.counters)
        self.publisher = Publisher(
            self.arena,
            WeightEpochs(),
            self.gatherer,
            vocabulary=VOCABULARY,
            inline_when_full=True,
            shadow=False,
            respond=PickledText,
        )
        self.publisher.start()
        random = np.random.default_rng(1)
        self.pool = torch.zeros((256, 40_000), dtype=torch.int32, device=DEVICE)
        where = random.permutation(KV_TOKENS - 1)[:40_000] + 1
        self.pool[:] = torch.from_numpy(where.astype(np.int32)).to(DEVICE)
        self.ids = array("q", random.integers(3, VOCABULARY, 40_000).tolist())
        self._fill(where)

    def _fill(self, where: np.ndarray) -> None:
        for begin in range(0, 40_000, 4000):
            part = slice(begin, begin + 4000)
            scores = torch.rand((4000, 48, 128), device=DEVICE)
            captured = scores.topk(8, dim=-1).indices.to(torch.int32).contiguous()
            self.table.scatter(
                captured,
                torch.from_numpy(where[part]).to(DEVICE),
                torch.tensor(self.ids[part], device=DEVICE),
                torch.arange(begin, begin + 4000, device=DEVICE),
                0,
            )
        torch.cuda.synchronize()

    def requests(self, rids: Sequence[str], tokens: int) -> list[SimpleNamespace]:
        """Finished ones, with what is read of SGLang's."""
        prompt, output = self.ids[:tokens], array("q")
        return [
            SimpleNamespace(rid=rid, session=None, origin_input_ids=prompt, output_ids=output)
            for rid in rids
        ]

    def note(self, requests: Sequence[SimpleNamespace], tokens: int) -> None:
        """Their end, all in one step, as an engine's hook tells it."""
        for slot, request in enumerate(requests):
            taken = self.gatherer.snapshot(self.pool, slot, 0, tokens)
            self.publisher.note(Finished(request, 0, tokens, taken, None))

    def end(self, rids: Sequence[str], tokens: int) -> list[bytes]:
        """Tickets of requests that end in one step."""
        requests = self.requests(rids, tokens)
        self.note(requests, tokens)
        self.publisher.issue()
        return envelopes(requests)

    def settle(self) -> None:
        deadline = time.monotonic() + 60
        while list(self.arena.writer.in_flight()):
            if time.monotonic() > deadline:
                raise TimeoutError("records stay unsealed")
            time.sleep(0.001)

    def close(self) -> None:
        self.publisher.stop()
        shmroute.reap(self.arena.name, force=True)


def envelopes(requests: Sequence[SimpleNamespace]) -> list[bytes]:
    """What their responses carry."""
    return [request.routed_experts.envelope for request in requests]


@contextlib.contextmanager
def rig(capacity: str = "6GiB", slots: int = 4096) -> Iterator[Rig]:
    made = Rig(capacity, slots)
    try:
        yield made
    finally:
        made.close()


# -- page-locking and copies -----------------------------------------------------------------------


def page_locking(rounds: int) -> Rows:
    """How long a registration takes, and what it does to launches of another thread."""
    del rounds
    memory = torch.zeros(4 << 30, dtype=torch.uint8)
    lock = PageLock(memory.data_ptr(), memory.nbytes, what="bench")
    small = torch.zeros(1024, device=DEVICE)
    quiet = host_us(lambda: small.add_(1), 300)
    began = time.perf_counter()
    lock.start()
    busy = []
    while not lock.wait(0) and lock.refused is None:
        at = time.perf_counter_ns()
        small.add_(1)
        busy.append((time.perf_counter_ns() - at) / 1e3)
        time.sleep(0.0005)
    seconds = time.perf_counter() - began
    lock.close()
    return [
        Row("page-locking, a GiB", figure(seconds / 4), "s"),
        Row("launch while another thread page-locks 4 GiB, p50", figure(np.median(busy)), "us"),
        Row("launch while another thread page-locks 4 GiB, longest", figure(max(busy)), "us"),
        Row("launch without, p50", figure(np.median(quiet)), "us"),
    ]


def copies(made: Rig, rounds: int) -> Rows:
    """Device to arena against device to torch's page-locked memory."""
    rows = []
    heap = made.gatherer._heap
    for tokens in (2048, 21_845, 32_768, 174_762):
        nbytes = tokens * ROUTES.row_bytes
        source = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
        torch_pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        pageable = torch.empty(nbytes, dtype=torch.uint8)
        targets = {"torch": torch_pinned, "arena": heap[: source.nbytes]}
        took: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(3):
            for name, target in targets.items():
                took[name].append(
                    gpu_us(functools.partial(target.copy_, source, non_blocking=True), rounds)
                )
        ceiling, ours = (gbs(nbytes, min(took[name])) for name in ("torch", "arena"))
        label = f"{nbytes / 1e6:.1f} MB"
        enough = nbytes >= 8_000_000
        rows += [
            Row(f"device to torch's page-locked memory, {label}", ceiling, "GB/s"),
            Row(f"device to the arena, {label}", ours, "GB/s"),
            Row(
                f"arena / ceiling, {label}",
                figure(100 * ours / ceiling),
                "%",
                95 if enough else None,
                "min" if enough else None,
            ),
        ]
        if nbytes == 32_768 * 384:
            slow = gpu_us(functools.partial(pageable.copy_, source), rounds)
            rows.append(Row(f"device to pageable memory, {label}", gbs(nbytes, slow), "GB/s"))
    return rows


# -- the forward -----------------------------------------------------------------------------------


def scatter(made: Rig, rounds: int) -> Rows:
    """A step's scatter, three ways, for decode batches and a prefill."""
    rows = []
    for tokens in (64, 160, 8192):
        scores = torch.rand((tokens, 48, 128), device=DEVICE)
        captured = scores.topk(8, dim=-1).indices.to(torch.int32).contiguous()
        buffer = captured.clone()
        where = torch.randperm(KV_TOKENS - 1, device=DEVICE)[:tokens] + 1
        ids = torch.randint(0, VOCABULARY, (tokens,), device=DEVICE)
        positions = torch.arange(tokens, device=DEVICE)
        table = RouteTable(ROUTES, KV_TOKENS, DEVICE, vocabulary=VOCABULARY)
        arguments = (buffer, where, ids, positions, 0)

        def fused(table: RouteTable = table, arguments: Any = arguments) -> None:
            table.scatter(*arguments)

        def eager(table: RouteTable = table, arguments: Any = arguments) -> None:
            table.scatter_with_torch(*arguments)

        static = [one.clone() for one in (where, ids, positions)]
        graph = _captured(table, buffer, static)

        def replayed(graph: Any = graph, static: Any = static, given: Any = arguments) -> None:
            for target, source in zip(static, given[1:4], strict=True):
                target.copy_(source)
            graph.replay()

        for name, form in (("fused kernel", fused), ("eager", eager), ("graph", replayed)):
            form()
            buffer.copy_(captured)
            label = f"scatter of {tokens} tokens, {name}"
            host = host_us(form, rounds)
            budget = 50 if name == "fused kernel" else None
            rows += percentiles(f"{label}, host", host, budget, None)
            buffer.copy_(captured)
            rows.append(Row(f"{label}, GPU", figure(gpu_us(form, rounds)), "us"))
    return rows


def _captured(table: RouteTable, buffer: torch.Tensor, static: list[torch.Tensor]) -> Any:
    where, ids, positions = static
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        table.scatter_with_torch(buffer, where, ids, positions, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.scatter_with_torch(buffer, where, ids, positions, 0)
    return graph


def forwards(made: Rig, rounds: int) -> Rows:
    """What a prefill outside of graphs adds: 48 layers, and what follows at the forward's end."""
    del made
    prefill = Prefill(ROUTES, KV_TOKENS, VOCABULARY, DEVICE)
    rows = _forward_rows("kept", prefill.keep, prefill.store, rounds)
    return rows + _forward_rows("copied", prefill.copy, prefill.scatter, rounds)


def _forward_rows(
    name: str, take: Callable[..., None], end: Callable[[], None], rounds: int
) -> Rows:
    label = f"routes of a forward of {PREFILL_TOKENS} tokens, layers {name}"

    def whole() -> None:
        take()
        end()

    whole()
    rows = percentiles(f"{label}, host", host_us(whole, rounds), None, None)
    on_gpu = gpu_us(whole, max(20, rounds // 4), 4_000_000)
    rows.append(Row(f"{label}, GPU", figure(on_gpu), "us"))
    one_layer, its_end, between = [], [], OtherWork()
    for _ in range(max(10, rounds // 10)):
        one_layer.append(_timed(functools.partial(take, 1), between))
        take()
        its_end.append(_timed(end, between))
    rows += percentiles(f"{label}, one layer, cold caches", one_layer, None, None)
    return rows + percentiles(f"{label}, its end, cold caches", its_end, None, None)


# -- the end of requests ---------------------------------------------------------------------------


def finishes(made: Rig, rounds: int) -> Rows:
    """The scheduler thread's part, and when rows are there, for requests ending together."""
    rows = []
    for count, tokens in ((1, 1024), (1, 8192), (1, 32_768), (4, 8192), (160, 768)):
        note, issue, flush, there = [], [], [], []
        for turn in range(rounds if count == 1 else max(5, rounds // 8)):
            torch.cuda.synchronize()
            requests = made.requests([f"{tokens}-{turn}-{i}" for i in range(count)], tokens)
            began = time.perf_counter_ns()
            made.note(requests, tokens)
            noted = time.perf_counter_ns()
            made.publisher.issue()
            issued = time.perf_counter_ns()
            made.publisher.flush()
            made.gatherer.result_processed(0)
            flushed = time.perf_counter_ns()
            tickets = envelopes(requests)
            with ShmRouteReader(tickets[-1]):
                there.append((time.perf_counter_ns() - flushed) / 1e3)
            note.append((noted - began) / 1e3)
            issue.append((issued - noted) / 1e3)
            flush.append((flushed - issued) / 1e3)
            made.settle()
            shmroute.release(tickets)
        whole = np.array(note) + np.array(issue) + np.array(flush)
        label = f"{count} x {tokens} tokens"
        budgets = (100, 300) if count == 1 else (None, None)
        rows += percentiles(f"scheduler thread, {label}", whole, *budgets)
        if count == 160:
            typical = figure(float(np.median(whole)) / 1e3)
            rows.append(Row(f"scheduler thread, {label}, in all", typical, "ms", 3, "max"))
        rows += [
            Row(f"of these the notes, {label}, p50", figure(np.median(note)), "us"),
            Row(f"of these the tickets, {label}, p50", figure(np.median(issue)), "us"),
            Row(f"of these the flush, {label}, p50", figure(np.median(flush)), "us"),
            Row(f"from the flush to an open record, {label}, p50", figure(np.median(there)), "us"),
        ]
    return rows


def cold_finishes(made: Rig, rounds: int) -> Rows:
    """A request's end where none of its code and data are in the caches, and what of that are the
    driver's calls alone: the same ones, from a loop that does nothing else.
    """
    between, calls, whole = OtherWork(), DriverCalls(made.gatherer, made.pool), []
    alone = []
    for turn in range(max(10, rounds // 5)):
        torch.cuda.synchronize()
        requests = made.requests([f"cold-{turn}"], TOKENS)
        parts = functools.partial(made.note, requests, TOKENS), made.publisher.issue
        whole.append(sum(_timed(part, between) for part in (*parts, made.publisher.flush)))
        made.gatherer.result_processed(0)
        made.settle()
        shmroute.release(envelopes(requests))
        alone.append(_timed(calls, between))
    return [
        *percentiles(f"scheduler thread, 1 x {TOKENS} tokens, cold caches", whole, None, None),
        *percentiles("of these the driver's calls alone", alone, None, None),
    ]


def _timed(part: Callable[[], object], between: Callable[[], None]) -> float:
    between()
    began = time.perf_counter_ns()
    part()
    return (time.perf_counter_ns() - began) / 1e3


def waits(made: Rig, rounds: int) -> Rows:
    """How long the next forward's scatter would wait for the gather, if it came at once."""
    rows = []
    for load in ([(1, 8192)], [(16, 8192)], [(160, 8192)], [(1, 32_768), (159, 768)]):
        label = " + ".join([f"{count} x {tokens}" for count, tokens in load])
        took = []
        for turn in range(max(4, rounds // 20)):
            torch.cuda.synchronize()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            tickets = []
            for count, tokens in load:
                tickets += made.end([f"w{tokens}-{turn}-{i}" for i in range(count)], tokens)
            first.record(made.gatherer._gather_stream)
            made.publisher.flush()
            made.gatherer.fence()
            last.record()
            torch.cuda.synchronize()
            took.append(first.elapsed_time(last) * 1e3)
            made.settle()
            shmroute.release(tickets)
        rows.append(
            Row(
                f"a scatter that comes at once waits, {label} tokens",
                figure(np.median(took)),
                "us",
            )
        )
    return rows


def snapshots(made: Rig, rounds: int) -> Rows:
    """A snapshot while the next forward runs 20 ms, as in SGLang's overlap, both ways."""
    forward, schedule = torch.cuda.Stream(), torch.cuda.Stream()
    took: dict[str, list[float]] = {"side stream": [], "schedule stream": []}
    for turn in range(max(10, rounds // 10)):
        way = ("side stream", "schedule stream")[turn % 2]
        torch.cuda.synchronize()
        made.gatherer.result_processed(0)
        with torch.cuda.stream(forward):
            forward.wait_stream(schedule)
            made.gatherer.forward_begins()
            torch.cuda._sleep(36_000_000)
        schedule.wait_stream(forward)  # SGLang's barrier, its coarse form
        began = time.perf_counter_ns()
        with torch.cuda.stream(schedule):
            if way == "side stream":
                made.gatherer.snapshot(made.pool, 0, 0, 8192)
                made.gatherer._gather_stream.synchronize()
            else:
                made.pool[0, :8192].clone()
                schedule.synchronize()
        took[way].append((time.perf_counter_ns() - began) / 1e3)
    return [
        Row(f"snapshot behind a 20 ms forward, {way}, p50", figure(np.median(times)), "us")
        for way, times in took.items()
    ]


# -- the trainer -----------------------------------------------------------------------------------


def trainer(made: Rig, rounds: int) -> Rows:
    """Rows onto the GPU of a process that only reads, while this one keeps its own page-lock."""
    batch = made.end([f"t{i}" for i in range(64)], 8192)
    (long,) = made.end(["t-long"], 32_768)
    made.publisher.flush()
    made.settle()
    asked = {
        "batch": [base64.b64encode(ticket).decode() for ticket in batch],
        "long": base64.b64encode(long).decode(),
        "rounds": max(10, rounds // 10),
    }
    done = subprocess.run(
        [sys.executable, str(TRAINER)],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    )
    shmroute.release([*batch, long])
    return [Row(**row) for row in json.loads(done.stdout)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--json", type=Path, help="write the result file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    rounds = 40 if options.quick else 200
    rows: Rows = page_locking(rounds)
    with rig() as made:
        if not made.gatherer.page_lock.wait(60):
            print(f"the arena is not page-locked: {made.gatherer.page_lock.refused}")
        parts = copies, scatter, forwards, finishes, cold_finishes, waits, snapshots, trainer
        for part in parts:
            began = time.monotonic()
            rows += part(made, rounds)
            print(f"{part.__name__}: {time.monotonic() - began:.1f} s", flush=True)
            if options.json:
                command = shlex.join(["python", "bench/gpu.py", *(["--quick"] * options.quick)])
                result_file.write(options.json, "gpu", command, rows)
    result_file.print_table(rows, "on the GPU")
    return result_file.exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
