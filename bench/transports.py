"""A record's rows from one process to others: the arena beside what a user would pick instead.

    python bench/transports.py [--json PATH] [--quick]

Records of 1, 12 and 60 MB (rows of Qwen3-30B-A3B: 48 MoE layers, top-8, one byte an id) go to 1, 2,
4 and 8 readers, each a process of its own, through the arena, SGLang's and vLLM's own paths, Ray's
object store, Mooncake Store, NIXL, ``multiprocessing.shared_memory``, ``torch.multiprocessing``,
and safetensors, Arrow and LMDB files in /dev/shm. `transport_ways` and the other modules of that
name say how each is used.

All of it happens in a network that has loopback only, where the kernel lets this process have one
(it lets root). Mooncake, which listens on every interface, runs in such a one only, and only where
libibverbs is installed; if not, a line says so, and its figures are not there.

What is measured
    - Producer: what its calling thread does for a record. SGLang's native path starts from rows
      that lie at scattered places of an int32 table, as its scheduler does; all others from the
      same rows in one piece, uint8, as they lie when a GPU has gathered them.
    - Until an ndarray is there: from the producer's beginning until the last reader has it.
      Until it is read: until the last has also read every byte of it; a mapped page is only
      fetched then. Every reading is compared with the rows.
    - Bytes copied: how often the record's bytes are written on the way, counted in what each
      library does (``copied`` of each way), not measured.
    - Memory: what producer, readers and the way's own processes take beyond before, at most,
      of their own (`memory_watch`), and in shared memory. The record itself, where the producer
      has it, is not in it.
    - Shared memory is what each way's ``shared_bytes`` says: of the arena its sealed records, of
      LMDB all pages that were ever used, of files, torch and Ray what there is; of blocks and of
      Mooncake what is counted of the records that were not retired, so it is 0 behind the last.
      Memory that is taken once, an arena's or a pool's, is in none of them.
    - A killed reader: two hold a record, one gets SIGKILL. Can the other open the record once more,
      do eight later ones reach it, what does the producer take for them, how much stays in shared
      memory when the producer has given all back?

How
    Blocks, torch, safetensors and Arrow take new pages for every record; the others use theirs
    again, the arena, NIXL and Mooncake the very same. All ways in turn, round by round, each round
    in another order, since a way may leave the machine slower to the next one: what SGLang's has
    freed are gigabytes. Medians, and the spread of the middle half (the distance of its ends, in
    percent of the median). Nothing is pinned to a core.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import loopback
import numpy as np
import transport_mooncake
from bench_command import main
from memory_watch import MemoryWatch, trim
from result_file import Row
from rich.progress import Progress
from route_chains import ROUTES, RouteTables
from transport_files import ArrowWay, LmdbWay, SafetensorsWay
from transport_mooncake import MooncakeCachedWay, MooncakeWay
from transport_nixl import NixlWay
from transport_ray import RayWay
from transport_readers import Readers, Reading, mark_of
from transport_responses import SGLangWay, VllmWay
from transport_ways import ArenaWay, Record, SharedMemoryWay, TorchWay, Way

#: What the ways are made of. vLLM is not installed: its own are msgspec, pyzmq and pybase64.
PACKAGES = (
    "ray",
    "mooncake-transfer-engine-non-cuda",
    "nixl-cu12",
    "safetensors",
    "pyarrow",
    "lmdb",
    "msgspec",
    "pyzmq",
    "orjson",
    "pybase64",
)
MS, MIB = 1e3, 1 / (1 << 20)
HOLD_SECONDS = 0.05
LAPS_AFTER_KILL = 8


@dataclass(frozen=True, slots=True)
class Size:
    """Rounds for each size of record in MB, and the numbers of readers.

    Attributes
    ----------
    after_kill, settle
        Seconds in which trackers and servers notice a death, and in which what goes by itself goes.
    """

    rounds: dict[int, int]
    readers: tuple[int, ...]
    killed_at: int
    after_kill: float
    settle: float

    def tokens(self, megabytes: int) -> int:
        return megabytes * 1_000_000 // ROUTES.row_bytes

    @property
    def largest(self) -> int:
        return self.tokens(max(self.rounds))


FULL = Size({1: 40, 12: 12, 60: 5}, (1, 2, 4, 8), 12, after_kill=0.5, settle=3.0)
QUICK = Size({1: 4}, (1, 2), 1, after_kill=0.2, settle=0.3)


@dataclass(slots=True)
class Laps:
    """Seconds of every lap of one way, by what was timed."""

    producer: list[float] = field(default_factory=list)
    there: list[float] = field(default_factory=list)
    through: list[float] = field(default_factory=list)


class Records:
    """Records of one engine, and what their readers must find."""

    def __init__(self, tokens: int) -> None:
        self._tables = RouteTables(tokens)
        self._lap = 0

    def next(self, tokens: int) -> Record:
        """One that was not the last."""
        self._lap += 1
        first = self._lap % (len(self._tables.compact) // tokens) * tokens
        rows = self._tables.compact[first : first + tokens]
        return Record(rows, self._tables, self._tables.scattered(tokens))

    @staticmethod
    def mark(record: Record, way: Way[Any]) -> int:
        if not way.native:
            return mark_of(record.rows)
        return mark_of(record.tables.compact[record.locations].astype(np.int32))


class Bench:
    """All ways, their readers, and the rows found."""

    def __init__(self, size: Size, at_end: ExitStack, progress: Progress, *, alone: bool) -> None:
        self._size, self._progress = size, progress
        self._alone = alone  # in a network of loopback only
        self._records = Records(size.largest)
        self._readers = at_end.enter_context(closing(Readers(max(size.readers))))
        self._ways = self._start(at_end)
        self.rows: list[Row] = []

    def _start(self, at_end: ExitStack) -> list[Way[Any]]:
        largest, count = self._size.largest, max(self._size.readers)
        size = largest * ROUTES.row_bytes
        starts: list[Callable[[], Way[Any]]] = [
            lambda: ArenaWay(largest),
            SharedMemoryWay,
            TorchWay,
            SafetensorsWay,
            ArrowWay,
            lambda: LmdbWay(size),
            lambda: RayWay(size, count + 1),  # one is killed
            lambda: NixlWay(size),
            VllmWay,
            SGLangWay,
        ]
        if (reason := self._mooncake_refused) is None:
            starts[-2:-2] = [lambda: MooncakeWay(size), lambda: MooncakeCachedWay(size)]
        else:
            self._progress.console.print(f"Mooncake Store is not run: {reason}")
        return [at_end.enter_context(closing(start())) for start in starts]

    @property
    def _mooncake_refused(self) -> str | None:
        if not self._alone:
            return "it listens on every interface, and only root gets a network of loopback alone"
        return transport_mooncake.why_not()

    def _readers_of(self, way: Way[Any]) -> Any:
        return getattr(way, "readers", self._readers)

    # -- times -----------------------------------------------------------------------------------

    def run(self) -> None:
        # First: a store that has grown for other reasons would hide what a killed reader costs.
        task = self._progress.add_task("killed readers", total=len(self._ways))
        for way in self._ways:
            self._kill(way, self._size.killed_at)
            way.renew()
            self._progress.advance(task)
        for megabytes, rounds in self._size.rounds.items():
            for count in self._size.readers:
                self._time(megabytes, count, rounds)
                task = self._progress.add_task("memory", total=len(self._ways))
                for way in self._ways:
                    self._memory(way, megabytes, count)
                    self._progress.advance(task)

    def _time(self, megabytes: int, count: int, rounds: int) -> None:
        tokens = self._size.tokens(megabytes)
        laps = {way.name: Laps() for way in self._ways}
        what = f"{megabytes} MB, {_readers(count)}"
        warm_ups = [way.warm_ups for way in self._ways]
        total = rounds * len(self._ways) + sum(warm_ups)
        task = self._progress.add_task(what, total=total)
        order = random.Random(what)  # the same in every run
        gc.collect()
        for lap in range(-max(warm_ups), rounds):
            taking_part = [way for way in self._ways if lap >= -way.warm_ups]
            for way in order.sample(taking_part, len(taking_part)):
                into = laps[way.name] if lap >= 0 else Laps()
                self._lap(way, self._records.next(tokens), count, into)
                self._progress.advance(task)
        for way in self._ways:
            self.rows += _time_rows(f"{what}: {way.name}", laps[way.name])

    def _lap(
        self, way: Way[Any], record: Record, count: int, laps: Laps, readers: Any = None
    ) -> None:
        began = time.perf_counter()
        locators = way.publish(record, count)
        published = time.perf_counter()
        readers = readers or self._readers_of(way)
        readings = readers.read(way.name, locators)
        _check(way, record, readings)
        readers.drop(count)
        way.retire()
        laps.producer.append(published - began)
        laps.there.append(max(reading.at for reading in readings) - began)
        laps.through.append(max(reading.through for reading in readings) - began)

    # -- bytes -----------------------------------------------------------------------------------

    def _memory(self, way: Way[Any], megabytes: int, count: int) -> None:
        """The most memory of one more lap, and the bytes copied in it."""
        record = self._records.next(self._size.tokens(megabytes))
        way.drain()
        readers = self._readers_of(way)
        readers.trim(count)
        way.trim()
        trim()
        time.sleep(HOLD_SECONDS)
        with MemoryWatch({os.getpid(), *readers.pids(count), *way.pids()}) as watch:
            readings = readers.read(way.name, way.publish(record, count))
            time.sleep(HOLD_SECONDS)
        shared = way.shared_bytes()
        _check(way, record, readings)
        readers.drop(count)
        way.retire()
        what = f"{megabytes} MB, {_readers(count)}: {way.name}"
        copied = sum(way.copied.values()) + count * sum(way.copied_each.values())
        self._add(f"{what}: bytes copied, of the record's", copied, "x")
        self._add(f"{what}: own memory at most", watch.most * MIB, "MiB")
        self._add(f"{what}: shared memory", shared * MIB, "MiB")

    # -- a killed reader -------------------------------------------------------------------------

    def _kill(self, way: Way[Any], megabytes: int) -> None:
        """Kill one of two readers that hold a record."""
        tokens = self._size.tokens(megabytes)
        way.drain()
        empty = way.shared_bytes()
        with ExitStack() as at_end:
            readers = self._pair(way, at_end)
            locators = way.publish(self._records.next(tokens), 2)
            readers.read(way.name, locators)
            readers.kill_first()
            time.sleep(self._size.after_kill)
            again = self._opens_again(way, readers, locators[1])
            laps = Laps()
            for _ in range(LAPS_AFTER_KILL):
                self._lap(way, self._records.next(tokens), 1, laps, readers)
            way.drain()
            left = _left(way, empty, self._size.settle)
        what = f"a reader of two killed: {way.name}"
        self._add(f"{what}: the other can open the record once more", again, "")
        self._add(f"{what}: later records read", len(laps.through), "")
        seconds = statistics.median(laps.producer)
        self._add(f"{what}: producer, p50 of {LAPS_AFTER_KILL}", seconds * MS, "ms")
        self._add(f"{what}: left in shared memory", left * MIB, "MiB")

    def _pair(self, way: Way[Any], at_end: ExitStack) -> Any:
        """Two readers, one of which may be killed."""
        if isinstance(way, RayWay):
            return way.readers
        return at_end.enter_context(closing(Readers(2)))

    def _opens_again(self, way: Way[Any], readers: Any, locator: Any) -> bool:
        if way.gone_when_read:
            return False
        readers.drop(1)
        try:
            readers.read(way.name, [locator])
        except FileNotFoundError:  # shared memory without its name
            return False
        finally:
            readers.drop(1)
        return True

    def _add(self, name: str, value: float, unit: str) -> None:
        self.rows.append(Row(name, _rounded(value), unit))


def _left(way: Way[Any], empty: int, settle: float) -> int:
    """Bytes more than when it was empty, once those that go by themselves have had their time."""
    until = time.monotonic() + settle
    while (left := way.shared_bytes() - empty) > 0 and time.monotonic() < until:
        time.sleep(HOLD_SECONDS)
    return left


def _check(way: Way[Any], record: Record, readings: Sequence[Reading]) -> None:
    expected = Records.mark(record, way)
    if any(reading.mark != expected for reading in readings):
        raise AssertionError(f"{way.name} delivered other rows")


def _time_rows(name: str, laps: Laps) -> Iterator[Row]:
    for what, seconds in (
        ("producer", laps.producer),
        ("until an ndarray is there", laps.there),
        ("until it is read", laps.through),
    ):
        median = statistics.median(seconds)
        low, high = np.percentile(seconds, (25, 75))
        yield Row(f"{name}: {what}, p50", _rounded(median * MS), "ms")
        yield Row(f"{name}: {what}, spread", _rounded(100 * (high - low) / median), "%")


def _readers(count: int) -> str:
    return "1 reader" if count == 1 else f"{count} readers"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def measure(quick: bool, progress: Progress) -> list[Row]:
    alone = loopback.enter()
    with ExitStack() as at_end:
        bench = Bench(QUICK if quick else FULL, at_end, progress, alone=alone)
        bench.run()
    return bench.rows


if __name__ == "__main__":
    quick = "1 MB, two readers, under a minute"
    sys.exit(main("transports", __doc__, quick, measure, packages=PACKAGES))
