"""A writer's life in the crash campaign: few slots, a heap that is always full, every operation.

Until it dies it reserves, copies, seals and fails records of a few rids, up to three at once,
so that slots and extents are used again all the time. Asked to, it proves at the end that all
of its arena is usable once its readers are dead.
"""

from __future__ import annotations

import functools
import os
import random
import select
import signal
import time
from typing import Any

from crash_life import Life
from crash_log import EventLog
from crash_rows import LAYOUT, key_of, rows_of

from shmroute import Arena, ArenaFull, layout, release
from shmroute.reservation import Reservation

SLOTS = 12
CAPACITY = 40 << 10  # half of it is tables
RIDS = 10
_TOKENS_MAX = 200
_OPEN_MAX = 3
_PAUSE = 5e-4  # so that a record is read a few times before its slot is used again
_RECORDS_BEFORE_CLOSE = 30


def rid_of(chance: random.Random) -> str:
    return f"r{chance.randrange(RIDS)}"


def write(life: Life, asked: int) -> None:
    """Live as the arena's writer until killed; ``asked`` becomes readable when it is to prove."""
    chance, log = life.begin()
    arena = Arena.create(
        life.arena, LAYOUT, capacity=CAPACITY, slots=SLOTS, retention=life.retention
    )
    log.write("created", arena=arena.segment.arena_id.hex(), slots=SLOTS)
    writing = _Writing(arena, chance, log)
    closes = life.point is not None and life.point.operation == "close"
    while not select.select([asked], [], [], 0)[0]:
        writing.step()
        if closes and writing.made > _RECORDS_BEFORE_CLOSE:
            arena.close()
            return
    writing.finish()
    _prove(arena, writing, log)
    os.kill(os.getpid(), signal.SIGKILL)


class _Writing:
    """The records under way, and the last ticket of each slot."""

    def __init__(self, arena: Arena, chance: random.Random, log: EventLog) -> None:
        self._arena = arena
        self._chance = chance
        self._log = log
        self._open: list[tuple[Any, Any]] = []
        self.tickets: dict[int, bytes] = {}
        self.made = 0

    def step(self) -> None:
        if len(self._open) < _OPEN_MAX and self._chance.random() < 0.6:
            self._begin()
        elif self._open:
            self._end(*self._open.pop(self._chance.randrange(len(self._open))))
        if self._chance.random() < 0.1:
            self._arena.writer.maintain()
        time.sleep(_PAUSE)

    def finish(self) -> None:
        while self._open:
            self._end(*self._open.pop())

    def _begin(self) -> None:
        rid = rid_of(self._chance)
        record = self.reserve(rid, self._chance.randrange(1, _TOKENS_MAX))
        if record is None:
            return
        rows = rows_of(
            key_of(self._arena.segment.arena_id.hex(), rid, record.generation), record.tokens
        )
        copy_half(record.rows, rows, first=True)
        self._open.append((record, rows))

    def reserve(self, rid: str, tokens: int) -> Any:
        """A record, or None when the arena is full."""
        try:
            record = self._arena.reserve(rid, tokens=tokens)
        except ArenaFull:
            return None
        ticket = self.tickets[record.slot] = record.ticket
        self._log.write(
            "reserved",
            rid=rid,
            generation=record.generation,
            slot=record.slot,
            tokens=tokens,
            ticket=ticket.hex(),
        )
        return record

    def _end(self, record: Any, rows: Any) -> None:
        generation = record.generation
        if self._chance.random() < 0.15:
            self._log.write("failing", generation=generation)
            record.fail("by chance")
            self._log.write("failed", generation=generation)
            return
        copy_half(record.rows, rows, first=False)
        self._log.write("sealing", generation=generation)
        record.seal()
        self._log.write("sealed", generation=generation)
        self.made += 1


def copy_half(target: Any, rows: Any, *, first: bool) -> None:
    """A copy that arrives in two pieces."""
    half = len(rows) // 2
    piece = slice(0, half) if first else slice(half, None)
    target[piece] = rows[piece]


def _prove(arena: Arena, writing: _Writing, log: EventLog) -> None:
    """With no reader alive: every slot can be had at once, and then the heap in one piece."""
    _release_all(arena, writing, log)
    held: list[Reservation] = []
    while (record := writing.reserve(f"proof-{len(held)}", 1)) is not None:
        held.append(record)
    for record in held:
        record.fail("it proved its slot")
    whole = writing.reserve("proof of the heap", _most_tokens(arena))
    log.write("proved", usable=len(held), slots=SLOTS, heap=whole is not None)


def _release_all(arena: Arena, writing: _Writing, log: EventLog) -> None:
    log.write("releasing all")
    release(writing.tickets.values(), arena=arena.name, timeout=0)


@functools.cache
def _tokens_fitting(heap_bytes: int, rid_bytes: int) -> int:
    def size(tokens: int) -> int:
        return layout.plan_extent(LAYOUT.row_bytes, rid_bytes, tokens).total_bytes

    return max(tokens for tokens in range(1, 2048) if size(tokens) <= heap_bytes)


def _most_tokens(arena: Arena) -> int:
    return _tokens_fitting(arena.memory.description.heap_bytes, len("proof of the heap"))
