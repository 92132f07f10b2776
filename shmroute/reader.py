"""``ShmRouteReader``: open one record, by rid, ticket or response, and map its rows.

Protocol (the reader's half; ``writer`` has the other)
    1 find slot and generation (from the ticket, or by the rid's hash)
    2 take the slot's shared lease without waiting (busy: the copy is in flight, try again
      with a short back-off until ``timeout``)
    3 the word must equal the generation, and nobody may have released it
    4 check every offset and size against the arena
    5 hand out views that keep the lease; it drops with the last of them

Races, and where they are closed
    - The slot is recycled between 1 and 2: its word holds another generation (step 3).
    - It is recycled after step 2: it cannot be, the writer needs the exclusive lease.
    - The writer dies while it writes: its lease is free and the word odd (``WriterDied``).
    - Equal hashes of different rids: under the lease the full rid is compared.
    - Two records of one rid: the newer takes the older's hash when it is reserved, so only a
      ticket finds the older; between arenas the time of sealing decides.
    - A release races another reader: the record stays until that reader's lease is gone,
      but nobody else opens it any more.
"""

from __future__ import annotations

import time
import zlib
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout, segments, views
from .attached import AttachedArena, attach
from .errors import (
    ChecksumMismatch,
    IncompleteRoutes,
    InvalidTicket,
    LayoutMismatch,
    NotOnThisNode,
    RouteFailed,
    RouteGone,
    ShmRouteError,
    WriterDied,
)
from .layout import FLAG_CHECKSUM, SlotRow
from .leases import HeldLease
from .memory import ArenaMemory, rid_hash
from .metadata import Metadata, WeightRun
from .search import candidates, ended, life_of, timed_out
from .ticket import InlineRecord, Ticket, parse_source

_BACKOFF_FIRST, _BACKOFF_LAST = 50e-6, 2e-3


