"""SIGKILL at every step of the protocol, thousands of times, and an audit of all that was seen.

    python bench/crash_campaign.py --json PATH                 about 5 minutes
    python bench/crash_campaign.py --quick                     the short form of `make test`
    python bench/crash_campaign.py --quick --point 'seal 3'    one step again and again
    python bench/crash_campaign.py --quick --again LOG         one process's life again and again

Real processes of one arena name live on a few small slots: a writer, three readers, reapers
(``crash_era``). Each is killed at a named point (``crash_points``) or from outside at any
instruction. All of them log what they meant to do and what they did; ``crash_audit`` reads
nothing but these logs. It ends when every point was hit and ``--kills`` and ``--reads`` are
reached, or after ``--seconds``. Exit status 1: something was found, or not enough was reached.

When something was found, its process's log is named, and the logs of that era are left.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import crash_audit
import numpy as np
import result_file
from crash_audit import Audit
from crash_era import Decks, Era, Plan, no_leftovers
from crash_life import Again
from crash_log import read_log
from crash_points import POINTS, Point
from crash_takeover import takeovers
from result_file import Row

_LONG = Plan(writers=30, outside=0.4, seconds=2.0, releases=0.01, stretch=40)
_QUICK = Plan(writers=12, outside=0.05, seconds=0.3, releases=0.1, stretch=10)


class Campaign:
    """Eras until enough was reached.

    Attributes
    ----------
    total
        What all logs come to so far.
    """

    def __init__(self, options: argparse.Namespace, points: tuple[Point, ...], name: str) -> None:
        self._options = options
        self._points = points
        self._name = name
        self._plan = replace(_QUICK if options.quick else _LONG, again=options.again)
        self._decks = Decks(points, random.Random(f"{options.seed}/decks"))
        self._folder = Path(tempfile.mkdtemp(prefix="shmroute-crash-"))
        self.total = Audit()
        self.eras = self.lives = 0

    @property
    def points_hit(self) -> int:
        return sum(self.total.kills[point.name] > 0 for point in self._points)

    @property
    def enough(self) -> bool:
        return (
            self.points_hit == len(self._points)
            and self.total.counts["killed"] >= self._options.kills
            and self.total.reads >= self._options.reads
        )

    def run(self) -> None:
        until = time.monotonic() + self._options.seconds
        while not self.enough and time.monotonic() < until:
            self._era()
            if self.eras % 10 == 0:
                self.report()
        if not self.total.findings:
            shutil.rmtree(self._folder)

    def _era(self) -> None:
        self.eras += 1
        folder = self._folder / f"era-{self.eras:04d}"
        folder.mkdir()
        era = Era(
            f"{self._name}-{self.eras}",
            folder,
            self._options.seed,
            self.lives,
            self._decks,
            self._plan,
        )
        era.run()
        self.lives = era.number
        found = crash_audit.audit(
            {path.stem: read_log(path) for path in sorted(folder.glob("*.log"))}
        )
        self.total.add(found)
        for finding in found.findings[:10]:
            print(f"{finding.kind}: {folder}/{finding.process}.log: {finding.event}", flush=True)
        if not found.findings:
            shutil.rmtree(folder)

    def report(self) -> None:
        print(
            f"{self.eras} eras, {self.total.counts['killed']} kills, {self.total.reads} reads, "
            f"{self.points_hit} of {len(self._points)} points, "
            f"{len(self.total.findings)} findings",
            flush=True,
        )

    def rows(self, took: Sequence[float]) -> Iterator[Row]:
        """The figures, those that must be reached or must be zero with a budget."""
        total, options = self.total, self._options
        yield Row("seed", options.seed, "")
        yield Row("kills", total.counts["killed"], "", options.kills, "min")
        yield Row("reads", total.reads, "", options.reads, "min")
        yield Row("kill points hit", self.points_hit, "", len(self._points), "min")
        for kind in crash_audit.KINDS:
            yield Row(kind, total.found(kind), "", 0, "max")
        yield Row("processes", self.lives, "")
        yield Row("eras, each ending with a proof of every slot", self.eras, "")
        for name, count in sorted(total.counts.items()):
            if name != "killed":
                yield Row(name, count, "")
        for error, count in sorted(total.refused.items()):
            yield Row(f"refused with {error}", count, "")
        yield from _takeover_rows(took, _takeovers_wanted(options))
        for name, count in sorted(total.kills.items()):
            yield Row(f"kills: {name}", count, "")


def _takeovers_wanted(options: argparse.Namespace) -> int:
    return 20 if options.quick else 300


def _takeover_rows(took: Sequence[float], wanted: int) -> Iterator[Row]:
    what = "from a reader's kill until its slot is usable"
    yield Row(f"{what}, measured", len(took), "", wanted, "min")
    if not took:
        return
    for name, quantile in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        yield Row(f"{what}, {name}", round(float(np.quantile(took, quantile)) * 1e3, 3), "ms")


def main() -> int:
    options = _options()
    points = _points(options)
    print("seed", options.seed, flush=True)
    name = f"crash{os.getpid()}"
    gc.freeze()
    with no_leftovers(name):
        took = takeovers(f"{name}-takeover", _takeovers_wanted(options))
        campaign = Campaign(options, points, name)
        campaign.run()
    rows = list(campaign.rows(took))
    result_file.print_table(rows, "crash campaign")
    if options.json:
        result_file.write(
            options.json,
            "crash_campaign",
            shlex.join(["python", "bench/crash_campaign.py", *sys.argv[1:]]),
            rows,
        )
    return result_file.exit_code(rows)


def _points(options: argparse.Namespace) -> tuple[Point, ...]:
    """The kill points to hit; none where a life that was killed from outside is lived again."""
    if options.again is not None:
        return tuple(point for point in POINTS if point.name == options.again.point)
    points = tuple(point for point in POINTS if options.point in point.name)
    if not points:
        sys.exit(f"no kill point has {options.point!r} in its name")
    return points


def _again(log: str) -> Again:
    return Again.of(Path(log))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every point once")
    parser.add_argument("--kills", type=int, help="at least so many")
    parser.add_argument("--reads", type=int, help="at least so many")
    parser.add_argument("--seconds", type=float, help="at most so long")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--point", default="", help="only kill points with this in their name")
    parser.add_argument("--again", type=_again, metavar="LOG", help="only this process's life")
    parser.add_argument("--json", type=Path, help="write the result file here")
    options = parser.parse_args()
    defaults = (150, 5_000, 240.0) if options.quick else (2_000, 1_000_000, 900.0)
    for name, value in zip(("kills", "reads", "seconds"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    sys.exit(main())
