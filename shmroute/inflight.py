"""Keep what copies in flight read from, until the GPU has passed them.

Problem
    An asynchronous copy out of a leased record returns before its bytes have left. The lease
    must outlive it whatever becomes of the tensor that it fills, and must not outlive it
    long, or the writer runs out of space.

Protocol
    After the copies were queued, ``hold`` records an event behind them and hands the leases
    to one thread, which waits for the events in turn and lets go. A finaliser on the
    result could not do this: it would have to wait for the GPU inside the collector, or
    leave the leases to the next call, which may never come.

Races, and where they are closed
    - fork while copies are in flight: the child, which cannot use the parent's CUDA context,
      lets go of its own leases at once; the parent's are not touched.
    - the end of the interpreter: it waits for the copies, see ``pinned``.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from typing import Any

import torch

from .cuda_runtime import relaxed_capture

logger = logging.getLogger("shmroute")

_SECONDS_AT_EXIT = 10.0


class _Flight:
    """An event, and what must be kept until it has passed."""

    def __init__(self, passed: torch.cuda.Event, kept: list[Any]) -> None:
        self.passed = passed
        self.kept = kept

    def land(self) -> None:
        try:
            self.passed.synchronize()
        except Exception:
            # The context is lost: nothing is copied any more.
            logger.exception("a copy of routes to the GPU failed")
        self.kept.clear()
        _in_the_air.discard(self)


_flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
_in_the_air: set[_Flight] = set()
_starting = threading.Lock()
_thread: threading.Thread | None = None


def hold(stream: torch.cuda.Stream, kept: list[Any]) -> None:
    """Keep these objects until everything queued on the stream so far is done.

    The list becomes this module's; the caller keeps no other reference to what is in it.
    """
    passed = torch.cuda.Event(blocking=True)  # the thread sleeps instead of spinning
    passed.record(stream)
    flight = _Flight(passed, kept)
    _in_the_air.add(flight)
    _flights.put(flight)
    if _thread is None:
        _start()


def _start() -> None:
    global _thread
    with _starting:
        if _thread is None:
            _thread = threading.Thread(target=_land_all, name="shmroute-in-flight", daemon=True)
            _thread.start()


def _land_all() -> None:
    with relaxed_capture():
        while (flight := _flights.get()) is not None:
            flight.land()
            del flight


def _land_at_exit() -> None:
    if _thread is not None:
        _flights.put(None)
        _thread.join(_SECONDS_AT_EXIT)


def _let_go_in_child() -> None:
    global _flights, _starting, _thread
    for flight in _in_the_air:
        flight.kept.clear()
    # The events stay referenced: destroying them would call into the parent's context.
    _flights, _starting, _thread = queue.SimpleQueue(), threading.Lock(), None


atexit.register(_land_at_exit)
os.register_at_fork(after_in_child=_let_go_in_child)
