"""Open one record, by ticket or by rid: take its lease, then check it.

Protocol (the reader's half; ``writer`` has the other)
    1 find slot and generation (from the ticket, or by the rid's hash)
    2 take the slot's shared lease without waiting (busy: the copy is in flight, try again
      with a short back-off until ``timeout``)
    3 the word must equal the generation, and nobody may have released it
    4 check every offset and size against the arena
    5 compare what it says of itself with what was asked for: rid, ticket, completeness
    6 hand out views that keep the lease; it drops with the last of them

Races, and where they are closed
    - The slot is recycled between 1 and 2: its word holds another generation (step 3).
    - It is recycled after step 2: it cannot be, the writer needs the exclusive lease.
    - The writer dies while it writes: its lease is free and the word odd (``WriterDied``).
    - Equal hashes of different rids: under the lease the full rid is compared.
    - Two records of one rid: the newer takes the older's hash when it is reserved, so only a
      ticket finds the older; between arenas the time of sealing decides.
    - A release races another reader: the record stays until that reader's lease is gone,
      but nobody else opens it any more.

Records that one ``Opener`` opened in one arena share their leases' end: a batch lets go of
all in one go.
"""

from __future__ import annotations

import enum
import os
import time
from typing import NamedTuple

from . import layout, segments
from .attached import AttachedArena, attach
from .errors import (
    IncompleteRoutes,
    InvalidTicket,
    LayoutMismatch,
    LeaseUnavailable,
    NotOnThisNode,
    RouteFailed,
    RouteGone,
    WriterDied,
)
from .layout import RouteLayout, SlotRow
from .leases import HeldLeases
from .memory import ArenaMemory, rid_hash
from .metadata import Metadata
from .search import candidates, ended, life_of, timed_out
from .ticket import InlineRecord, Ticket
from .views import LeasedRows

_BACKOFF_FIRST, _BACKOFF_LAST = 50e-6, 2e-3


class SlotRecord(NamedTuple):
    """A sealed record in an arena, checked; ``rows`` keeps its lease."""

    rows: LeasedRows
    slot: int
    row: SlotRow
    metadata: Metadata

    @property
    def rid(self) -> str:
        return self.metadata.rid

    @property
    def start(self) -> int:
        return self.row.start

    @property
    def tokens(self) -> int:
        return self.row.tokens

    @property
    def prompt_tokens(self) -> int:
        return self.row.prompt_tokens

    @property
    def routes(self) -> RouteLayout:
        return self.rows.arena.memory.description.routes


Record = SlotRecord | InlineRecord


class _NotYet(enum.Enum):
    IN_FLIGHT = enum.auto()
    UNKNOWN = enum.auto()


