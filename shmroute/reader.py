"""``ShmRouteReader``: one record of routes and what it says; how it is opened, see ``opening``."""

from __future__ import annotations

import zlib
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import views
from .attached import AttachedArena
from .errors import ChecksumMismatch, ShmRouteError
from .layout import FLAG_CHECKSUM
from .metadata import Metadata, WeightRun
from .opening import Opener
from .ticket import InlineRecord, Ticket, parse_source


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
        record = Opener(arena, allow_missing=allow_missing).open(parse_source(source), timeout)
        self._inline: npt.NDArray[Any] | None = None
        self._ticket: bytes | None = None
        self.rid = record.rid
        self.layout = record.routes
        self.tokens, self.start = record.tokens, record.start
        self.prompt_tokens = record.prompt_tokens
        self.missing_rows = record.metadata.missing_rows
        if isinstance(record, InlineRecord):
            self._inline = record.rows
        else:
            self._row, self._slot = record.row, record.slot
            self._arena, self._rows = record.rows.arena, record.rows
        self._metadata = record.metadata

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
