"""How long a killed reader's slot stays unusable: SIGKILL under a lease, until the next record.

The arena has one slot. A reader opens its record and tells its writer; the record is released
and cannot be taken back. Then the writer kills the reader and reserves until it succeeds.
"""

from __future__ import annotations

import os
import time
from functools import partial

import crash_processes
from crash_rows import LAYOUT
from crash_writer import CAPACITY

from shmroute import Arena, ArenaFull, ShmRouteReader, release
from shmroute.reservation import Reservation

_POLL = 20e-6


def takeovers(name: str, kills: int) -> list[float]:
    """Seconds from the kill to the reservation, of each kill; in a process of its own."""
    told, tell = os.pipe()
    pid = crash_processes.start(partial(_measure_all, name, kills, tell))
    os.close(tell)
    try:
        with os.fdopen(told) as lines:
            return [float(line) for line in lines]
    finally:
        crash_processes.end(pid)


def _measure_all(name: str, kills: int, tell: int) -> None:
    with Arena.create(name, LAYOUT, capacity=CAPACITY, slots=1) as arena:
        for _ in range(kills):
            os.write(tell, f"{_measure(arena)}\n".encode())


def _measure(arena: Arena) -> float:
    record = arena.reserve("held", tokens=100)
    record.rows[...] = 0
    record.seal()
    opened, open_ = os.pipe()
    # A fork of the writer: the child has neither its life lock nor its leases.
    reader = crash_processes.start(partial(_hold, record.ticket, open_))
    try:
        os.close(open_)
        assert os.read(opened, 1), "the reader could not open the record"
        release(record.ticket)
        assert arena.writer.reclaim() == 0, "a record was taken from under its reader"
        begun = time.monotonic()
        crash_processes.kill(reader)
        again = _reserve_when_free(arena)
        took = time.monotonic() - begun
    finally:
        os.close(opened)
        crash_processes.end(reader)
    again.fail("measured")
    return took


def _reserve_when_free(arena: Arena) -> Reservation:
    while True:
        try:
            return arena.reserve("next", tokens=100)
        except ArenaFull:
            time.sleep(_POLL)


def _hold(ticket: bytes, open_: int) -> None:
    with ShmRouteReader(ticket) as routes:
        routes.numpy()
        os.write(open_, b"!")
        while True:
            time.sleep(1.0)
