"""What shmroute's costs depend on: record length, slots, readers; and records per second.

    python bench/scaling.py [--json PATH] [--quick]

Rows are those of Qwen3-30B-A3B: 48 MoE layers, top-8, one byte an id.

What is measured
    - By length, 1,024 to 262,144 tokens (0.4 to 101 MB): what an engine's scheduler thread pays
      (reserve, seal, ticket; no copy), opening by ticket and by rid, a copy of the rows into the
      record by the CPU.
    - By slots, 1,024 to 65,536, all of them filled: reserve and seal into the one that is free,
      opening by ticket and by rid, release and reclaim of one record, creation of the arena.
    - By readers, 1 to 64 processes that open records without a pause: openings per second of all,
      what one opening takes, and what reserve, seal and ticket take beside them, and beside as
      many processes that only spin.
    - Records per second that one writer makes and takes back, with and without the copy.

How
    Medians; lengths and slots in turn, lap by lap. Nothing is pinned to a core. A cost counts as
    flat up to the last size before the first at which it is more than a quarter above where it
    began.

Where it stops being flat, and why
    - Length: only the copy rises, with the bytes; everything else handles an extent as two numbers.
      On a GPU the copy is the copy engine's.
    - Slots: opening by rid compares the rid's hash with every slot's, reclaiming looks at every
      slot's word, 8 bytes each; both are one pass over a table that has outgrown a cache. A ticket
      names its slot.
    - Readers: they lock ranges of their own and share only the cores. The same number of processes
      that only spin is measured beside them: what the writer loses to these as well, it loses to
      the scheduler of the kernel.
    - Records per second: with the copy, bytes per second, the more the longer a record is until
      records no longer fit a cache.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from bench_command import main
from result_file import Row
from rich.progress import Progress
from route_chains import ROUTES, Times, new_rid
from scaling_readers import Opened, OpeningReaders
from store import RecordRing, capacity_for, open_and_map, p99, scratch_arena

import shmroute

US = 1e3  # nanoseconds
FLAT = 1.25
WARM_UP = 20  # laps
SLOT_TOKENS = 16  # rows of each record where slots are many
BESIDE_TOKENS = 1_024
BESIDE_RECORDS = 256
BESIDE_PAUSE = 0.001  # seconds between the records of the writer
ISSUE = "reserve, seal, ticket"


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes, laps for each, and seconds for each number of readers."""

    tokens: tuple[int, ...]
    slots: tuple[int, ...]
    readers: tuple[int, ...]
    laps: int
    copies: int
    seconds: float


FULL = Size(
    tokens=(1_024, 4_096, 16_384, 65_536, 262_144),
    slots=(1_024, 4_096, 16_384, 65_536),
    readers=(1, 2, 4, 8, 16, 32, 64),
    laps=2_000,
    copies=40,
    seconds=2.0,
)
QUICK = Size((1_024, 32_768), (1_024, 8_192), (1, 4), 100, 5, 0.5)


