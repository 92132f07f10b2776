"""The soak test's writer: as an engine, one thread reserves and another seals and maintains.

A ticket is handed to a reader before its record is sealed. A request for which there is no room
goes inline and is counted by how full the heap was.
"""

from __future__ import annotations

import bisect
import os
import queue
import random
import select
import socket
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from crash_rows import LAYOUT, key_of, rows_of
from crash_writer import copy_half
from soak_load import FACTORS, FILLS, LOWEST, Flag, Load, Tally, inline_below

from shmroute import Arena, ArenaFull, layout, release
from shmroute.reservation import Reservation

_FAILING, _AGAIN = 0.02, 0.02  # shares of records: given up; of a rid that had one before
_IN_FLIGHT = 64
_RIDS = 1000
_IDLE = 0.02


def write(
    arena_name: str,
    load: Load,
    seed: int,
    takers: list[socket.socket],
    rest: Flag,
    overload: Flag,
    asked: int,
    tally: Tally,
) -> None:
    """Write until ``asked`` is readable, then prove that all of the arena is usable, and close."""
    arena = Arena.create(
        arena_name,
        LAYOUT,
        capacity=load.capacity,
        slots=load.slots,
        retention=load.retention,
        maintained=True,
    )
    _warm_up(arena)
    writing = _Writing(arena, load, random.Random(seed), takers, tally)
    writing.run(rest, overload, asked)
    _prove(arena, writing.tickets, tally)
    arena.close()


def _warm_up(arena: Arena) -> None:
    """Have the writer open all of its lease files, which it does when they are first needed."""
    for _ in range(arena.memory.description.slots):
        arena.reserve("warm-up", tokens=1).fail("warm-up")


class _Writing:
    """The reserving thread, and what it shares with the sealing one.

    Attributes
    ----------
    tickets
        The last of each slot.
    """

    def __init__(
        self,
        arena: Arena,
        load: Load,
        chance: random.Random,
        takers: list[socket.socket],
        tally: Tally,
    ) -> None:
        self._arena = arena
        self._load = load
        self._chance = chance
        self._takers = takers
        self._tally = tally
        self._made = 0
        self._lowest_inline = {False: 100.0, True: 100.0}
        self._to_seal: queue.Queue[Any] = queue.Queue(_IN_FLIGHT)
        self.tickets: dict[int, bytes] = {}

    def run(self, rest: Flag, overload: Flag, asked: int) -> None:
        chance = random.Random(self._chance.randrange(1 << 32))
        sealer = threading.Thread(target=self._seal_until_the_end, args=(chance,))
        sealer.start()
        pace_ends, pause = 0.0, 0.0
        while not select.select([asked], [], [], pause)[0]:
            self._tally.set("at rest", bool(rest) and not self._to_seal.unfinished_tasks)
            if rest:
                pace_ends, pause = 0.0, _IDLE
                continue
            if time.monotonic() > pace_ends:
                pace_ends = time.monotonic() + self._chance.uniform(*self._load.pace)
                factor = self._chance.choice(FACTORS[bool(overload)])
                pause = 1 / (self._load.rate * factor)
            self._request(bool(overload))
        self._to_seal.put(None)
        sealer.join()

    def _request(self, overload: bool) -> None:
        self._made += 1
        again = self._made > _RIDS and self._chance.random() < _AGAIN
        rid = f"r{self._made - self._chance.randrange(1, _RIDS) if again else self._made}"
        self._tally.add("records")
        try:
            record = self._arena.reserve(rid, tokens=self._load.draw_tokens(self._chance))
        except ArenaFull as full:
            self._count_inline(full, overload)
            return
        ticket = self.tickets[record.slot] = record.ticket
        self._hand_over(ticket)
        self._to_seal.put(record)
        if self._made % 16 == 0:
            self._show_space()

    def _count_inline(self, full: ArenaFull, overload: bool) -> None:
        if "a free slot" in str(full):
            self._tally.add("inline for want of a slot")
            return
        space = self._arena.writer.space()
        used = 100 * (space.total - space.free) / space.total
        fill = next((fill for fill in FILLS if used < fill), FILLS[-1])
        self._tally.add(inline_below(fill, overload))
        lowest = self._lowest_inline[overload] = min(self._lowest_inline[overload], used)
        self._tally.set(LOWEST[overload], int(10 * lowest))

    def _hand_over(self, ticket: bytes) -> None:
        try:
            self._chance.choice(self._takers).send(ticket, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._tally.add("tickets that nobody took")  # and nobody will release

    def _show_space(self) -> None:
        space = self._arena.writer.space()
        self._tally.set("heap bytes", space.total)
        self._tally.set("heap used", space.total - space.free)
        self._tally.set("free pieces", space.pieces)
        self._tally.set("largest free piece", space.largest)

    # -- the sealing thread ----------------------------------------------------------------------

    def _seal_until_the_end(self, chance: random.Random) -> None:
        try:
            self._seal_all(chance)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # else the other thread would wait for this one

    def _seal_all(self, chance: random.Random) -> None:
        arena_id = self._arena.segment.arena_id.hex()
        while (record := self._to_seal.get()) is not None:
            rows = rows_of(key_of(arena_id, record.rid, record.generation), record.tokens)
            copy_half(record.rows, rows, first=True)
            if chance.random() < _FAILING:
                record.fail("by chance")
                self._tally.add("failed")
            else:
                copy_half(record.rows, rows, first=False)
                record.seal()
                self._tally.add("sealed")
            if self._to_seal.empty() or chance.random() < 0.05:
                self._arena.writer.maintain()
            self._to_seal.task_done()


def _prove(arena: Arena, tickets: dict[int, bytes], tally: Tally) -> None:
    """With no reader alive and all released: every slot can be had, and the heap in one piece."""
    release(list(tickets.values()), timeout=0)
    held: list[Reservation] = []
    try:
        while True:
            held.append(arena.reserve(f"proof-{len(held)}", tokens=1))
    except ArenaFull:
        tally.set("usable slots", len(held))
    for record in held:
        record.fail("it proved its slot")
    with suppress(ArenaFull):
        arena.reserve("proof of the heap", tokens=_most_tokens(arena)).fail("it proved the heap")
        tally.set("heap in one piece", 1)


def _most_tokens(arena: Arena) -> int:
    """Of a record that takes the whole heap."""
    heap = arena.memory.description.heap_bytes

    def size(tokens: int) -> int:
        return layout.plan_extent(LAYOUT.row_bytes, len("proof of the heap"), tokens).total_bytes

    return bisect.bisect_right(range(heap), heap, key=size) - 1
