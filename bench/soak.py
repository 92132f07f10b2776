"""Twenty minutes of use: nothing drifts, no fragmentation turns requests inline, no row is wrong.

    python bench/soak.py --json PATH           20 minutes
    python bench/soak.py --minutes 3
    python bench/soak.py --quick               under a minute

One writer (two threads, as in an engine) and four readers, at rates and lengths of chance, in an
arena that is kept full by records that nobody releases, and overloaded towards the end; two of the
readers are killed and started again now and then. Every row that is read says whose it is
(``crash_rows``). Every few seconds descriptors, threads, memory, shared memory, locks and the
heap's free pieces are looked at (``soak_samples``); how these drift over the second half of the run
is held to a tolerance. Since descriptors and locks go up and down with what is held, they are
judged by what they are when all rest, every half minute: nothing is held then. At the end the
readers are killed and the writer proves that every slot and the whole heap are usable.

Exit status 1: something drifted, leaked, was read wrong, or went inline below 90% fill although
the load fitted.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import crash_processes
import result_file
from bench_command import end_in_good_order
from crash_era import no_leftovers
from crash_rows import LAYOUT
from result_file import Row
from soak_load import (
    BECAME,
    FILLS,
    LASTING_READERS,
    LONG,
    LOWEST,
    QUICK,
    READERS,
    Flag,
    Load,
    Tallies,
    inline_below,
)
from soak_reader import read
from soak_samples import Samples, files_of
from soak_writer import write

_WRITER = READERS  # the last of the tallies
_QUICK_SECONDS = 35.0
_LINES, _LEAST_RESTS = 40, 4
_FITS = 0.75  # of the run; see ``soak_load``
_JUDGED = 90  # percent of the heap used
_STARTING, _RESTING, _ENDING = 30.0, 10.0, 60.0

# Tolerated drift over half of the run: in 20 minutes a leak of one descriptor in ten minutes, or
# of 30 bytes a record, would be above it.
_OWN = "memory of its own"
_TOLERATED = {"threads": 0.5, "RSS": 3.0, _OWN: 3.0}
_TOLERATED |= {"files in /dev/shm": 0.0, "bytes in /dev/shm": 0.0}
_TOLERATED_AT_REST = {"descriptors": 0.5, "locks": 0.5}
_UNITS = {"RSS": "MiB", "PSS": "MiB", _OWN: "MiB", "bytes in /dev/shm": "B"}
_LARGEST = "largest free piece, share of what is free"
_UNITS |= {"heap used": "%", _LARGEST: "%"}


class Soak:
    """One run; ``run`` it once, then ask for its ``rows``."""

    def __init__(self, load: Load, seconds: float, seed: int, arena: str) -> None:
        self._load = load
        self._seconds = seconds
        self._seed = seed
        self._arena = arena
        self._chance = random.Random(seed)
        self._tallies = Tallies(READERS + 1)
        self._samples, self._at_rest = Samples(), Samples()
        self._rest, self._overload = Flag(), Flag()
        self._pids: dict[int, int] = {}  # by their place in the tallies
        self._pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(READERS)]
        self._asked, self._ask = os.pipe()
        self._kills = self._crashes = 0
        self._left: list[str] = []

    def run(self) -> None:
        try:
            self._start_writer()
            for reader in range(READERS):
                self._start_reader(reader)
            self._watch()
            self._end()
        finally:
            for pid in self._pids.values():
                crash_processes.end(pid)

    # -- processes -------------------------------------------------------------------------------

    def _start_writer(self) -> None:
        self._pids[_WRITER] = crash_processes.start(
            partial(
                write,
                self._arena,
                self._load,
                self._chance.randrange(1 << 32),
                [giving for giving, _taking in self._pairs],
                self._rest,
                self._overload,
                self._asked,
                self._tallies[_WRITER],
            )
        )
        until = time.monotonic() + _STARTING
        while not self._tallies.total("sealed") and time.monotonic() < until:
            time.sleep(0.01)

    def _start_reader(self, reader: int) -> None:
        seed = self._chance.randrange(1 << 32)
        tickets = self._pairs[reader][1]
        self._pids[reader] = crash_processes.start(
            partial(read, self._arena, self._load, seed, tickets, self._rest, self._tallies[reader])
        )

    def _kill_a_reader(self) -> None:
        reader = self._chance.randrange(LASTING_READERS, READERS)
        crash_processes.end(self._pids[reader])
        self._kills += 1
        self._start_reader(reader)

    def _notice_ends(self) -> None:
        """Of processes that nobody ended."""
        for process, pid in list(self._pids.items()):
            if crash_processes.ended(pid) is None:
                continue
            self._crashes += 1
            del self._pids[process]
            if process != _WRITER:
                self._start_reader(process)

    # -- the course of a run ---------------------------------------------------------------------

    def _watch(self) -> None:
        begun = time.monotonic()
        next_sample, next_kill = begun, begun + self._chance.uniform(*self._load.kill)
        next_line, next_rest = begun, begun + self._load.rest
        while (now := time.monotonic()) < begun + self._seconds and _WRITER in self._pids:
            self._notice_ends()
            self._overload.set(now >= begun + _FITS * self._seconds)
            if now >= next_kill:
                self._kill_a_reader()
                next_kill = now + self._chance.uniform(*self._load.kill)
            if now >= next_sample:
                self._sample(self._samples)
                next_sample += self._load.sample
            if now >= next_rest:
                self._have_all_rest()
                next_rest += self._load.rest
            if now >= next_line:
                self._say(now - begun)
                next_line += self._seconds / _LINES
            time.sleep(0.05)

    def _have_all_rest(self) -> None:
        self._rest.set(True)
        until = time.monotonic() + _RESTING
        while self._tallies.total("at rest") < len(self._pids) and time.monotonic() < until:
            time.sleep(0.02)
        self._notice_ends()
        if _WRITER in self._pids:
            self._sample(self._at_rest)
        self._rest.set(False)

    def _sample(self, samples: Samples) -> None:
        lasting = {f"reader {reader}": self._pids[reader] for reader in range(LASTING_READERS)}
        samples.take(
            self._arena,
            {"writer": self._pids[_WRITER], **lasting},
            self._space(),
        )

    def _space(self) -> dict[str, float]:
        total = self._tallies.total
        free = total("heap bytes") - total("heap used")
        return {
            "heap used": self._fill,
            "free pieces": total("free pieces"),
            _LARGEST: 100 * total("largest free piece") / max(1, free),
        }

    def _say(self, seconds: float) -> None:
        total, series = self._tallies.total, self._samples.series
        print(
            f"{seconds:6.0f} s  {total('sealed'):8d} sealed  {self._reads:8d} reads  "
            f"heap {self._fill:3.0f}% in use, {total('free pieces'):4d} free pieces  "
            f"{self._inline:5d} inline  {series['locks'][-1]:4.0f} locks  "
            f"{series['writer: RSS'][-1]:5.1f} MiB RSS  {self._kills:3d} kills",
            flush=True,
        )

    def _end(self) -> None:
        for reader in range(READERS):
            crash_processes.end(self._pids.pop(reader))
        os.write(self._ask, b"!")
        until = time.monotonic() + _ENDING
        while _WRITER in self._pids and time.monotonic() < until:
            status = crash_processes.ended(self._pids[_WRITER])
            if status is not None:
                del self._pids[_WRITER]
                self._crashes += status != 0
            time.sleep(0.01)
        self._crashes += _WRITER in self._pids
        self._left = files_of(self._arena)

    # -- figures ---------------------------------------------------------------------------------

    @property
    def _reads(self) -> int:
        return sum(map(self._tallies.total, ("read", "read by rid", "read again")))

    @property
    def _inline(self) -> int:
        return sum(
            self._tallies.total(inline_below(fill, overload))
            for overload in (False, True)
            for fill in FILLS
        )

    @property
    def _fill(self) -> float:
        return 100 * self._tallies.total("heap used") / max(1, self._tallies.total("heap bytes"))

    def rows(self) -> Iterator[Row]:
        """The figures, those that must be zero or must not drift with a budget."""
        total, load = self._tallies.total, self._load
        yield Row("seed", self._seed, "")
        yield Row("seconds", round(self._seconds), "s")
        largest = 100 * load.tokens_most * LAYOUT.row_bytes / load.heap
        yield Row("largest record, share of the heap", round(largest, 3), "%")
        yield Row("reads, every row looked at", self._reads, "")
        for name in ("wrong rows", "unexpected errors"):
            yield Row(name, total(name), "", 0, "max")
        yield Row("processes that ended unasked", self._crashes, "", 0, "max")
        yield from self._inline_rows()
        yield from self._drift_rows()
        yield Row("usable slots at the end", total("usable slots"), "", load.slots, "min")
        yield Row("heap usable in one piece at the end", total("heap in one piece"), "", 1, "min")
        yield Row("files left at the end", len(self._left), "", 0, "max")
        yield Row("readers killed", self._kills, "")
        for name in BECAME:
            yield Row(name, total(name), "")

    def _inline_rows(self) -> Iterator[Row]:
        """While the load fits, none may go inline below 90% fill."""
        total = self._tallies.total
        for overload in (False, True):
            for fill in FILLS:
                name = inline_below(fill, overload)
                judged = fill <= _JUDGED and not overload
                yield Row(name, total(name), "", *((0, "max") if judged else ()))
            if total(LOWEST[overload]):
                name = LOWEST[overload].partition(",")[0]
                yield Row(name, total(LOWEST[overload]) / 10, "%")
        no_slot = "inline for want of a slot"
        yield Row(no_slot, total(no_slot), "", 0, "max")

    def _drift_rows(self) -> Iterator[Row]:
        for name in self._samples.series:
            yield from _series_rows(self._samples, name, name, _TOLERATED)
        for name in self._at_rest.series:
            if name.rpartition(": ")[2] in _TOLERATED_AT_REST:
                yield from _series_rows(self._at_rest, name, f"at rest, {name}", _TOLERATED_AT_REST)
        yield Row("at rest, most locks", max(self._at_rest.series["locks"]), "", 0, "max")


def _series_rows(
    samples: Samples, name: str, shown: str, tolerated: dict[str, float]
) -> Iterator[Row]:
    """Median and drift of a series; a drift that is not tolerated to any length has a budget."""
    what = name.rpartition(": ")[2]
    unit = _UNITS.get(what, "")
    drift, most = round(samples.drift(name), 3), tolerated.get(what)
    yield Row(f"{shown}, median", round(samples.median(name), 3), unit)
    if most is None:
        yield Row(f"{shown}, drift", drift, unit)
    else:
        yield Row(f"{shown}, drift up or down", abs(drift), unit, most, "max")


def main() -> int:
    options = _options()
    print("seed", options.seed, flush=True)
    arena = f"soak{os.getpid()}"
    load = QUICK if options.quick else LONG
    end_in_good_order()
    gc.freeze()
    with no_leftovers(arena):
        soak = Soak(load, options.seconds, options.seed, arena)
        soak.run()
    rows = list(soak.rows())
    result_file.print_table(rows, "soak")
    if options.json:
        command = shlex.join(["python", "bench/soak.py", *sys.argv[1:]])
        result_file.write(options.json, "soak", command, rows)
    return result_file.exit_code(rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small arena, under a minute")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (20)")
    parser.add_argument("--seconds", type=float, help="how long, with --quick as well")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--json", type=Path, help="write the result file here")
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = _QUICK_SECONDS if options.quick else 60 * options.minutes
    least = _LEAST_RESTS * (QUICK if options.quick else LONG).rest
    if options.seconds < least:
        parser.error(f"{options.seconds:.0f} s are too short to see a drift: at least {least:.0f}")
    return options


if __name__ == "__main__":
    sys.exit(main())