class Series:
    """One cost by size, in nanoseconds."""

    def __init__(self, name: str, sizes: Sequence[int], of: str) -> None:
        self._name, self._of = name, of
        self.times: dict[int, Times] = {size: [] for size in sizes}

    def timed(self, size: int, call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter_ns()
        result = call(*arguments)
        self.times[size].append(time.perf_counter_ns() - began)
        return result

    def warmed_up(self) -> None:
        """Forget what was timed so far."""
        for times in self.times.values():
            times.clear()

    def rows(self) -> Iterator[Row]:
        for size, times in self.times.items():
            name = f"{self._name}, {sized(size, self._of)}"
            yield Row(f"{name}, p50", _rounded(statistics.median(times) / US), "us")
            yield Row(f"{name}, p99", _rounded(p99(times) / US), "us")
        medians = {size: statistics.median(times) for size, times in self.times.items()}
        yield Row(f"{self._name}: flat up to", flat_up_to(medians), self._of)


def sized(size: int, of: str) -> str:
    return f"{size} {of if size > 1 else of.removesuffix('s')}"


def flat_up_to(costs: Mapping[int, float]) -> int:
    """The largest size up to which no cost is more than ``FLAT`` times the first."""
    first, flat = next(iter(costs.values())), 0
    for size, cost in costs.items():
        if cost > FLAT * first:
            break
        flat = size
    return flat


# -- record length -------------------------------------------------------------------------------


def by_length(size: Size, progress: Progress) -> Iterator[Row]:
    """Lengths in turn, each with one record that stays and one that comes and goes."""
    issuing, tickets_opened, rids_opened = (
        Series(what, size.tokens, "tokens") for what in (ISSUE, "open by ticket", "open by rid")
    )
    copying = Series("copy of the rows into the record", size.tokens, "tokens")
    with scratch_arena(capacity_for(3 * size.tokens, 64), 64) as arena:
        kept = {tokens: _filled(arena, tokens) for tokens in size.tokens}
        source = np.ones((max(size.tokens), *ROUTES.row_shape), np.uint8)
        ring = RecordRing(arena, 0)
        for lap in progress.track(range(-WARM_UP, size.laps), description="record length"):
            if lap == 0:
                for series in (issuing, tickets_opened, rids_opened, copying):
                    series.warmed_up()
            for tokens, (rid, ticket) in kept.items():
                ring.add(issuing.timed(tokens, _issue, arena, tokens))
                tickets_opened.timed(tokens, open_and_map, ticket)
                rids_opened.timed(tokens, open_and_map, rid)
                if lap < size.copies:
                    with arena.reserve(new_rid(), tokens=tokens) as record:
                        copying.timed(tokens, np.copyto, record.rows, source[:tokens])
                    ring.add(record.ticket)
    for series in (issuing, tickets_opened, rids_opened, copying):
        yield from series.rows()
    for tokens, times in copying.times.items():
        rate = tokens * ROUTES.row_bytes / statistics.median(times)
        yield Row(f"copy of the rows into the record, {tokens} tokens", _rounded(rate), "GB/s")


def _issue(arena: shmroute.Arena, tokens: int) -> bytes:
    """What a scheduler thread does for a finished request, apart from the copy."""
    record = arena.reserve(new_rid(), tokens=tokens)
    ticket = record.ticket
    record.seal()
    return ticket


def _filled(arena: shmroute.Arena, tokens: int) -> tuple[str, bytes]:
    rid = new_rid()
    with arena.reserve(rid, tokens=tokens) as record:
        record.rows[...] = 1
    return rid, record.ticket


# -- slots ---------------------------------------------------------------------------------------


def by_slots(size: Size, progress: Progress) -> Iterator[Row]:
    """Arenas side by side, every slot of each filled but one."""
    issuing, tickets_opened, rids_opened, reclaiming = (
        Series(what, size.slots, "slots")
        for what in (ISSUE, "open by ticket", "open by rid", "release and reclaim")
    )
    creating: dict[int, float] = {}
    pick = np.random.default_rng(1)
    with ExitStack() as at_end:
        arenas: dict[int, shmroute.Arena] = {}
        filled: dict[int, list[tuple[str, bytes]]] = {}
        for slots in progress.track(size.slots, description="filling slots"):
            capacity = capacity_for([SLOT_TOKENS] * slots, slots)
            scope = scratch_arena(capacity, slots, f"bench-scaling-{slots}")
            began = time.perf_counter()
            arenas[slots] = at_end.enter_context(scope)
            creating[slots] = time.perf_counter() - began
            filled[slots] = [_filled(arenas[slots], SLOT_TOKENS) for _ in range(slots - 1)]
        for lap in progress.track(range(-WARM_UP, size.laps), description="slots"):
            if lap == 0:
                for series in (issuing, tickets_opened, rids_opened, reclaiming):
                    series.warmed_up()
            for slots, arena in arenas.items():
                rid, ticket = filled[slots][pick.integers(slots - 1)]
                tickets_opened.timed(slots, open_and_map, ticket)
                rids_opened.timed(slots, _open_rid, rid, arena.name)
                issued = issuing.timed(slots, _issue, arena, SLOT_TOKENS)
                reclaiming.timed(slots, _take_back, arena, issued)
    for slots, seconds in creating.items():
        yield Row(f"create the arena, {slots} slots", _rounded(seconds * 1e3), "ms")
    for series in (issuing, tickets_opened, rids_opened, reclaiming):
        yield from series.rows()


def _open_rid(rid: str, arena: str) -> None:
    with shmroute.ShmRouteReader(rid, arena=arena) as routes:
        routes.numpy()


def _take_back(arena: shmroute.Arena, ticket: bytes) -> None:
    shmroute.release(ticket)
    arena.writer.reclaim()


# -- readers -------------------------------------------------------------------------------------


def by_readers(size: Size, progress: Progress) -> Iterator[Row]:
    """More and more processes that open records without a pause, and a writer beside them."""
    one = Series("one opening", size.readers, "readers")
    beside = Series(f"{ISSUE} beside readers", size.readers, "readers")
    spinning = Series(f"{ISSUE} beside spinning processes", size.readers, "spinners")
    rates: dict[int, float] = {}
    capacity = capacity_for([BESIDE_TOKENS] * (BESIDE_RECORDS + 2), 2 * BESIDE_RECORDS)
    with (
        scratch_arena(capacity, 2 * BESIDE_RECORDS) as arena,
        closing(OpeningReaders(max(size.readers))) as readers,
    ):
        tickets = [_filled(arena, BESIDE_TOKENS)[1] for _ in range(BESIDE_RECORDS)]
        for count in progress.track(size.readers, description="readers"):
            opened = _beside(arena, readers, count, tickets, size.seconds, beside)
            rates[count] = sum(len(each.times) / each.seconds for each in opened)
            one.times[count] = [taken for each in opened for taken in each.times]
            _beside(arena, readers, count, [], size.seconds, spinning)
    for count, rate in rates.items():
        yield Row(f"openings a second, {sized(count, 'readers')}", _rounded(rate), "/s")
    for series in (one, beside, spinning):
        yield from series.rows()


def _beside(
    arena: shmroute.Arena,
    readers: OpeningReaders,
    count: int,
    tickets: Sequence[bytes],
    seconds: float,
    writing: Series,
) -> list[Opened]:
    """Make a record now and then while so many processes open records, or spin without tickets."""
    begins = readers.begin(count, tickets, seconds)
    time.sleep(max(0.0, begins - time.monotonic()))
    while time.monotonic() < begins + seconds:
        _take_back(arena, writing.timed(count, _issue, arena, BESIDE_TOKENS))
        time.sleep(BESIDE_PAUSE)
    return readers.opened(count)


# -- records per second --------------------------------------------------------------------------


def by_rate(size: Size, progress: Progress) -> Iterator[Row]:
    """One writer that makes records and takes each back, for so long."""
    source = np.ones((max(size.tokens), *ROUTES.row_shape), np.uint8)
    with scratch_arena(capacity_for(3 * [max(size.tokens)], 64), 64) as arena:
        for tokens in progress.track((SLOT_TOKENS, *size.tokens), description="records a second"):
            for copied in (False, True):
                made, began = 0, time.monotonic()
                while time.monotonic() < began + size.seconds / 2:
                    with arena.reserve(new_rid(), tokens=tokens) as record:
                        if copied:
                            np.copyto(record.rows, source[:tokens])
                    _take_back(arena, record.ticket)
                    made += 1
                rate = made / (time.monotonic() - began)
                how = "with the copy" if copied else "no copy"
                yield Row(f"records a second, {tokens} tokens, {how}", _rounded(rate), "/s")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def measure(quick: bool, progress: Progress) -> list[Row]:
    size = QUICK if quick else FULL
    parts = (by_length, by_slots, by_readers, by_rate)
    return [row for part in parts for row in part(size, progress)]


if __name__ == "__main__":
    sys.exit(main("scaling", __doc__, "few sizes, under half a minute", measure))
