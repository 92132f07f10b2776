"""Reserve, seal, fail, reclaim: the writer's half of the record protocol.

States of a slot, and who moves them::

    FREE --reserve--> WRITING --seal--> SEALED --reclaim--> FREE
                         |
                         +-----fail---> FREE, and the generation is remembered as failed

    reserve   1 take a free slot and its exclusive lease (a busy one: another slot)
              2 take an extent                     3 write the rid's hash
              4 store the odd word                 5 issue the ticket
    seal      1 all rows are in memory (the caller waited for its copy)
              2 write metadata and slot row        3 store the even word
              4 drop the lease
    fail      1 write the failed generation        2 store 0, drop the lease
              3 give slot and extent back
    reclaim   1 find a released or expired record  2 take its exclusive lease
              3 read word and release again        4 store 0, drop the lease
              5 give slot and extent back

Races, and where they are closed
    - A reader that holds a lease while its record is released: reclaim step 2 fails.
    - A release that arrives between reclaim's scan and its lease: step 3 reads again.
    - A reader that comes late, with a ticket of an earlier life of the slot: generations are
      never reused, so its generation cannot be in the word again.
    - A reclaim between a seal's steps 3 and 4, which its own process's lock does not stop:
      ``_unlocking`` has the slot.
    - The writer dies anywhere: the word is odd and the lease is free (unsealed, never
      handed out), or the word is even and everything it covers was written before it.

Threads
    One side reserves and forgets names (serialised by ``_reserving``, which nothing else takes,
    so that an engine's scheduler thread never waits), any thread seals or fails, any thread
    reclaims (who finds ``_reclaiming`` taken leaves it to the other). Freed slots and extents go
    back to the reserving side through a queue, since the allocator is its own; it takes a few
    from there at a time, and all that it needs when it has no room.

Cost
    ``reserve`` and ``.ticket`` run on an engine's scheduler thread, and what runs on another
    thread takes the interpreter from it. So nothing here scans a table for each record (names
    are found in a dict), and what depends on the arena alone is worked out once. An engine's
    requests of one step share what need not be done for each (``reserve_together``).
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout
from .counters import RECLAIMING, RESERVING, SEALING, Counters
from .errors import ArenaFull, LeaseUnavailable, ShmRouteError
from .extents import ExtentAllocator, Space
from .leases import SLOTS_PER_FILE, ExclusiveLeases
from .memory import ArenaMemory, rid_hash
from .metadata import Metadata, WeightRun, as_runs, merge_ranges
from .reservation import Reservation, Wanted
from .ticket import RID_BYTES_MAX, ArenaTickets, InlineRecord, looks_like_ticket

# A free slot can be busy for an instant while a late reader looks at it.
_BUSY_SLOTS_TRIED = 64
# Freed pieces that one ``reserve`` puts back into the allocator, at 1 us each: a trainer may
# release thousands at once, and no single request should pay for all of them.
_TAKEN_BACK_AT_ONCE = 8
# Where somebody calls ``maintain``, reclaiming on the reserving side is bounded.
_RECLAIMED_AT_ONCE = 64
# A record under a lease is no gain, but trying it costs 3 to 6 us, too.
_TRIED_AT_ONCE = 512
_ROUNDS_AT_ONCE = 4
# Beside a thread that reserves: records recycled in one go, 4 us each, and the pause after them.
_RECYCLED_BEFORE_BREAK = 32
_BREAK = 50e-6
# Below this share of free heap or slots, expired records are evicted ahead of need.
_PRESSURE = 8


class RecordWriter:
    """Owner of an arena's slots and heap. One per arena, in the writer process.

    Parameters
    ----------
    memory, leases
        The mapped arena and the writer's end of its leases.
    retention
        Seconds after which an unreleased record may be evicted, when space is needed.
    keep_versions
        Weight epochs after which it may; None: no limit.
    checksum
        Store a CRC-32 of the rows with each record.
    maintained
        Another thread calls ``maintain``, so ``reserve`` does no more than a bounded part of
        the reclaiming itself.
    """

    def __init__(
        self,
        memory: ArenaMemory,
        leases: ExclusiveLeases,
        *,
        retention: float,
        keep_versions: int | None,
        checksum: bool,
        maintained: bool,
    ) -> None:
        self.memory = memory
        self.weight_epoch = 0
        self.counters = Counters(memory.counters, RESERVING)
        self._sealing_counters = Counters(memory.counters, SEALING)
        self._reclaiming_counters = Counters(memory.counters, RECLAIMING)
        self._leases = leases
        self._retention = retention
        self._keep_versions = keep_versions
        self._checksum = checksum
        self._maintained = maintained
        slots, routes = memory.description.slots, memory.description.routes
        self.tickets = ArenaTickets(
            memory.description.writer.boot_id,
            memory.description.writer.host,
            memory.segment,
            routes.row_shape[0],
            routes.top_k,
            routes.dtype_name,
        )
        self._routes, self._row_bytes = routes, routes.row_bytes
        self._slots = slots
        # Element by element these cost half of what the arrays do, and give plain numbers.
        self._words = memory.words.data
        self._hashes = memory.hashes.data
        self._acknowledgements = memory.acknowledgements.data
        # rid hash -> the one slot that has it in ``memory.hashes``, which nobody else writes.
        self._slot_named: dict[int, int] = {}
        self._allocator = ExtentAllocator(memory.description.heap_bytes)
        # First in, first out: a slot remembers its last failure until it fails again.
        self._free_slots = deque(range(slots))
        self._next_generation = 2
        # Private to the writer: what reclaiming needs to know of sealed records.
        self._extent_of = [(0, 0)] * slots
        self._sealed_at = np.zeros(slots, dtype=np.float64)
        self._epoch_of = np.zeros(slots, dtype=np.int64)
        self._freed: deque[tuple[int, int, int]] = deque()
        # Their difference is what waits in ``_freed``; each has one side that writes it.
        self._bytes_failed = self._bytes_recycled = self._bytes_taken_back = 0
        self._unlocking: set[int] = set()  # slots sealed whose lease is still held
        self._closed = False
        self._swept = 0
        self._reserving = threading.Lock()
        self._sealing = threading.Lock()
        self._reclaiming = threading.Lock()

    # -- reserve ---------------------------------------------------------------------------

    def reserve(
        self,
        rid: str,
        *,
        tokens: int,
        start: int = 0,
        prompt_tokens: int = 0,
        after: Reservation | None = None,
    ) -> Reservation:
        """Take a slot and an extent for one record.

        Parameters
        ----------
        rid
            The request's id, up to 4096 characters.
        tokens
            Rows of the record, at least 1; row ``i`` belongs to token ``start + i``.
        after
            Put the record right behind this one where that space is free, so that one
            copy can fill both.

        Raises
        ------
        ArenaFull
            No slot or no contiguous extent, also after reclaiming.
        ValueError
            A size that no record can have.
        """
        rid_bytes = _check_request(rid, tokens, start, prompt_tokens)
        plan = layout.plan_extent(self._row_bytes, rid_bytes, tokens)
        name = rid_hash(rid)
        with self._reserving:
            if self._closed:
                raise ShmRouteError("the arena is closed in this process")
            self._take_back_some()
            slot, offset = self._allocate(plan.total_bytes, after)
            generation = self._begin(slot, name, offset, plan.total_bytes)
            self.counters.add("reserved")
            self._publish_usage()
        return Reservation(self, slot, generation, rid, start, tokens, prompt_tokens, plan, offset)

    def reserve_together(
        self, wanted: Sequence[Wanted], *, after: Reservation | None = None
    ) -> list[Reservation]:
        """Reserve for several records, side by side, in order: what all of them need once.

        It takes what there is without making room, and stops before the first record that it
        cannot reserve: the list is as long as that. ``reserve`` makes room for the others, or
        says what is wrong with them.

        Parameters
        ----------
        after
            As in ``reserve``.
        """
        plans = self._plans(wanted)
        size = sum([plan.total_bytes for plan in plans])
        records: list[Reservation] = []
        with self._reserving:
            if self._closed or not plans:
                return records
            self._take_back_some(len(plans))
            offset = self._allocator.allocate(size, _end_of(after))
            if offset is None:
                return records
            end = offset + size
            slots: list[int] = []
            try:
                self._take_slots(len(plans), slots)
                for want, plan, slot in zip(wanted, plans, slots, strict=False):
                    rid, nbytes = want.rid, plan.total_bytes
                    records.append(
                        Reservation(
                            self,
                            slot,
                            self._begin(slot, rid_hash(rid), offset, nbytes),
                            rid,
                            want.start,
                            want.tokens,
                            want.prompt_tokens,
                            plan,
                            offset,
                        )
                    )
                    offset += nbytes
            finally:
                if offset < end:
                    self._allocator.free(offset, end - offset)
                for slot in slots[len(records) :]:
                    self._leases.release(slot)
                    self._free_slots.append(slot)
                self.counters.add("reserved", len(records))
                self._publish_usage()
        return records

    def _plans(self, wanted: Iterable[Wanted]) -> list[layout.ExtentPlan]:
        """The extents of those in front of the first that no record can be like."""
        plans = []
        for want in wanted:
            try:
                rid_bytes = _check_request(want.rid, want.tokens, want.start, want.prompt_tokens)
            except ValueError:
                break
            plans.append(layout.plan_extent(self._row_bytes, rid_bytes, want.tokens))
        return plans

    def _begin(self, slot: int, name: int, offset: int, nbytes: int) -> int:
        """Begin a record in a slot that is held; returns its generation."""
        generation = self._next_generation
        self._next_generation += 2
        self._extent_of[slot] = offset, nbytes
        self._take_name(slot, name)
        self._words[slot] = generation + 1  # odd: from here on readers wait
        return generation

    def inline(
        self,
        rid: str,
        rows: npt.NDArray[Any],
        *,
        start: int = 0,
        prompt_tokens: int = 0,
        missing: Iterable[tuple[int, int]] = (),
        versions: Iterable[WeightRun | tuple[int, int, str]] = (),
    ) -> bytes:
        """An envelope with the rows in it, for when the arena cannot take them."""
        _check_rid(rid)
        self.forget_name(rid)
        metadata = Metadata(rid, merge_ranges(missing), as_runs(versions))
        return InlineRecord(rid, start, prompt_tokens, self._routes, metadata, rows).encode()

    def _take_name(self, slot: int, name: int) -> None:
        """Make the slot the only one that a search for the rid finds; tickets need no name.

        An older record of this rid must not come up again when this one has been released.
        """
        self._forget(name)
        self._slot_named.pop(self._hashes[slot], None)  # the name of its last record
        self._slot_named[name] = slot
        self._hashes[slot] = name

    def forget_name(self, rid: str) -> None:
        """Let no search for the rid find an older record: a newer one is not in the arena."""
        if self._closed:
            return  # the table is no longer this process's, and in a fork the lock has no owner
        with self._reserving:
            if not self._closed:
                self._forget(rid_hash(rid))

    def _forget(self, name: int) -> None:
        slot = self._slot_named.get(name)
        if slot is not None:
            self._hashes[slot] = 0
            del self._slot_named[name]

    def _allocate(self, size: int, after: Reservation | None) -> tuple[int, int]:
        if not self._has_room(size):
            self._make_room(size)
        offset = self._allocator.allocate(size, _end_of(after))
        if offset is None:
            raise ArenaFull(self._full(f"{size} contiguous bytes"))
        slot = None
        try:
            slot = self._free_slot()
        finally:
            if slot is None:
                self._allocator.free(offset, size)
        if slot is None:
            raise ArenaFull(self._full("a free slot"))
        return slot, offset

    def _free_slot(self) -> int | None:
        """A free slot under its exclusive lease; one that a late reader looks at is skipped."""
        tries = min(_BUSY_SLOTS_TRIED, len(self._free_slots) + len(self._freed))
        while tries and self._free_slots:
            tries -= 1
            slot = self._free_slots[0]
            if self._leases.try_acquire(slot):
                return self._free_slots.popleft()
            self._take_back(1)  # else the busy ones would be tried again and those not seen
            self._free_slots.rotate(-1)
        return None

    def _take_slots(self, count: int, slots: list[int]) -> None:
        """Put so many free slots under their leases, or as many as there are, into ``slots``."""
        try:
            while len(slots) < count:
                left = count - len(slots)
                if left > 1 and self._take_run(left, slots):
                    continue
                slot = self._free_slot()
                if slot is None:
                    break
                slots.append(slot)
        except LeaseUnavailable:
            pass  # ``reserve`` says it, if it is still so then

    def _take_run(self, most: int, slots: list[int]) -> bool:
        """The same for free slots that are neighbours, with one call for their leases; of a run
        with a slot that a late reader looks at, what is before that.
        """
        run = self._neighbours(most)
        while run > 1:
            if self._leases.try_acquire_run(self._free_slots[0], run):
                slots.extend([self._free_slots.popleft() for _ in range(run)])
                return True
            run //= 2
        return False

    def _neighbours(self, most: int) -> int:
        """How many of the next free slots follow each other in one lease file."""
        if not self._free_slots:
            return 0
        first = self._free_slots[0]
        most = min(most, SLOTS_PER_FILE - first % SLOTS_PER_FILE)
        end = first
        for slot in self._free_slots:
            if slot != end or end == first + most:
                break
            end += 1
        return end - first

    def _has_room(self, size: int) -> bool:
        return self._allocator.largest >= size and bool(self._free_slots)

    def _take_back_some(self, more: int = 0) -> None:
        """Take back some of the freed pieces, and so many ``more``. Not at every request: each of
        several in a row costs a fraction of what one alone does.
        """
        if len(self._freed) >= _TAKEN_BACK_AT_ONCE:
            self._take_back(_TAKEN_BACK_AT_ONCE + more)

    def _take_back(self, limit: int | None = None) -> None:
        waiting = len(self._freed)
        # Records that were finished together, so lie together, most often come back together.
        first = end = 0
        for _ in range(waiting if limit is None else min(limit, waiting)):
            slot, offset, size = self._freed.popleft()
            self._free_slots.append(slot)
            if offset != end:
                self._free(first, end)
                first = offset
            end = offset + size
        self._free(first, end)

    def _free(self, first: int, end: int) -> None:
        if first < end:
            self._allocator.free(first, end - first)
            self._bytes_taken_back += end - first

    def _take_back_for(self, size: int) -> None:
        while self._freed and not self._has_room(size):
            self._take_back(_TAKEN_BACK_AT_ONCE)

    def _free_bytes(self) -> int:
        """Free bytes of the heap, those that still wait in the queue included."""
        waiting = self._bytes_failed + self._bytes_recycled - self._bytes_taken_back
        return self._allocator.free_bytes + waiting

    def _make_room(self, size: int) -> None:
        self._take_back_for(size)
        if self._has_room(size):
            return
        self.reclaim(limit=_RECLAIMED_AT_ONCE if self._maintained else None)
        self._take_back_for(size)
        left = _RECLAIMED_AT_ONCE if self._maintained else self._slots
        rounds = _ROUNDS_AT_ONCE if self._maintained else left
        # What comes free need not lie together: go on until one piece is large enough.
        while left > 0 and rounds and not self._has_room(size):
            rounds -= 1
            evicted, lacking = 0, 1  # a slot only
            if self._allocator.largest < size:
                lacking = size
                if self._maintained:
                    evicted = self._evict_neighbours(size, left)
            evicted = evicted or self.evict_expired(until_bytes=lacking, limit=left)
            if not evicted:
                break
            left -= evicted
            self._take_back_for(size)

    def space(self) -> Space:
        """The heap as the next ``reserve`` finds it, for the thread that reserves."""
        return self._allocator.space()

    def _publish_usage(self) -> None:
        free_slots = len(self._free_slots) + len(self._freed)
        self.counters.set("heap_bytes_in_use", self._allocator.total - self._free_bytes())
        self.counters.set("slots_in_use", self._slots - free_slots)

    def _full(self, what: str) -> str:
        space, description = self.space(), self.memory.description
        return (
            f"arena {description.arena_id.hex()} has not {what}: {space.free} of "
            f"{space.total} heap bytes are free (largest piece {space.largest}), "
            f"{len(self._free_slots)} of {description.slots} slots. Remedy: release records "
            "after training on them (routes.release(), shmroute.release(tickets)), a shorter "
            "retention, or a larger capacity or more slots"
        )

    # -- seal and fail -----------------------------------------------------------------------

    def seal(self, record: Reservation, metadata: Metadata) -> None:
        """See ``Reservation.seal``."""
        self._check_open(record)  # first: in a fork the lock may have no owner to release it
        try:
            self._write_down(record, metadata)
        except BaseException as error:
            self.fail(record, str(error) or type(error).__name__)
            raise
        with self._sealing:
            self._check_open(record)
            self._sealing_counters.add("sealed")
            self._sealing_counters.add("rows_sealed", record.tokens)
            if not record.complete:
                self._sealing_counters.add("rows_missing", metadata.missing_rows)
                self._sealing_counters.add("incomplete")
            self._unlocking.add(record.slot)  # before the even word: see ``_recycle``
            self._words[record.slot] = record.generation
            self._unlock_sealed()

    def _unlock_sealed(self) -> None:
        """Let readers at what is sealed, also at what the kernel could not unlock before."""
        for slot in list(self._unlocking):
            if self._leases.release(slot):
                self._unlocking.discard(slot)

    def _check_open(self, record: Reservation) -> None:
        if self._closed:
            # Without its lease the slot may be read or punched out: its readers get WriterDied.
            raise ShmRouteError(f"rid {record.rid!r}: its arena was closed before the seal")

    def _write_down(self, record: Reservation, metadata: Metadata) -> None:
        """Everything that the even word stands for."""
        blob = metadata.pack(record.tokens)
        if len(blob) > record.plan.metadata_capacity:
            blob = metadata.without_labels().pack(record.tokens)
        if len(blob) > record.plan.metadata_capacity:
            raise ShmRouteError(
                f"the record of rid {record.rid!r} was failed: its metadata takes {len(blob)} "
                f"bytes of {record.plan.metadata_capacity} "
                f"({len(metadata.missing)} missing ranges, {len(metadata.versions)} weight runs)"
            )
        at = record.offset + record.plan.metadata_offset
        missing_rows = metadata.missing_rows
        self.memory.heap[at : at + len(blob)] = blob
        row = layout.SlotRow(
            generation=record.generation,
            extent_offset=record.offset,
            extent_bytes=record.plan.total_bytes,
            metadata_offset=at,
            sealed_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            tokens=record.tokens,
            start=record.start,
            prompt_tokens=record.prompt_tokens,
            missing_rows=missing_rows,
            metadata_bytes=len(blob),
            flags=layout.FLAG_CHECKSUM if self._checksum else 0,
            checksum=zlib.crc32(record.rows.data) if self._checksum else 0,
        )
        slot = record.slot
        layout.write_record(self.memory.data, self.memory.slot_offset(slot), row)
        self._sealed_at[slot] = time.monotonic()
        epochs = [epoch for _first, epoch, _label in metadata.versions]
        self._epoch_of[slot] = max(epochs) if epochs else self.weight_epoch
        record.complete = missing_rows == 0

    def fail(self, record: Reservation, reason: str) -> None:
        """See ``Reservation.fail``."""
        if not self._closed:  # in a fork of the writer the lock may have no owner
            with self._sealing:
                self._fail_alone(record, reason)

    def _fail_alone(self, record: Reservation, reason: str) -> None:
        if self._closed:
            return  # the record ended with the arena: its readers get WriterDied
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        offset = self.memory.slot_offset(record.slot)
        layout.write_failure(
            self.memory.data, offset, layout.Failure(record.generation, now, reason)
        )
        self._sealing_counters.add("failed")
        self._bytes_failed += self._give_back(record.slot)

    def close(self) -> None:
        """End every operation, wait for those under way, and drop the leases."""
        with self._reserving, self._reclaiming, self._sealing:
            self.abandon()

    def abandon(self) -> None:
        """The same in a fork of the writer, where a lock's owner may not exist."""
        self._closed = True
        self._unlocking.clear()
        self._leases.close()

    def _give_back(self, slot: int) -> int:
        """Store 0 under the exclusive lease, drop it, queue slot and extent as free.

        Returns the extent's bytes.
        """
        offset, size = self._extent_of[slot]
        self._words[slot] = 0
        self._leases.release(slot)  # if it cannot be: the slot's next record has it already
        self._freed.append((slot, offset, size))
        return size

    # -- reclaim -------------------------------------------------------------------------------

    def reclaim(self, *, limit: int | None = None) -> int:
        """Take back released records that nobody leases; returns how many."""
        slots = self._released()
        if limit is not None:
            # Not always the same ones: these may be under leases, and others behind them not.
            slots = np.roll(slots, -self._swept)[:_TRIED_AT_ONCE]
            self._swept += len(slots)
        return self._recycle_all(slots, "released", limit=limit)

    def evict_expired(self, *, until_bytes: int = 0, limit: int | None = None) -> int:
        """Evict expired records, the oldest first, until ``until_bytes`` came free.

        Expired: older than ``retention``, or than ``keep_versions`` weight epochs. A record
        under a lease is left alone.
        """
        slots = self._oldest_expired()
        if limit is not None:
            slots = slots[:_TRIED_AT_ONCE]
        return self._recycle_all(slots, "evicted", until_bytes, limit)

    def _evict_neighbours(self, size: int, limit: int) -> int:
        """Evict expired records that lie together, so that one piece of ``size`` comes free.

        Few records can be evicted at once beside an engine's scheduler; the oldest would lie
        anywhere, and go without making room.
        """
        slots = self._oldest_expired()[:_TRIED_AT_ONCE].tolist()
        slot_at = {self._extent_of[slot][0]: slot for slot in slots}
        pieces = dict([self._extent_of[slot] for slot in slots])
        evicted = 0
        for _ in range(_ROUNDS_AT_ONCE):
            run = self._allocator.cheapest_run(pieces, size, limit - evicted)
            recycled = self._recycle_all(np.array([slot_at[at] for at in run], np.intp), "evicted")
            evicted += recycled
            if recycled == len(run):
                break
            for at in run:  # one is under a lease: elsewhere
                del pieces[at]
        return evicted

    def _released(self) -> npt.NDArray[np.intp]:
        words = self.memory.words
        released = (self.memory.acknowledgements == words) & (words != 0) & (words & 1 == 0)
        return np.flatnonzero(released)

    def _oldest_expired(self) -> npt.NDArray[np.intp]:
        words = self.memory.words
        slots = np.flatnonzero(self._expired(slice(None)) & (words != 0) & (words & 1 == 0))
        return slots[np.argsort(self._sealed_at[slots])]

    def _expired(self, slots: int | slice) -> Any:
        expired = self._sealed_at[slots] < time.monotonic() - self._retention
        if self._keep_versions is not None:
            expired |= self._epoch_of[slots] <= self.weight_epoch - self._keep_versions
        return expired

    def maintain(self) -> None:
        """What the sealing side does between records, so that reserving finds room.

        It takes breaks, in which the reserving thread runs: see ``_with_breaks``.
        """
        if self._unlocking:
            with self._sealing:
                self._unlock_sealed()
        for slots in _with_breaks(self._released()):
            self._recycle_all(slots, "released")
        if self._is_scarce():
            for slots in _with_breaks(self._oldest_expired()):
                if not self._is_scarce():
                    break
                self._recycle_all(slots, "evicted", self._allocator.total // _PRESSURE)

    def _is_scarce(self) -> bool:
        free_slots = len(self._free_slots) + len(self._freed)
        scarce = self._free_bytes() * _PRESSURE < self._allocator.total
        return scarce or free_slots * _PRESSURE < self._slots

    def _recycle_all(
        self, slots: npt.NDArray[np.intp], kind: str, enough: int = 0, limit: int | None = None
    ) -> int:
        if not len(slots) or not self._reclaiming.acquire(blocking=False):
            return 0
        recycled = freed = 0
        try:
            for slot in slots.tolist():
                if self._closed or recycled == limit:
                    break
                if not self._recycle(slot, released=kind == "released"):
                    continue
                recycled += 1
                freed += self._extent_of[slot][1]
                if enough and freed >= enough:
                    break
            self._reclaiming_counters.add(kind, recycled)
        finally:
            self._reclaiming.release()
        return recycled

    def _recycle(self, slot: int, *, released: bool) -> bool:
        generation = self._words[slot]
        if generation == 0 or generation & 1:
            return False
        # The writer's threads share one description, so its lock does not keep them apart: a
        # record between its even word and the end of its lease could be recycled, and its late
        # unlock would hit the slot's next record. Looked at after the word. Not the sealing
        # side's lock: it lets go of the interpreter while it holds that one, so whoever ran
        # then would find nothing to recycle.
        if slot in self._unlocking:
            return False
        if not self._leases.try_acquire(slot):
            self._reclaiming_counters.add("kept_by_leases")
            return False
        # Under the exclusive lease nobody reads or releases: what is true now stays true. The
        # caller's scan may be of an earlier record in this slot.
        if released:
            wanted = self._acknowledgements[slot] != self._words[slot]
        else:
            wanted = not self._expired(slot)
        if wanted:
            self._leases.release(slot)
            return False
        self._bytes_recycled += self._give_back(slot)
        return True

    def in_flight(self) -> Iterator[int]:
        """Slots that are reserved and not sealed."""
        return map(int, np.flatnonzero(self.memory.words & 1))


def _with_breaks(slots: npt.NDArray[np.intp]) -> Iterator[npt.NDArray[np.intp]]:
    """The slots in pieces, with a pause between any two, for the thread that reserves.

    A lease is a system call, around which the interpreter lock is free for less than a thread
    that waits for it takes to wake up; and each time that thread wakes, it counts anew the 5 ms
    after which it may demand the lock. Beside 5,000 records being recycled, one in ten bursts
    of 160 reserves took over 11 ms; with pauses 3 to 6.
    """
    for first in range(0, len(slots), _RECYCLED_BEFORE_BREAK):
        if first:
            time.sleep(_BREAK)
        yield slots[first : first + _RECYCLED_BEFORE_BREAK]


def _end_of(record: Reservation | None) -> int | None:
    return None if record is None else record.offset + record.plan.total_bytes


def _check_request(rid: str, tokens: int, start: int, prompt_tokens: int) -> int:
    """Raise ValueError unless a record can be like this; returns the bytes of its rid."""
    rid_bytes = _check_rid(rid)
    if not 0 <= prompt_tokens < layout.MAX_TOKENS:
        raise ValueError(f"prompt_tokens is {prompt_tokens}, not within [0, {layout.MAX_TOKENS})")
    if not 1 <= tokens < layout.MAX_TOKENS or not 0 <= start < layout.MAX_TOKENS:
        raise ValueError(
            f"a record has 1 to {layout.MAX_TOKENS - 1} rows and starts within the same bound; "
            f"got tokens={tokens}, start={start}. For no rows at all use inline()"
        )
    return rid_bytes


def _check_rid(rid: str) -> int:
    if not rid or len(rid) > RID_BYTES_MAX:
        raise ValueError(f"a rid has 1 to {RID_BYTES_MAX} characters, this one {len(rid)}")
    if looks_like_ticket(rid):
        raise ValueError("a rid must not begin like a ticket: its reader would open another record")
    return len(rid.encode())  # a lone surrogate fits no ticket
