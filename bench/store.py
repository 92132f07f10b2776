"""The store's budgets that need no GPU, beside SGLang's native chain in the same run.

    python bench/store.py [--json PATH] [--quick]

Rows are those of Qwen3-30B-A3B: 48 MoE layers, top-8, one byte an id (int32 natively).

What is measured
    - The writer's caller: reserve + ticket, and reserve + seal + ticket, rows not copied,
      at 32,768 tokens.
    - The reader: open by ticket and map (``numpy()``) for records of 1 MB and 100 MB, taken
      in turns; open by rid among 16,384 filled slots; release.
    - From finished rows to the trainer's view, at 8,192 and 32,768 tokens. Natively a
      request's rows lie at scattered KV locations of an int32 host table; they are gathered,
      pickled to the detokenizer, encoded in base64, pickled to the tokenizer, put into a
      JSON response, parsed and decoded. With the arena they lie in staging, uint8, where the
      GPU's gather leaves them (35 us there); they are copied into the record, and its ticket
      takes the very same steps; the view is opened from the parsed response. The ratio is
      also given without the native gather, and with a gather by KV location on the CPU in
      place of the copy, as an engine without a GPU does it. All in one process: neither side
      pays for sockets, which spares the native chain its 67 MB.
    - Bytes of a response for its routes, and host bytes per row held, tables included.
    - Making an arena of 2 GiB: with its pages entered into the page tables before it is there, and
      with a thread that enters them, as an engine has it made.

How
    Medians and p99 after a warm-up, nothing pinned, the garbage collector on; what is
    compared runs in turns. The last 24 records are held, so that each goes where no cache is
    warm. The native gather uses torch where it is installed, as SGLang does. The views are
    compared with the tables before anything is timed.
"""

from __future__ import annotations

import gc
import secrets
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pybase64
from bench_command import main
from result_file import Row
from rich.progress import Progress
from route_chains import (
    LAYERS,
    ROUTES,
    SGLANG,
    STANDARD,
    TOP_K,
    Codec,
    RouteTables,
    Steps,
    Times,
    arena_view,
    native_view,
    new_rid,
    response_with,
)

import shmroute
from shmroute import layout, reaper

SHORT, LONG = 8_192, 32_768
SLOTS = 16_384
RECORDS_HELD = 24
NEW_ARENA = 2 << 30


@dataclass(frozen=True, slots=True)
class Repetitions:
    """How often each kind of thing is measured."""

    calls: int
    native: int
    standard: int
    arenas: int


FULL = Repetitions(calls=5_000, native=25, standard=7, arenas=5)
QUICK = Repetitions(calls=500, native=4, standard=2, arenas=1)
# For each run of the native chain.
ARENA_RUNS = 8


# -- the arena and its clean-up ----------------------------------------------------------------


