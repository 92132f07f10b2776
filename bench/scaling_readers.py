"""Processes that open records one after the other, as many at a time as they are asked to.

Each is a process of its own with nothing but the reader's side of shmroute in it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

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
        context = multiprocessing.get_context("spawn")
        self._children: list[tuple[Any, Connection]] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._children.append((child, ours))
            child.start()
            theirs.close()
        for _, ours in self._children:
            self._answer(ours)

    def begin(self, count: int, tickets: Sequence[bytes], seconds: float) -> float:
        """Have the first ``count`` open records for so long, or spin if there are no tickets.

        Returns the time (monotonic) at which they begin.
        """
        begins = time.monotonic() + AHEAD
        for _, ours in self._children[:count]:
            ours.send((list(tickets), begins, begins + seconds))
        return begins

    def opened(self, count: int) -> list[Opened]:
        """What each of them has done, once all are through."""
        return [self._answer(ours) for _, ours in self._children[:count]]

    def _answer(self, ours: Connection) -> Any:
        if not ours.poll(SECONDS_TO_ANSWER):
            raise RuntimeError(f"a reader did not answer in {SECONDS_TO_ANSWER:.0f} s")
        return ours.recv()

    def close(self) -> None:
        for child, _ in self._children:
            child.terminate()
        for child, ours in self._children:
            child.join()
            ours.close()


def _serve(parent: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its readers, or is gone itself
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
