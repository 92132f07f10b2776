"""The store's budgets that need no GPU, beside SGLang's native chain in the same run.

    python bench/store.py [--json PATH] [--quick]

Rows are those of Qwen3-30B-A3B: 48 MoE layers, top-8, one byte an id (int32 natively).

What is measured
    - The writer's caller: reserve + ticket, and reserve + seal + ticket, rows not copied,
      at 32,768 tokens.
    - The reader: open by ticket and map (``numpy()``) for records of 1 MB and 100 MB, taken
      in turns; open by rid among 16,384 filled slots; release.
    - From finished rows to the trainer's view, at 8,192 and 32,768 tokens. Finished rows lie
      in a table by KV location, and a request's locations are scattered. Natively the
      table is int32 and its rows are gathered, pickled to the detokenizer, encoded in
      base64, pickled to the tokenizer, put into a JSON response, parsed and decoded. With
      the arena the table is uint8, the gather goes straight into the record, and the ticket
      takes the very same steps; the view is opened from the parsed response. All in one
      process: neither side pays for sockets, which spares the native chain its 67 MB.
    - Bytes of a response for its routes, and host bytes per row held, tables included.

How
    Medians and p99 after a warm-up, nothing pinned, the garbage collector on. Every record
    goes where another one of the last 24 is not, so no cache is warm with it; its pages have
    been touched before, as a page-locked arena's are. Gathers use torch where it is
    installed, on both sides. The views are compared with the tables before anything is
    timed.
"""

from __future__ import annotations

import argparse
import base64
import gc
import json
import os
import pickle
import secrets
import signal
import statistics
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pybase64
from result_file import Row, exit_code, print_table, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import shmroute
from shmroute import layout, reaper

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

LAYERS, TOP_K, EXPERTS = 48, 8, 128
ROUTES = shmroute.RouteLayout(EXPERTS, TOP_K, range(LAYERS), model="Qwen/Qwen3-30B-A3B")
SHORT, LONG = 8_192, 32_768
KV_TOKENS = 131_072
SLOTS = 16_384
RECORDS_HELD = 24
RESULT = Path(__file__).parent / "results" / "store.json"

Array = npt.NDArray[Any]
Times = list[int]


@dataclass(frozen=True, slots=True)
class Repetitions:
    """How often each kind of thing is measured."""

    calls: int
    arena: int
    native: int
    standard: int


FULL = Repetitions(calls=5_000, arena=300, native=25, standard=7)
QUICK = Repetitions(calls=500, arena=50, native=4, standard=2)


@dataclass(frozen=True, slots=True)
class Codec:
    """base64 and JSON: what SGLang uses, or the standard library's."""

    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes]
    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]


SGLANG = Codec(pybase64.b64encode, pybase64.b64decode, orjson.dumps, orjson.loads)
STANDARD = Codec(
    base64.b64encode, base64.b64decode, lambda value: json.dumps(value).encode(), json.loads
)


