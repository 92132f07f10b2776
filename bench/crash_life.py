"""One process of the crash campaign: what it is, how it dies, and where it says so.

A life is its seed, its kill point, the call to die at and, a writer's, its retention. The first
line of its log has them all, so that it can be lived again: the same choices on the way to the
same point.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import crash_points
from crash_log import EventLog, read_log
from crash_points import Point


@dataclass(frozen=True, slots=True)
class Again:
    """A life to live again: every process of its role has what is said here."""

    role: str
    seed: int
    point: str | None
    call: int
    retention: float | None

    @classmethod
    def of(cls, log: Path) -> Again:
        born = next(read_log(log))
        return cls(*(born[key] for key in ("role", "seed", "point", "call", "retention")))


@dataclass(frozen=True, slots=True)
class Life:
    """One process of an era.

    Attributes
    ----------
    point, call
        Where it kills itself; None: it is killed from outside, or ends.
    retention
        A writer's: records older than this may be evicted; infinite in half of the lives.
    """

    role: str
    number: int
    seed: int  # of its own choices
    arena: str
    folder: Path
    point: Point | None = None
    call: int = 0
    retention: float = float("inf")

    @property
    def name(self) -> str:
        return f"{self.number:05d}-{self.role}"

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    def begin(self) -> tuple[random.Random, EventLog]:
        """In the new process: open its log, say who it is, and arm its point."""
        log = EventLog(self.log_path)
        log.write(
            "born",
            role=self.role,
            seed=self.seed,
            point=self.point and self.point.name,
            call=self.call,
            retention=None if self.retention == float("inf") else self.retention,
        )
        if self.point is not None:
            crash_points.arm(self.point, self.call, lambda: _die(log, self.point))
        return random.Random(self.seed), log


def _die(log: EventLog, point: Point | None) -> NoReturn:
    assert point is not None
    log.write("reached", point=point.name)
    os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(1.0)
