"""Processes that open records one after the other, as many at a time as they are asked to.

Each is a process of its own with nothing but the reader's side of shmroute in it.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from piped_processes import PipedProcesses

import shmroute

SECONDS_TO_ANSWER = 60.0
AHEAD = 0.1  # from the call to the common beginning, so that all have heard of it


@dataclass(frozen=True, slots=True)
class Opened:
    """Nanoseconds that each opening took, and the seconds from the first to the last."""

    times: list[int]
    seconds: float


class OpeningReaders:
    """``count`` processes, started at once; give them a ``close``."""

    def __init__(self, count: int) -> None:
        self._children = PipedProcesses(count, _serve, seconds=SECONDS_TO_ANSWER)
        self._children.answers()

    def begin(self, count: int, tickets: Sequence[bytes], seconds: float) -> float:
        """Have the first ``count`` open records for so long, or spin if there are no tickets.

        Returns the time (monotonic) at which they begin.
        """
        begins = time.monotonic() + AHEAD
        self._children.send((list(tickets), begins, begins + seconds), count)
        return begins

    def opened(self, count: int) -> list[Opened]:
        """What each of them has done, once all are through."""
        return self._children.answers(count)

    def close(self) -> None:
        self._children.close()


def _serve(parent: Connection) -> None:
    parent.send(None)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent was killed
        while True:
            parent.send(_open_until(*parent.recv()))


def _open_until(tickets: list[bytes], begins: float, ends: float) -> Opened:
    if tickets:
        _open(tickets[0])  # maps the arena
    time.sleep(max(0.0, begins - time.monotonic()))
    began = time.monotonic()
    times = []
    while time.monotonic() < ends:
        if not tickets:
            continue
        ticket = random.choice(tickets)
        started = time.perf_counter_ns()
        _open(ticket)
        times.append(time.perf_counter_ns() - started)
    return Opened(times, time.monotonic() - began)


def _open(ticket: bytes) -> None:
    with shmroute.ShmRouteReader(ticket) as routes:
        routes.numpy()