class Opener:
    """Opens records.

    Parameters
    ----------
    arena, allow_missing
        See ``ShmRouteReader``.
    """

    def __init__(self, arena: str | None, *, allow_missing: bool) -> None:
        self._arena = arena
        self._allow_missing = allow_missing
        self._held: dict[AttachedArena, HeldLeases] = {}

    def open(self, source: Ticket | InlineRecord | str, timeout: float) -> Record:
        """Open a record, waiting for one that is not there or not sealed yet.

        Raises
        ------
        ShmRouteError
            What ``ShmRouteReader`` raises. No lease is left.
        """
        if isinstance(source, InlineRecord):
            self._check_complete(source.metadata, source.tokens)
            return source
        deadline = time.monotonic() + timeout
        pause = _BACKOFF_FIRST
        attached = self._attach(source) if isinstance(source, Ticket) else None
        while True:
            opened: SlotRecord | _NotYet
            if isinstance(source, Ticket):
                assert attached is not None
                opened = self._try_slot(
                    attached, source.slot, source.generation, source.rid, source
                )
            else:
                opened = self._try_rid(source)
            if not isinstance(opened, _NotYet):
                return opened
            if time.monotonic() >= deadline:
                in_flight = opened is _NotYet.IN_FLIGHT
                raise timed_out(source, self._arena, timeout, in_flight=in_flight)
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, _BACKOFF_LAST)

    def close(self) -> None:
        """Keep no lease here: each ends with the last record of its arena."""
        self._held.clear()

    def _attach(self, ticket: Ticket) -> AttachedArena:
        if ticket.boot_id != segments.boot_id():
            raise NotOnThisNode(
                f"rid {ticket.rid!r} lies on node {ticket.host!r} (boot {ticket.boot_id}), this is "
                f"{segments.host_name()!r} (boot {segments.boot_id()}): read it there"
            )
        asked = self._arena
        if asked is not None and asked not in (ticket.segment.arena, ticket.segment.base):
            raise InvalidTicket(
                f"rid {ticket.rid!r}: the ticket is of arena {ticket.segment.arena!r}, not "
                f"{self._arena!r}"
            )
        return attach(ticket.segment)

    def _try_rid(self, rid: str) -> SlotRecord | _NotYet:
        wanted = rid_hash(rid)
        for _time, generation, slot, attached in candidates(wanted, self._arena):
            try:
                return self._try_slot(attached, slot, generation, rid)
            except _OtherRid:
                continue
            except (RouteFailed, RouteGone):
                if wanted == int(attached.memory.hashes[slot]) and generation == life_of(
                    attached, slot
                ):
                    raise
                # The slot went on to another record while we looked: look again.
            return _NotYet.IN_FLIGHT
        return _NotYet.UNKNOWN

    def _try_slot(
        self,
        attached: AttachedArena,
        slot: int,
        generation: int,
        rid: str,
        ticket: Ticket | None = None,
    ) -> SlotRecord | _NotYet:
        """Open the slot if it holds this generation sealed."""
        memory = attached.memory
        if slot >= memory.description.slots:
            raise InvalidTicket(f"slot {slot} of an arena with {memory.description.slots}")
        held = self._held.get(attached)
        if held is None:
            held = self._held[attached] = HeldLeases(attached.leases)
        try:
            leased = held.try_acquire(slot)
        except FileNotFoundError as error:
            raise RouteGone(f"rid {rid!r}: its arena {attached.segment.data} is gone") from error
        except PermissionError as error:
            raise LeaseUnavailable(
                error.errno,
                f"rid {rid!r}: user {os.geteuid()} may not open its lease file: read as user "
                f"{attached.segment.uid}, or let that user's group read {error.filename}",
            ) from error
        word = int(memory.words[slot])
        if not leased:
            if word | 1 > generation + 1:
                raise ended(attached, slot, generation, rid)
            return _NotYet.IN_FLIGHT
        try:
            if word == generation + 1:
                raise WriterDied(
                    f"rid {rid!r}: the engine (pid {memory.description.writer.pid}) died before "
                    "it sealed this record: run the request again"
                )
            if word != generation or int(memory.acknowledgements[slot]) == generation:
                raise ended(attached, slot, generation, rid)
            row = memory.row(slot)
            if row.generation != generation:
                raise LayoutMismatch(
                    f"slot {slot} of {memory.segment.data} has the word of generation "
                    f"{generation} and the row of {row.generation}: it is damaged"
                )
            metadata = _checked_metadata(row, memory, slot, rid)
            if ticket is not None:
                _check_ticket(ticket, row, memory.description.routes)
            self._check_complete(metadata, row.tokens)
        except BaseException:
            held.drop_last()  # now: a traceback would keep it
            raise
        rows = LeasedRows(attached, held, row.extent_offset, row.tokens)
        return SlotRecord(rows, slot, row, metadata)

    def _check_complete(self, metadata: Metadata, tokens: int) -> None:
        if self._allow_missing or not metadata.missing or not metadata.missing_rows:
            return
        raise IncompleteRoutes(
            f"rid {metadata.rid!r} misses {metadata.missing_rows} of {tokens} rows "
            f"(row ranges {list(metadata.missing[:4])}...): drop the sample, or open it with "
            "allow_missing=True and mask those rows"
        )


class _OtherRid(InvalidTicket):
    """The slot holds another rid: the next candidate when searching, an error for a ticket."""


def _checked_metadata(row: SlotRow, memory: ArenaMemory, slot: int, rid: str) -> Metadata:
    """The record's metadata, after checks that everything of it lies inside its extent."""
    _check_bounds(row, memory, slot)
    at = row.metadata_offset
    try:
        metadata = Metadata.unpack(bytes(memory.heap[at : at + row.metadata_bytes]), row.tokens)
    except ValueError as error:
        raise LayoutMismatch(f"slot {slot} of {memory.segment.data}: {error}") from error
    if metadata.rid != rid:
        raise _OtherRid(f"slot {slot} holds rid {metadata.rid!r}, not {rid!r}")
    return metadata


def _check_ticket(ticket: Ticket, row: SlotRow, routes: RouteLayout) -> None:
    here = (row.start, row.tokens, *routes.row_shape, routes.dtype_name)
    said = (ticket.start, ticket.tokens, ticket.layers, ticket.top_k, ticket.dtype)
    if here != said:
        raise InvalidTicket(
            f"rid {ticket.rid!r}: the ticket speaks of (start, tokens, layers, top_k, dtype) "
            f"{said}, the record has {here}"
        )


def _check_bounds(row: SlotRow, memory: ArenaMemory, slot: int) -> None:
    description = memory.description
    rows_end = row.extent_offset + row.tokens * description.routes.row_bytes
    metadata_end = row.metadata_offset + row.metadata_bytes
    fits = (
        1 <= row.tokens < layout.MAX_TOKENS
        and row.extent_offset % layout.EXTENT_ALIGN == 0
        and rows_end <= row.metadata_offset
        and metadata_end <= row.extent_offset + row.extent_bytes <= len(memory.heap)
        and row.metadata_bytes <= layout.MAX_METADATA + row.tokens // 8
        and row.missing_rows <= row.tokens
        and row.start < layout.MAX_TOKENS
    )
    if not fits:
        raise LayoutMismatch(
            f"slot {slot} of arena {description.arena_id.hex()} points outside its extent: {row}"
        )
