"""What arenas of one name must hold and answer, as plain dictionaries: no locks, no memory.

The model test does a step in real processes, tells the model of it, and compares. Time is a
count of steps. A record's state is what its slot's word says; ``released`` is the
acknowledgement; who holds leases is told by the test.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from actors import LAYOUT

from shmroute.layout import plan_extent

WRITING, SEALED, FAILED, GONE = "writing", "sealed", "failed", "gone"
Extent = tuple[int, int]


@dataclasses.dataclass
class Record:
    """One request that got a ticket."""

    rid: str
    tokens: int
    slot: int
    generation: int
    offset: int
    size: int
    ticket: str
    state: str = WRITING
    released: bool = False
    ended_at: int = 0
    missing: tuple[Extent, ...] = ()
    leases: int = 0

    @property
    def word(self) -> int:
        """The state word of its slot, unless a later record has it."""
        return {WRITING: self.generation + 1, SEALED: self.generation}.get(self.state, 0)

    @property
    def wanted(self) -> bool:
        return self.state == SEALED and not self.released


@dataclasses.dataclass
class Life:
    """One arena: a writer's life, and what is left of it afterwards."""

    segment: str
    slots: int
    heap: int
    expires: bool  # whether unreleased records may be evicted
    born: int
    alive: bool = True
    removed: bool = False
    records: dict[int, Record] = dataclasses.field(default_factory=dict)  # by generation
    latest: dict[int, Record] = dataclasses.field(default_factory=dict)  # by slot
    names: dict[int, str] = dataclasses.field(default_factory=dict)  # rid by slot
    failed_last: dict[int, int] = dataclasses.field(default_factory=dict)  # generation by slot
    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    # -- what is there -----------------------------------------------------------------------

    def in_state(self, *states: str) -> list[Record]:
        return [record for record in self.latest.values() if record.state in states]

    @property
    def held(self) -> list[Record]:
        """Records that have an extent."""
        return self.in_state(WRITING, SEALED)

    @property
    def words(self) -> list[int]:
        return [self.latest[s].word if s in self.latest else 0 for s in range(self.slots)]

    @property
    def leased(self) -> bool:
        return any(record.leases for record in self.held)

    def gaps(self, without: Iterable[Record] = ()) -> Iterator[Extent]:
        """``(offset, size)`` between held extents, with some of them taken away."""
        away = {record.generation for record in without}
        kept = sorted((r.offset, r.size) for r in self.held if r.generation not in away)
        position = 0
        for offset, size in [*kept, (self.heap, 0)]:
            if offset > position:
                yield position, offset - position
            position = offset + size

    def has_room(self, size: int, without: Iterable[Record] = ()) -> bool:
        away = list(without)
        return len(self.held) - len(away) < self.slots and any(
            gap >= size for _offset, gap in self.gaps(away)
        )

    def reclaimable(self) -> list[Record]:
        return [r for r in self.in_state(SEALED) if r.released and not r.leases]

    def evictable(self) -> list[Record]:
        """In the order of eviction; released records among them."""
        found = [r for r in self.in_state(SEALED) if self.expires and not r.leases]
        return sorted(found, key=lambda record: record.ended_at)

    def recycled_for(self, size: int) -> tuple[list[Record], list[Record]]:
        """What a reserve must take back: released records, then evicted ones.

        Nothing while there is room; all that is released; then evictions round by round, each of
        a record where only a slot is lacking, else of as many bytes as are wanted.
        """
        if self.has_room(size):
            return [], []
        released, evicted = self.reclaimable(), list[Record]()
        left = [record for record in self.evictable() if not record.released]
        while left and not self.has_room(size, [*released, *evicted]):
            gaps = self.gaps([*released, *evicted])
            enough = 1 if any(gap >= size for _offset, gap in gaps) else size
            while left and enough > 0:
                evicted.append(left.pop(0))
                enough -= evicted[-1].size
        return released, evicted

    # -- what happens ------------------------------------------------------------------------

    def take_name(self, slot: int, rid: str) -> None:
        self.forget(rid)
        self.names[slot] = rid

    def forget(self, rid: str) -> None:
        self.names = {slot: name for slot, name in self.names.items() if name != rid}

    def reserved(self, record: Record) -> None:
        """A request got a ticket: its extent was free, its generation is new."""
        end = record.offset + record.size
        assert any(at <= record.offset and end <= at + size for at, size in self.gaps())
        assert record.slot not in {other.slot for other in self.held}
        assert record.generation % 2 == 0
        assert record.generation > max(self.records, default=0)
        self.records[record.generation] = self.latest[record.slot] = record
        self.take_name(record.slot, record.rid)
        self.counts["reserved"] += 1

    def sealed(self, record: Record, missing: tuple[Extent, ...], now: int) -> None:
        record.state, record.missing, record.ended_at = SEALED, missing, now
        self.counts["sealed"] += 1
        self.counts["rows_sealed"] += record.tokens
        self.counts["rows_missing"] += sum(end - first for first, end in missing)
        self.counts["incomplete"] += bool(missing)

    def failed(self, record: Record, now: int) -> None:
        record.state, record.ended_at = FAILED, now
        self.failed_last[record.slot] = record.generation
        self.counts["failed"] += 1

    def recycled(self, records: list[Record], kind: str) -> None:
        for record in records:
            assert record.state == SEALED
            assert not record.leases
            record.state = GONE
        self.counts[kind] += len(records)

    # -- what a reader must get --------------------------------------------------------------

    def answer(self, record: Record, *, allow_missing: bool = True) -> str:
        """The error that its ticket gets, or nothing."""
        if record.state == WRITING:
            return "RouteTimeout" if self.alive else "WriterDied"
        if record.state == FAILED and self.failed_last[record.slot] == record.generation:
            return "RouteFailed"
        if not record.wanted:
            return "RouteGone"
        return "IncompleteRoutes" if record.missing and not allow_missing else ""

    def time_of(self, record: Record) -> float:
        """When a search by rid takes it to have been."""
        if record.state == WRITING:
            return float("inf") if self.alive else self.born
        return record.ended_at


