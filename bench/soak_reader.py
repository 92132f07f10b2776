"""The soak test's readers: trainers that release early, late or never, and look twice.

Each ticket is opened, by itself or by its rid, and every row is looked at. Some views are held and
looked at again before they are let go; late readers open the record anew before they release it.
"""

from __future__ import annotations

import heapq
import random
import socket
import sys
import time
import traceback
from collections import deque
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from crash_rows import key_of, look
from soak_load import Flag, Load, Tally

from shmroute import RouteFailed, RouteGone, RouteNotFound, RouteTimeout, ShmRouteReader, layout
from shmroute.attached import attach_all
from shmroute.ticket import Ticket, decode

_TICKET_BYTES = 512
_BY_RID, _HELD = 0.25, 0.2
_EARLY, _LATE = 0.4, 0.3  # the rest is never released
_IDLE = 5e-3


class _Held(NamedTuple):
    until: float
    routes: ShmRouteReader
    ticket: Ticket
    by_rid: bool


def read(
    arena: str, load: Load, seed: int, tickets: socket.socket, rest: Flag, tally: Tally
) -> None:
    """Read what is handed over until killed."""
    _touch_heap(arena)
    tickets.settimeout(_IDLE)
    reading = _Reading(arena, load, random.Random(seed), tally)
    while True:
        taken = False
        with suppress(TimeoutError):
            reading.take(tickets.recv(_TICKET_BYTES))
            taken = True
        reading.let_go()
        if rest:
            tally.set("at rest", not taken and not reading.holds)
        else:
            tally.set("at rest", 0)
            reading.come_back()


def _touch_heap(arena: str) -> None:
    """Have the whole mapping in this process's RSS, which would rise for minutes otherwise."""
    for attached in attach_all(arena):
        np.frombuffer(attached.memory.heap, np.uint8)[:: layout.PAGE].max()


class _Reading:
    def __init__(self, arena: str, load: Load, chance: random.Random, tally: Tally) -> None:
        self._arena = arena
        self._load = load
        self._chance = chance
        self._tally = tally
        self._held: deque[_Held] = deque()
        self._due: list[tuple[float, bytes]] = []

    @property
    def holds(self) -> bool:
        """Whether there are views to be looked at again."""
        return bool(self._held)

    def take(self, envelope: bytes) -> None:
        """Read a new ticket's record and draw what becomes of it."""
        fate = self._chance.random()
        if fate < _EARLY:
            self._read(envelope, release="released early")
        elif fate < _EARLY + _LATE:
            self._read(envelope)
            back = time.monotonic() + self._chance.uniform(*self._load.late)
            heapq.heappush(self._due, (back, envelope))
        else:
            self._tally.add("never released")
            self._read(envelope)

    def let_go(self) -> None:
        """Of views whose time is up."""
        now = time.monotonic()
        while self._held and self._held[0].until < now:
            held = self._held.popleft()
            self._look(held.routes, held.ticket, held.by_rid)
            self._tally.add("read again")
            held.routes.close()

    def come_back(self) -> None:
        """Release what is late by now."""
        now = time.monotonic()
        while self._due and self._due[0][0] < now:
            self._read(heapq.heappop(self._due)[1], release="released late")

    def _read(self, envelope: bytes, release: str = "") -> None:
        ticket = decode(envelope)
        assert isinstance(ticket, Ticket)
        by_rid = not release and self._chance.random() < _BY_RID
        try:
            routes = ShmRouteReader(ticket.rid if by_rid else ticket, arena=self._arena)
        except (RouteGone, RouteNotFound) as error:
            # By its rid a record is not found once its slot is another's.
            expected = by_rid or isinstance(error, RouteGone)
            self._tally.add("gone" if expected else "unexpected errors")
        except RouteFailed:
            self._tally.add("refused as failed")
        except RouteTimeout:
            self._tally.add("timed out")
        except Exception:
            self._tally.add("unexpected errors")
            traceback.print_exc(file=sys.stderr)
        else:
            self._use(routes, ticket, release, by_rid)

    def _use(self, routes: ShmRouteReader, ticket: Ticket, release: str, by_rid: bool) -> None:
        self._look(routes, ticket, by_rid)
        self._tally.add("read by rid" if by_rid else "read")
        if release:
            routes.release()
            self._tally.add(release)
        if self._chance.random() < _HELD:
            until = time.monotonic() + self._load.hold
            self._held.append(_Held(until, routes, ticket, by_rid))
        else:
            routes.close()

    def _look(self, routes: ShmRouteReader, ticket: Ticket, by_rid: bool) -> None:
        """Every row must be the record's own: the ticket's, or by its rid a newer one's."""
        found = decode(routes.ticket)
        assert isinstance(found, Ticket)
        asked = found.generation == ticket.generation
        newer = by_rid and found.generation > ticket.generation
        seen = look(routes.numpy())
        key = key_of(found.segment.arena_id.hex(), ticket.rid, found.generation)
        if not (asked or newer) or not seen.orderly or seen.keys != [key]:
            self._tally.add("wrong rows")