class ShmRouteReader:
    """One record of routes, mapped from shared memory (or taken out of an inline ticket).

    Parameters
    ----------
    source
        A rid; a ticket (``bytes``, or its base64 text as in
        ``meta_info["routed_experts"]``); a ``meta_info``; or a whole response.
    arena
        With a rid: the arena's name; None searches all of this user's arenas. With a
        ticket: a check that it belongs to this arena.
    timeout
        Seconds to wait for a record that is not there or not sealed yet; 0 tries once.
    allow_missing
        Open an incomplete record; ``missing`` says which rows must not be used.

    Attributes
    ----------
    tokens, start
        Number of rows, and the token that row 0 belongs to.
    prompt_tokens
        Tokens of the request's prompt (0: not stated).
    layout
        What a row means; ``layer_ids`` are its MoE layers' decoder-layer numbers.

    Raises
    ------
    RouteNotFound, RouteTimeout, RouteGone, RouteFailed, WriterDied, IncompleteRoutes,
    ArenaNotFound, LayoutMismatch, InvalidTicket, NotOnThisNode, LeaseUnavailable
        See ``shmroute.errors``.

    Examples
    --------
    >>> with ShmRouteReader(rid) as routes:            # doctest: +SKIP
    ...     experts = routes.torch().to("cuda", torch.int64)
    ...     routes.release()
    """

    def __init__(
        self,
        source: Any,
        *,
        arena: str | None = None,
        timeout: float = 5.0,
        allow_missing: bool = False,
    ) -> None:
        self._rows: views.LeasedRows | None = None
        self._arena: AttachedArena | None = None
        self._metadata: Metadata | None = None
        parsed = parse_source(source)
        if isinstance(parsed, InlineRecord):
            self._open_inline(parsed)
        else:
            self._open_slot(parsed, arena, timeout)
        if self.missing_rows and not allow_missing:
            message = self._incomplete()
            self.close()
            raise IncompleteRoutes(message)

    # -- opening ---------------------------------------------------------------------------

    def _open_inline(self, record: InlineRecord) -> None:
        self._inline: npt.NDArray[Any] | None = record.rows
        self._ticket: bytes | None = None
        self._metadata = record.metadata
        self.rid = record.rid
        self.layout = record.routes
        self.tokens, self.start = len(record.rows), record.start
        self.prompt_tokens = record.prompt_tokens
        self.missing_rows = record.metadata.missing_rows

    def _open_slot(self, source: Ticket | str, arena: str | None, timeout: float) -> None:
        self._inline = None
        deadline = time.monotonic() + timeout
        pause = _BACKOFF_FIRST
        by_ticket = isinstance(source, Ticket)
        attached = _attach_ticket(source, arena) if isinstance(source, Ticket) else None
        while True:
            opened: bool | None
            if isinstance(source, Ticket):
                assert attached is not None
                opened = self._try_slot(attached, source.slot, source.generation, source.rid)
            else:
                opened = self._try_rid(source, arena)
            if opened:
                break
            if time.monotonic() >= deadline:
                raise timed_out(source, arena, timeout, in_flight=by_ticket or opened is None)
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, _BACKOFF_LAST)
        if isinstance(source, Ticket):
            self._check_ticket(source)

    def _try_rid(self, rid: str, arena: str | None) -> bool | None:
        """True: open. None: in flight, wait. False: unknown so far."""
        wanted = rid_hash(rid)
        for _time, generation, slot, attached in candidates(wanted, arena):
            try:
                if self._try_slot(attached, slot, generation, rid):
                    return True
            except _OtherRid:
                continue
            except (RouteFailed, RouteGone):
                if wanted == int(attached.memory.hashes[slot]) and generation == life_of(
                    attached, slot
                ):
                    raise
                # The slot went on to another record while we looked: look again.
            return None
        return False

    def _try_slot(self, attached: AttachedArena, slot: int, generation: int, rid: str) -> bool:
        """Open the slot if it holds this generation sealed; False while it is in flight."""
        memory = attached.memory
        if slot >= memory.description.slots:
            raise InvalidTicket(f"slot {slot} of an arena with {memory.description.slots}")
        lease = HeldLease(attached.leases, slot)
        try:
            leased = lease.try_acquire()
        except FileNotFoundError as error:
            raise RouteGone(f"rid {rid!r}: its arena {attached.segment.data} is gone") from error
        word = int(memory.words[slot])
        if not leased:
            if word | 1 > generation + 1:
                raise ended(attached, slot, generation, rid)
            return False
        try:
            if word == generation + 1:
                raise WriterDied(
                    f"rid {rid!r}: the engine (pid {memory.description.writer.pid}) died before "
                    "it sealed this record: run the request again"
                )
            if word != generation or int(memory.acknowledgements[slot]) == generation:
                raise ended(attached, slot, generation, rid)
            self._take(attached, lease, slot, rid)
        except BaseException:
            if self._rows is None:
                lease.drop()  # now: a traceback would keep it
            raise
        return True

    def _take(self, attached: AttachedArena, lease: HeldLease, slot: int, rid: str) -> None:
        """Check the record under its lease and make it this reader's."""
        memory = attached.memory
        row = memory.row(slot)
        routes = memory.description.routes
        _check_bounds(row, memory, slot)
        at = row.metadata_offset
        try:
            metadata = Metadata.unpack(bytes(memory.heap[at : at + row.metadata_bytes]), row.tokens)
        except ValueError as error:
            raise LayoutMismatch(f"slot {slot} of {attached.segment.data}: {error}") from error
        if metadata.rid != rid:
            raise _OtherRid(f"slot {slot} holds rid {metadata.rid!r}, not {rid!r}")
        self.rid = rid
        self.layout = routes
        self.tokens, self.start = row.tokens, row.start
        self.prompt_tokens = row.prompt_tokens
        self.missing_rows = metadata.missing_rows
        self._row, self._slot = row, slot
        self._metadata = metadata
        self._ticket = None
        self._arena = attached
        shape = (row.tokens, *routes.row_shape)
        self._rows = views.LeasedRows(attached, lease, row.extent_offset, shape, routes.dtype)

    def _check_ticket(self, ticket: Ticket) -> None:
        here = (self.start, self.tokens, *self.layout.row_shape, self.layout.dtype_name)
        said = (ticket.start, ticket.tokens, ticket.layers, ticket.top_k, ticket.dtype)
        if here != said:
            self.close()
            raise InvalidTicket(
                f"rid {self.rid!r}: the ticket speaks of (start, tokens, layers, top_k, dtype) "
                f"{said}, the record has {here}"
            )

    def _incomplete(self) -> str:
        return (
            f"rid {self.rid!r} misses {self.missing_rows} of {self.tokens} rows "
            f"(row ranges {list(self.missing[:4])}...): drop the sample, or open it with "
            "allow_missing=True and mask those rows"
        )

    # -- what the record says --------------------------------------------------------------

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Global 0-based decoder-layer numbers of axis 1."""
        return self.layout.layer_ids

    @property
    def complete(self) -> bool:
        """Whether no row is missing."""
        return self.missing_rows == 0

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """Ranges ``[first, end)`` of rows that must not be used."""
        return self._meta.missing

    @property
    def weight_versions(self) -> tuple[WeightRun, ...]:
        """Runs ``(first row, epoch, label)`` of the weights that the rows were computed with."""
        return self._meta.versions

    @property
    def inline(self) -> bool:
        """Whether the rows came in the response instead of through the arena."""
        return self._inline is not None

    @property
    def ticket(self) -> bytes:
        """A ticket for this record, to open it in another process of this node."""
        if self._ticket is None:
            self._ticket = self._make_ticket()
        return self._ticket

    @property
    def _meta(self) -> Metadata:
        assert self._metadata is not None
        return self._metadata

    def _make_ticket(self) -> bytes:
        if self._arena is None:
            assert self._inline is not None
            return InlineRecord(
                self.rid, self.start, self.prompt_tokens, self.layout, self._meta, self._inline
            ).encode()
        description = self._arena.memory.description
        return Ticket(
            boot_id=description.writer.boot_id,
            host=description.writer.host,
            segment=self._arena.segment,
            slot=self._slot,
            generation=self._row.generation,
            rid=self.rid,
            start=self.start,
            tokens=self.tokens,
            layers=len(self.layer_ids),
            top_k=self.layout.top_k,
            dtype=self.layout.dtype_name,
            complete=self.complete,
        ).encode()

    # -- the rows --------------------------------------------------------------------------

    def numpy(self) -> npt.NDArray[Any]:
        """Read-only ``[tokens, moe_layers, top_k]`` view, ``uint8`` or ``uint16``; zero-copy."""
        if self._inline is not None:
            return self._inline
        return np.asarray(self._leased())

    def array(self) -> npt.NDArray[Any]:
        """The same as a ``RouteArray``, whose pickle is its ticket; zero-copy."""
        if self._inline is not None:
            return self._inline
        return views.route_array(self._leased(), self.ticket)

    def torch(self, device: Any = None, *, dtype: Any = None) -> Any:
        """The same as a tensor.

        Parameters
        ----------
        device
            None or a CPU: zero-copy, and torch cannot mark it read-only: do not write. A
            CUDA device: a copy, see ``read_batch``.
        dtype
            ``torch.int32`` or ``torch.int64`` (a copy), or None: as stored.
        """
        if dtype is None and device is None:
            return self._cpu_tensor()
        from . import batch

        return batch.tensor_of(self, device, dtype)

    def _cpu_tensor(self) -> Any:
        if self._inline is not None:
            import torch

            return torch.from_numpy(self._inline.copy())
        return views.as_tensor(self._leased())

    def stored(self) -> views.LeasedRows | npt.NDArray[Any]:
        """The rows with what keeps them: their lease, or of an inline record the array."""
        return self._leased() if self._inline is None else self._inline

    def native(self) -> npt.NDArray[np.int32]:
        """``int32 [tokens, all decoder layers, top_k]``, as SGLang returns natively (a copy).

        Layers without experts are zero, as there.
        """
        shape = (self.tokens, self.layout.num_layers, self.layout.top_k)
        full = np.zeros(shape, dtype=np.int32)
        full[:, list(self.layer_ids)] = self.numpy()
        return full

    def verify(self) -> None:
        """Compare the rows with the checksum that was sealed with them, if there is one.

        Raises
        ------
        ChecksumMismatch
            They differ.
        """
        if self._inline is not None or not self._row.flags & FLAG_CHECKSUM:
            return
        found = zlib.crc32(self.numpy().data)
        if found != self._row.checksum:
            raise ChecksumMismatch(
                f"rid {self.rid!r}: CRC-32 {found:#x}, sealed with {self._row.checksum:#x}"
            )

    def __repr__(self) -> str:
        if self._metadata is None:
            return "<ShmRouteReader, not open>"
        layers, top_k = self.layout.row_shape
        where = "inline" if self.inline else "closed" if self._rows is None else "mapped"
        state = "complete" if self.complete else f"{self.missing_rows} rows missing"
        return (
            f"<ShmRouteReader {self.rid!r}: rows [{self.start}, {self.start + self.tokens}) x "
            f"{layers} layers x top-{top_k}, {self.layout.dtype}, {state}, {where}>"
        )

    def _leased(self) -> views.LeasedRows:
        if self._rows is None:
            raise ShmRouteError(f"the reader of rid {self.rid!r} is closed")
        return self._rows

    # -- the end ---------------------------------------------------------------------------

    def release(self) -> None:
        """Say that nobody needs the record any more; its space may be used again.

        Views that exist stay valid, here and in other processes: the space is taken back
        when the last lease on it is gone. Idempotent; nothing to do for an inline record.
        """
        if self._inline is not None:
            return
        # Under our lease, which ``rows`` keeps until the store, also against a ``close`` in
        # another thread, the generation cannot change: no later life can be acknowledged.
        rows = self._leased()
        rows.arena.memory.acknowledgements[self._slot] = self._row.generation

    def close(self) -> None:
        """Let go of the record. Views handed out before stay valid and keep the lease."""
        self._rows = None
        self._arena = None

    def __enter__(self) -> ShmRouteReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _OtherRid(InvalidTicket):
    """The slot holds another rid: the next candidate when searching, an error for a ticket."""


def _attach_ticket(ticket: Ticket, arena: str | None) -> AttachedArena:
    if ticket.boot_id != segments.boot_id():
        raise NotOnThisNode(
            f"rid {ticket.rid!r} lies on node {ticket.host!r} (boot {ticket.boot_id}), this is "
            f"{segments.host_name()!r} (boot {segments.boot_id()}): read it there"
        )
    if arena not in (None, ticket.segment.arena, ticket.segment.base):
        raise InvalidTicket(
            f"rid {ticket.rid!r}: the ticket is of arena {ticket.segment.arena!r}, not {arena!r}"
        )
    return attach(ticket.segment)


def _check_bounds(row: SlotRow, memory: ArenaMemory, slot: int) -> None:
    description = memory.description
    rows_end = row.extent_offset + row.tokens * description.routes.row_bytes
    metadata_end = row.metadata_offset + row.metadata_bytes
    fits = (
        1 <= row.tokens < layout.MAX_TOKENS
        and row.extent_offset % layout.EXTENT_ALIGN == 0
        and rows_end <= row.metadata_offset
        and metadata_end <= row.extent_offset + row.extent_bytes <= len(memory.heap)
        and row.missing_rows <= row.tokens
    )
    if not fits:
        raise LayoutMismatch(
            f"slot {slot} of arena {description.arena_id.hex()} points outside its extent: {row}"
        )