class Model:
    """Every arena of one name, the oldest first."""

    def __init__(self) -> None:
        self.lives: list[Life] = []
        self._clock = itertools.count(1)

    def now(self) -> int:
        return next(self._clock)

    @property
    def writing_life(self) -> Life | None:
        return self.lives[-1] if self.lives and self.lives[-1].alive else None

    @property
    def there(self) -> list[Life]:
        return [life for life in self.lives if not life.removed]

    @property
    def names(self) -> set[str]:
        """Rids that a search may find."""
        return {name for life in self.there for name in life.names.values()}

    def begin(self, segment: str, slots: int, heap: int, *, expires: bool) -> Life:
        """A new writer's arena; what is left of the dead ones is reaped."""
        self.reap(force=False)
        self.lives.append(Life(segment, slots, heap, expires, self.now()))
        return self.lives[-1]

    def reap(self, *, force: bool) -> dict[str, str]:
        """Reap all dead arenas: why each is kept, or nothing, by segment."""
        return {life.segment: self.reap_one(life, force=force) for life in self.there_dead()}

    def there_dead(self) -> list[Life]:
        return [life for life in self.there if not life.alive]

    def reap_one(self, life: Life, *, force: bool) -> str:
        wanted = sum(record.wanted for record in life.latest.values())
        if life.leased:
            kept = "a reader has records open"
        elif wanted and not force and not life.expires:
            kept = f"{wanted} records are neither released nor expired"
        else:
            life.removed = True
            return ""
        for record in life.reclaimable():
            record.state = GONE  # by the reaper, who counts nothing
        return kept

    def find(self, rid: str) -> tuple[Life, Record] | None:
        """The record that a search for the rid finds."""
        named = [
            (life.time_of(life.latest[slot]), life.latest[slot].generation, life)
            for life in self.there
            for slot, name in life.names.items()
            if name == rid
        ]
        if not named:
            return None
        _time, generation, life = max(named, key=lambda found: found[:2])
        return life, life.records[generation]

    def answer_to(self, rid: str, *, allow_missing: bool = True) -> str:
        found = self.find(rid)
        if found is None:
            return "RouteNotFound" if self.there else "ArenaNotFound"
        life, record = found
        return life.answer(record, allow_missing=allow_missing)

    def records(self, suits: Callable[[Life, Record], bool]) -> list[tuple[Life, Record]]:
        return [
            (life, record)
            for life in self.lives
            for record in life.records.values()
            if suits(life, record)
        ]


def size_of(rid: str, tokens: int) -> int:
    """Bytes of a record's extent."""
    return plan_extent(LAYOUT.row_bytes, len(rid), tokens).total_bytes