@contextmanager
def scratch_arena(
    capacity: int, slots: int, name: str = "bench-store", *, in_background: bool = False
) -> Iterator[shmroute.Arena]:
    """An arena that is gone afterwards, whatever happened and whoever still has views.

    Without retention, so that after a SIGKILL the next run's arena removes it.
    """
    arena = shmroute.Arena.create(
        name,
        ROUTES,
        capacity=capacity,
        slots=slots,
        retention=0,
        in_background=in_background,
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
        self._release_down_to(self._held)

    def release_all(self) -> None:
        self._release_down_to(0)

    def _release_down_to(self, held: int) -> None:
        while len(self._tickets) > held:
            shmroute.release(self._tickets.popleft())
        self._arena.writer.reclaim()


def capacity_for(records: Iterable[int], slots: int) -> int:
    """Bytes of an arena that holds records of so many tokens."""
    heap = sum(layout.plan_extent(ROUTES.row_bytes, 64, tokens).total_bytes for tokens in records)
    tables = layout.MIN_TABLE_BYTES + slots * layout.SLOT_BYTES + 2 * layout.PAGE
    return heap + tables


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
            self.figure(f"{name} p50", statistics.median(times) / 1e3, "us")
        else:
            self.at_most(f"{name} p50", statistics.median(times) / 1e3, "us", budget)
        self.figure(f"{name} p99", p99(times) / 1e3, "us")


def p99(times: Times) -> float:
    return sorted(times)[min(len(times) - 1, len(times) * 99 // 100)]


def timed(call: Callable[..., Any], *arguments: Any) -> int:
    started = time.perf_counter_ns()
    call(*arguments)
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
                nanoseconds = timed(open_and_map, ticket)
                if lap >= 0:
                    taken.append(nanoseconds)
    small, large = times
    bench.microseconds("open by ticket, 1 MB", small, 30)
    bench.microseconds("open by ticket, 100 MB", large, 30)
    ratio = statistics.median(large) / statistics.median(small)
    bench.figure("open by ticket, 100 MB / 1 MB", ratio, "x")


def bench_open_by_rid(bench: Bench) -> None:
    """Open and map by rid, every slot filled; then release."""
    with scratch_arena(capacity_for([16] * SLOTS, SLOTS), SLOTS) as arena:
        rids = [new_rid() for _ in range(SLOTS)]
        for rid in rids:
            with arena.reserve(rid, tokens=16) as record:
                record.rows[...] = 1
        pick = np.random.default_rng(1)
        opening, releasing = [], []
        for lap in bench.laps("open by rid", bench.repetitions.calls):
            rid = rids[pick.integers(SLOTS)]
            nanoseconds = timed(open_and_map, rid)
            if lap >= 0:
                opening.append(nanoseconds)
        for rid in rids[: bench.repetitions.calls]:
            with shmroute.ShmRouteReader(rid) as routes:
                releasing.append(timed(routes.release))
    bench.microseconds("open by rid among 16384 slots", opening, 60)
    bench.microseconds("release", releasing)


# -- from finished rows to the trainer's view ----------------------------------------------------


def check_views(arena: shmroute.Arena, tables: RouteTables, tokens: int) -> None:
    """Every chain must deliver the rows of the table."""
    locations = tables.scattered(tokens)
    rows = tables.compact[locations]
    for codec in (SGLANG, STANDARD):
        view, ticket = arena_view(arena, tables.unstaged(locations), codec, Steps())
        staged, other = arena_view(arena, tables.staged(0, tokens), codec, Steps())
        native = native_view(tables, locations, codec, Steps())
        equal = np.array_equal(native, rows) and np.array_equal(view, rows)
        if not equal or not np.array_equal(staged, tables.compact[:tokens]):
            raise AssertionError("a chain delivered other rows than the table holds")
        shmroute.release([ticket, other])


@dataclass(frozen=True, slots=True)
class Chains:
    """Steps of the native chain, and of the arena's with a copy and with a CPU gather."""

    native: Steps = field(default_factory=Steps)
    copied: Steps = field(default_factory=Steps)
    gathered: Steps = field(default_factory=Steps)


def run_chains(
    bench: Bench, arena: shmroute.Arena, tables: RouteTables, tokens: int, codec: Codec
) -> Chains:
    """Run the chains in turns, so that a busy moment of the machine hits all of them."""
    timed, ring = Chains(), RecordRing(arena)
    standard = codec is STANDARD
    count = bench.repetitions.standard if standard else bench.repetitions.native
    what = f"chains, {tokens} tokens" + ", standard library" * standard
    for lap in bench.laps(what, count):
        chains = timed if lap >= 0 else Chains()
        native_view(tables, tables.scattered(tokens), codec, chains.native)
        for turn in range(ARENA_RUNS):
            staged = tables.staged(turn, tokens)
            ring.add(arena_view(arena, staged, codec, chains.copied)[1])
            unstaged = tables.unstaged(tables.scattered(tokens))
            ring.add(arena_view(arena, unstaged, codec, chains.gathered)[1])
    ring.release_all()
    return timed


def bench_to_the_view(bench: Bench, tables: RouteTables, tokens: int) -> None:
    """Both chains for requests of ``tokens`` rows, with either codec."""
    with scratch_arena(capacity_for([tokens] * (RECORDS_HELD + 5), 64), 64) as arena:
        check_views(arena, tables, tokens)
        chains = run_chains(bench, arena, tables, tokens, SGLANG)
        standard = run_chains(bench, arena, tables, tokens, STANDARD)
    name = f"{tokens} tokens"
    native, copied, gathered = chains.native, chains.copied, chains.gathered
    add_chain(bench, f"native, {name}", native)
    add_chain(bench, f"arena, {name}", copied)
    ratio, factor = f"native chain / arena, {name}", native.total / copied.total
    if tokens == LONG:
        bench.at_least(ratio, factor, "x", 200)
    else:
        bench.figure(ratio, factor, "x")
    bench.figure(f"{ratio}, native gather left out", native.without("gather") / copied.total, "x")
    bench.figure(f"arena with a CPU gather, {name}: copy", gathered.median("copy") / 1e6, "ms")
    bench.figure(f"arena with a CPU gather, {name}: total p50", gathered.total / 1e6, "ms")
    bench.figure(f"{ratio} with a CPU gather", native.total / gathered.total, "x")
    total = standard.native.total
    bench.figure(f"native, {name}, standard library: total p50", total / 1e6, "ms")
    bench.figure(f"{ratio}, standard library", total / standard.copied.total, "x")


def add_chain(bench: Bench, name: str, steps: Steps) -> None:
    for step in steps.times:
        bench.figure(f"{name}: {step}", steps.median(step) / 1e6, "ms")
    bench.figure(f"{name}: total p50", steps.total / 1e6, "ms")
    bench.figure(f"{name}: total p99", p99(steps.totals()) / 1e6, "ms")


# -- bytes ---------------------------------------------------------------------------------------


def bench_bytes(bench: Bench) -> None:
    """Bytes that routes add to a response, and host bytes per row that the arena takes."""
    without = len(orjson.dumps(response_with(None)))
    with scratch_arena(capacity_for([16, SHORT, LONG], 64), 64) as arena:
        for tokens in (16, SHORT, LONG):
            # The longest rid that the budget holds for.
            with arena.reserve(secrets.token_hex(32), tokens=tokens) as record:
                text = pybase64.b64encode(record.ticket).decode()
            grown = len(orjson.dumps(response_with(text))) - without
            bench.at_most(f"response bytes for routes, {tokens} tokens", grown, "B", 350)
            if tokens >= SHORT:
                share = host_bytes(arena, record) / (tokens * ROUTES.row_bytes)
                bench.at_most(f"host bytes / row bytes, {tokens} tokens", share, "x", 1.02)
    native = len(pybase64.b64encode(bytes(LONG * LAYERS * TOP_K * 4)))
    bench.figure(f"native response bytes for routes, {LONG} tokens", native, "B")


def host_bytes(arena: shmroute.Arena, record: Any) -> float:
    """Bytes of a record with its metadata and its slot's share of every table."""
    description = arena.memory.description
    tables = description.heap_offset + description.control_bytes
    return float(record.plan.total_bytes + tables / description.slots)


# -- making an arena -----------------------------------------------------------------------------


def bench_creation(bench: Bench) -> None:
    """What an engine's start waits for, in turns with what it would wait for otherwise."""
    whole, made, entered = [], [], []
    for lap in bench.laps("making arenas", bench.repetitions.arenas):
        for in_background in (False, True):
            there, through = _make_one(in_background)
            if lap >= 0 and in_background:
                made.append(there)
                entered.append(through)
            elif lap >= 0:
                whole.append(there)
    what = "an arena of 2 GiB"
    bench.figure(f"{what} is made, its pages entered before", statistics.median(whole), "s")
    bench.figure(f"{what} is made, its pages entered by a thread", statistics.median(made), "s")
    bench.figure(f"{what}, until that thread is through", statistics.median(entered), "s")


def _make_one(in_background: bool) -> tuple[float, float]:
    """Seconds until an arena is there, and until its pages are entered.

    Its memory goes on return: of an arena that is still bound when the next is made it would go,
    which takes as long as entering it, before the clock is read.
    """
    began = time.perf_counter()
    with scratch_arena(NEW_ARENA, SLOTS, in_background=in_background) as arena:
        there = time.perf_counter() - began
        arena.population.wait()
        return there, time.perf_counter() - began


# -- the command ---------------------------------------------------------------------------------


def measure(quick: bool, progress: Progress) -> list[Row]:
    bench = Bench(QUICK if quick else FULL, progress)
    bench_bytes(bench)
    bench_caller(bench)
    bench_open_by_ticket(bench)
    bench_open_by_rid(bench)
    tables = RouteTables()
    for tokens in (SHORT, LONG):
        bench_to_the_view(bench, tables, tokens)
    bench_creation(bench)
    return bench.rows


if __name__ == "__main__":
    # A thread that redraws the bar would take the interpreter from what is timed.
    sys.exit(
        main(
            "store",
            __doc__,
            "a tenth of the repetitions",
            measure,
            redrawn_by_hand=True,
            packages=("orjson", "pybase64"),
        )
    )