@dataclass(slots=True)
class Steps:
    """Nanoseconds of every step of a chain, run by run."""

    times: dict[str, Times] = field(default_factory=dict)

    def __call__(self, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter_ns()
        result = step(*arguments)
        self.times.setdefault(name, []).append(time.perf_counter_ns() - started)
        return result

    @property
    def totals(self) -> Times:
        return [sum(run) for run in zip(*self.times.values(), strict=True)]


# -- the arena and its clean-up ----------------------------------------------------------------


@contextmanager
def scratch_arena(capacity: int, slots: int) -> Iterator[shmroute.Arena]:
    """An arena that is gone afterwards, whatever happened and whoever still has views.

    Without retention, so that after a SIGKILL the next run's arena removes it.
    """
    arena = shmroute.Arena.create(
        "bench-store", ROUTES, capacity=capacity, slots=slots, retention=0
    )
    try:
        yield arena
    finally:
        reaper.remove_files(arena.segment)
        arena.close()


class RecordRing:
    """Keeps the last records and releases the oldest, so that space is used in turn."""

    def __init__(self, arena: shmroute.Arena, held: int = RECORDS_HELD) -> None:
        self._arena = arena
        self._held = held
        self._tickets: deque[bytes] = deque()

    def add(self, ticket: bytes) -> None:
        self._tickets.append(ticket)
        while len(self._tickets) > self._held:
            shmroute.release(self._tickets.popleft())
        self._arena.writer.reclaim()


def capacity_for(records: Iterable[int], slots: int) -> int:
    """Bytes of an arena that holds records of so many tokens."""
    heap = sum(layout.plan_extent(ROUTES, 64, tokens).total_bytes for tokens in records)
    tables = layout.MIN_TABLE_BYTES + slots * layout.SLOT_BYTES + 2 * layout.PAGE
    return heap + tables


def new_rid() -> str:
    return uuid.uuid4().hex


# -- measuring -----------------------------------------------------------------------------------


class Bench:
    """Collects rows and shows how far it is. The bar moves only between timed runs."""

    def __init__(self, repetitions: Repetitions, progress: Progress) -> None:
        self.repetitions = repetitions
        self.rows: list[Row] = []
        self._progress = progress

    def laps(self, what: str, count: int) -> Iterator[int]:
        """``range(count)`` with a warm-up before it (negative numbers) and a bar."""
        warm_up = max(2, min(count // 5, 200))
        task = self._progress.add_task(what, total=warm_up + count)
        step = max(1, count // 50)
        gc.collect()
        for lap in range(-warm_up, count):
            yield lap
            if lap % step == 0:
                self._progress.update(task, completed=warm_up + lap + 1)
                self._progress.refresh()
        self._progress.update(task, completed=warm_up + count)
        self._progress.refresh()

    def figure(self, name: str, value: float, unit: str) -> None:
        self.rows.append(Row(name, round(value, 4), unit))

    def at_most(self, name: str, value: float, unit: str, budget: float) -> None:
        self.rows.append(Row(name, round(value, 4), unit, budget, "max"))

    def at_least(self, name: str, value: float, unit: str, budget: float) -> None:
        self.rows.append(Row(name, round(value, 4), unit, budget, "min"))

    def microseconds(self, name: str, times: Times, budget: float | None = None) -> None:
        """A p50 row, held to ``budget`` if there is one, and a p99 row."""
        if budget is None:
            self.figure(f"{name} p50", median(times) / 1e3, "us")
        else:
            self.at_most(f"{name} p50", median(times) / 1e3, "us", budget)
        self.figure(f"{name} p99", p99(times) / 1e3, "us")


def median(times: Times) -> float:
    return statistics.median(times)


def p99(times: Times) -> float:
    return sorted(times)[min(len(times) - 1, len(times) * 99 // 100)]


def timed(call: Callable[[], Any]) -> int:
    started = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - started


# -- the writer's caller -------------------------------------------------------------------------


def bench_caller(bench: Bench) -> None:
    """What an engine's scheduler thread pays for a finished request, apart from the copy."""
    reserving, sealing = [], []
    capacity = capacity_for([LONG] * (RECORDS_HELD + 2), SLOTS)
    with scratch_arena(capacity, SLOTS) as arena:
        ring = RecordRing(arena)
        for lap in bench.laps("reserve, seal, ticket", bench.repetitions.calls):
            rid = new_rid()
            started = time.perf_counter_ns()
            record = arena.reserve(rid, tokens=LONG)
            ticket = record.ticket
            reserved = time.perf_counter_ns()
            record.seal()
            sealed = time.perf_counter_ns()
            if lap >= 0:
                reserving.append(reserved - started)
                sealing.append(sealed - started)
            ring.add(ticket)
    bench.microseconds("reserve + ticket, 32768 tokens", reserving, 100)
    bench.microseconds("reserve + seal + ticket, 32768 tokens", sealing, 100)


# -- the reader ----------------------------------------------------------------------------------


def open_and_map(source: Any) -> None:
    with shmroute.ShmRouteReader(source) as routes:
        routes.numpy()


def bench_open_by_ticket(bench: Bench) -> None:
    """Open and map small and large records in turns."""
    tokens = [size // ROUTES.row_bytes for size in (1_000_000, 100_000_000)]
    with scratch_arena(capacity_for(tokens, 64), 64) as arena:
        tickets = []
        for count in tokens:
            with arena.reserve(new_rid(), tokens=count) as record:
                record.rows[...] = 1
            tickets.append(record.ticket)
        times: list[Times] = [[], []]
        for lap in bench.laps("open by ticket", bench.repetitions.calls):
            for ticket, taken in zip(tickets, times, strict=True):
                nanoseconds = timed(lambda ticket=ticket: open_and_map(ticket))
                if lap >= 0:
                    taken.append(nanoseconds)
    small, large = times
    bench.microseconds("open by ticket, 1 MB", small, 30)
    bench.microseconds("open by ticket, 100 MB", large, 30)
    bench.figure("open by ticket, 100 MB / 1 MB", median(large) / median(small), "x")


def bench_open_by_rid(bench: Bench) -> None:
    """Open and map by rid, every slot filled; then release."""
    with scratch_arena(capacity_for([16] * SLOTS, SLOTS), SLOTS) as arena:
        rids = [new_rid() for _ in bench_fill(bench, SLOTS)]
        for rid in rids:
            with arena.reserve(rid, tokens=16) as record:
                record.rows[...] = 1
        pick = np.random.default_rng(1)
        opening, releasing = [], []
        for lap in bench.laps("open by rid", bench.repetitions.calls):
            rid = rids[pick.integers(SLOTS)]
            nanoseconds = timed(lambda rid=rid: open_and_map(rid))
            if lap >= 0:
                opening.append(nanoseconds)
        for rid in rids[: bench.repetitions.calls]:
            with shmroute.ShmRouteReader(rid) as routes:
                releasing.append(timed(routes.release))
    bench.microseconds("open by rid among 16384 slots", opening, 60)
    bench.microseconds("release", releasing)


# -- from finished rows to the trainer's view ----------------------------------------------------


class RouteTables:
    """The same routes by KV location twice: int32 as SGLang holds them, uint8 as shmroute does."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        shape = (KV_TOKENS, LAYERS, TOP_K)
        self.compact: Array = self._random.integers(0, EXPERTS, shape, dtype=np.uint8)
        self._int32: Any = _tensor(self.compact.astype(np.int32))
        self._uint8: Any = _tensor(self.compact)

    def scattered(self, tokens: int) -> Any:
        """KV locations of a request, as a pool that has been in use for a while gives them."""
        return _tensor(self._random.choice(KV_TOKENS, tokens, replace=False))

    def gather_int32(self, locations: Any) -> Any:
        return self._int32[locations]

    def gather_into(self, locations: Any, rows: Array) -> None:
        if torch is None:
            np.take(self._uint8, locations, axis=0, out=rows, mode="clip")
        else:
            torch.index_select(self._uint8, 0, locations, out=torch.from_numpy(rows))

    def expected(self, locations: Any) -> Array:
        rows: Array = self.compact[np.asarray(locations)]
        return rows


def _tensor(array: Array) -> Any:
    return array if torch is None else torch.from_numpy(array)


def response_with(routes: str | None, rid: str = "0" * 32) -> dict[str, Any]:
    """A response of ``/generate`` as SGLang fills it."""
    carried = {} if routes is None else {"routed_experts": routes}
    meta_info = {
        "id": rid,
        "finish_reason": {"type": "length", "length": 256},
        "prompt_tokens": 7_936,
        "weight_version": "default",
        "completion_tokens": 256,
        "cached_tokens": 0,
        "e2e_latency": 4.25,
    }
    return {"text": " and so on" * 200, "meta_info": meta_info | carried}


def through_sglang(payload: Any, rid: str, codec: Codec, step: Steps) -> Mapping[str, Any]:
    """Scheduler to detokenizer to tokenizer to client: the way of ``req.routed_experts``."""

    def encode(rows: Any) -> str:
        return codec.encode(np.asarray(rows).tobytes()).decode()

    message = step("pickle", pickle.dumps, ("BatchTokenIDOutput", [rid], [payload]), 5)
    _, _, (received,) = step("unpickle", pickle.loads, message)
    text = step("base64 encode", encode, received)
    message = step("pickle text", pickle.dumps, ("BatchStrOutput", [rid], [text]), 5)
    _, _, (text,) = step("unpickle text", pickle.loads, message)
    body = step("JSON dumps", codec.dumps, response_with(text, rid))
    parsed: Mapping[str, Any] = step("JSON loads", codec.loads, body)
    return parsed


def native_view(tables: RouteTables, locations: Any, codec: Codec, step: Steps) -> Array:
    """Rows natively: gather, the way through SGLang, decode."""

    def decode(response: Mapping[str, Any]) -> Array:
        text = response["meta_info"]["routed_experts"].encode()
        return np.frombuffer(codec.decode(text), np.int32).reshape(-1, LAYERS, TOP_K)

    rows = step("gather", tables.gather_int32, locations)
    response = through_sglang(rows, new_rid(), codec, step)
    view: Array = step("base64 decode, view", decode, response)
    return view


def arena_view(
    arena: shmroute.Arena, tables: RouteTables, locations: Any, codec: Codec, step: Steps
) -> tuple[Array, bytes]:
    """Rows through the arena: reserve, gather into the record, seal, and the ticket's way."""

    def issue(record: Any) -> Any:
        return _tensor(np.frombuffer(bytearray(record.ticket), np.uint8))

    def view_of(response: Mapping[str, Any]) -> Array:
        with shmroute.ShmRouteReader(response) as routes:
            return routes.numpy()

    rid = new_rid()
    record = step("reserve", lambda: arena.reserve(rid, tokens=len(locations)))
    step("gather into the record", tables.gather_into, locations, record.rows)
    step("seal", record.seal)
    ticket = step("ticket", issue, record)
    response = through_sglang(ticket, rid, codec, step)
    view: Array = step("open, view", view_of, response)
    return view, record.ticket


def check_views(arena: shmroute.Arena, tables: RouteTables, locations: Any) -> None:
    """Both chains must deliver the rows of the table."""
    rows = tables.expected(locations)
    for codec in (SGLANG, STANDARD):
        native = native_view(tables, locations, codec, Steps())
        view, ticket = arena_view(arena, tables, locations, codec, Steps())
        if not np.array_equal(native, rows) or not np.array_equal(view, rows):
            raise AssertionError("a chain delivered other rows than the table holds")
        shmroute.release(ticket)


def run_native(bench: Bench, tables: RouteTables, tokens: int, codec: Codec, count: int) -> Steps:
    steps = Steps()
    name = "standard library" if codec is STANDARD else "native chain"
    for lap in bench.laps(f"{name}, {tokens} tokens", count):
        locations = tables.scattered(tokens)
        native_view(tables, locations, codec, steps if lap >= 0 else Steps())
    return steps


def run_arena(
    bench: Bench, arena: shmroute.Arena, tables: RouteTables, tokens: int, codec: Codec
) -> Steps:
    steps, ring = Steps(), RecordRing(arena)
    # Every extent is used before the first timed run: the warm-up is a whole round.
    for _ in range(RECORDS_HELD + 1):
        ring.add(arena_view(arena, tables, tables.scattered(tokens), codec, Steps())[1])
    for lap in bench.laps(f"arena, {tokens} tokens", bench.repetitions.arena):
        locations = tables.scattered(tokens)
        ring.add(arena_view(arena, tables, locations, codec, steps if lap >= 0 else Steps())[1])
    return steps


def bench_to_the_view(bench: Bench, tables: RouteTables, tokens: int) -> None:
    """Both chains for requests of ``tokens`` rows, with either codec."""
    runs = bench.repetitions
    with scratch_arena(capacity_for([tokens] * (RECORDS_HELD + 3), 64), 64) as arena:
        check_views(arena, tables, tables.scattered(tokens))
        native = run_native(bench, tables, tokens, SGLANG, runs.native)
        through_arena = run_arena(bench, arena, tables, tokens, SGLANG)
        standard = run_native(bench, tables, tokens, STANDARD, runs.standard)
        standard_arena = run_arena(bench, arena, tables, tokens, STANDARD)
    add_chain(bench, f"native, {tokens} tokens", native)
    add_chain(bench, f"arena, {tokens} tokens", through_arena)
    ratio = median(native.totals) / median(through_arena.totals)
    name = f"native chain / arena, {tokens} tokens"
    if tokens == LONG:
        bench.at_least(name, ratio, "x", 200)
    else:
        bench.figure(name, ratio, "x")
    total = median(standard.totals)
    bench.figure(f"native, {tokens} tokens, standard library: total p50", total / 1e6, "ms")
    ratio = total / median(standard_arena.totals)
    bench.figure(f"native chain / arena, {tokens} tokens, standard library", ratio, "x")


def add_chain(bench: Bench, name: str, steps: Steps) -> None:
    for step, times in steps.times.items():
        bench.figure(f"{name}: {step}", median(times) / 1e6, "ms")
    bench.figure(f"{name}: total p50", median(steps.totals) / 1e6, "ms")
    bench.figure(f"{name}: total p99", p99(steps.totals) / 1e6, "ms")


# -- bytes ---------------------------------------------------------------------------------------


def bench_bytes(bench: Bench) -> None:
    """Bytes that routes add to a response, and host bytes per row that the arena takes."""
    without = len(orjson.dumps(response_with(None)))
    with scratch_arena(capacity_for([16, SHORT, LONG], 64), 64) as arena:
        for tokens in (16, SHORT, LONG):
            used = heap_bytes(arena)
            # The longest rid that the budget holds for.
            with arena.reserve(secrets.token_hex(32), tokens=tokens) as record:
                pass
            text = pybase64.b64encode(record.ticket).decode()
            grown = len(orjson.dumps(response_with(text))) - without
            bench.at_most(f"response bytes for routes, {tokens} tokens", grown, "B", 350)
            if tokens >= SHORT:
                held = heap_bytes(arena) - used + layout.SLOT_BYTES + arena_control_bytes(arena)
                share = held / tokens / ROUTES.row_bytes
                bench.at_most(f"host bytes / row bytes, {tokens} tokens", share, "x", 1.02)


def heap_bytes(arena: shmroute.Arena) -> int:
    allocator = arena.writer.counters
    del allocator
    return int(shmroute_counters(arena)["heap_bytes_in_use"])


def main() -> int:
    return 0
