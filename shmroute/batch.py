"""``read_batch``: the routes of a batch of samples, packed into one tensor where they are used.

Protocol
    1 learn how many rows there are: tickets say it, records named by rid are opened
    2 open each record, under its lease; check that it fits the others; queue its copy, see
      ``transfer``. That takes about 20 us, in which PCIe carries 1 MB: the copy of the one
      before is under way meanwhile. Before the first copy nothing is, so no more than the
      number of rows is looked at in step 1
    3 let go: at once where the copies are done, else when the GPU has passed them

An error lets go of every record: after copies that were under way already, and without
waiting for the error's traceback to be dropped.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import traceback
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from . import selection
from .errors import LayoutMismatch
from .opening import Opener, Record, SlotRecord
from .reader import ShmRouteReader
from .releasing import as_many
from .ticket import SkimmedTicket, skim_source

if TYPE_CHECKING:
    import torch

_TOKENS_MAX = (1 << 31) - 1  # cu_seqlens is int32
# Rows that memory is taken for on a ticket's word. A record of more is opened first, which is
# nothing beside copying it.
_TOKENS_BELIEVED = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RouteBatch:
    """Routes of several records, one behind the other.

    Attributes
    ----------
    rows
        ``[sum(tokens), layers, top_k]``, contiguous.
    cu_seqlens
        ``int32 [records + 1]`` on the same device: record ``i`` has rows
        ``[cu_seqlens[i], cu_seqlens[i + 1])``.
    rids, starts
        Of each record; its first row belongs to token ``starts[i]``.
    layer_ids
        Global 0-based decoder-layer numbers of axis 1.
    missing
        Ranges ``[first, end)`` of ``rows`` that must not be used.
    """

    rows: torch.Tensor
    cu_seqlens: torch.Tensor
    rids: tuple[str, ...]
    starts: tuple[int, ...]
    layer_ids: tuple[int, ...]
    missing: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.rids)


def read_batch(
    sources: Any,
    *,
    layers: slice | Iterable[int] | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    arena: str | None = None,
    timeout: float = 5.0,
    allow_missing: bool = False,
) -> RouteBatch:
    """Read the routes of several records into one packed tensor. Needs torch.

    To a CUDA device the rows cross as they are stored and are widened there. The work is
    queued on the device's current stream and may still run on return; what that stream does
    next sees it done. The records are let go of when it is done, and may be released at once.

    The first read from an arena to a GPU has this process's mapping of it page-locked in the
    background. Until then, and where the driver or a memory limit refuses (a warning says so),
    copies go through a small page-locked buffer, at the speed of the CPU.

    Parameters
    ----------
    sources
        What ``ShmRouteReader`` takes, several or one.
    layers
        Positions on axis 1, a slice or a sequence (a pipeline stage's); no other layer's bytes
        are read. None: all.
    device
        None: the CPU.
    dtype
        ``torch.int32`` or ``torch.int64``; None: as stored, uint8 or uint16.
    arena
        See ``ShmRouteReader``.
    timeout
        Seconds to wait for records that are not there or not sealed yet, all together.
    allow_missing
        Take incomplete records; ``missing`` of the batch says which rows must not be used.

    Raises
    ------
    LayoutMismatch
        The records are of models with other layers, experts or top-k.
    ValueError
        No source, the same record twice, or layers, a device or a dtype that cannot be.
    ShmRouteError
        What ``ShmRouteReader`` raises for the first source that cannot be opened.

    Examples
    --------
    >>> batch = shmroute.read_batch(                       # doctest: +SKIP
    ...     tickets, layers=slice(0, 12), device="cuda", dtype=torch.int64
    ... )
    """
    where = _device(device)
    _check_dtype(dtype)
    records = _Records(sources, arena, timeout, allow_missing)
    try:
        return _packed(records, layers, where, dtype)
    except BaseException as error:
        # Frames of the traceback hold views, which hold leases, for as long as it is kept.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        records.close()


def tensor_of(routes: ShmRouteReader, device: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """See ``ShmRouteReader.torch``."""
    from . import transfer

    where = _device(device)
    _check_dtype(dtype)
    if where.type == "cpu" and dtype is None:
        return routes.torch()
    return transfer.pack(
        [routes.stored()],
        selection.runs(range(len(routes.layer_ids))),
        tokens=routes.tokens,
        layout=routes.layout,
        device=where,
        dtype=dtype,
    )


class _Records:
    """The records of a batch, in order, each opened when it is needed and until ``close``."""

    def __init__(
        self, sources: Any, arena: str | None, timeout: float, allow_missing: bool
    ) -> None:
        self._deadline = time.monotonic() + timeout
        self._opener = Opener(arena, allow_missing=allow_missing)
        self._sources = [skim_source(source) for source in as_many(sources)]
        self._opened: dict[int, Record] = {}
        self._known: dict[Any, int] = {}
        if not self._sources:
            raise ValueError("a batch of no sources: of what shape would it be?")

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Record:
        record = self._opened.get(index)
        if record is None:
            source = self._sources[index]
            if isinstance(source, SkimmedTicket):
                source = source.ticket()
            left = max(0.0, self._deadline - time.monotonic())
            record = self._opened[index] = self._opener.open(source, left)
            self._check(index, record)
        return record

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def tokens(self) -> list[int]:
        """Rows of each. What a ticket says is compared with the record when that is opened; if
        it says a lot, now, before memory is taken for it.
        """
        counts = [
            self[index].tokens
            if isinstance(source, str) or source.tokens > _TOKENS_BELIEVED
            else source.tokens
            for index, source in enumerate(self._sources)
        ]
        if sum(counts) > _TOKENS_MAX:
            raise ValueError(
                f"{sum(counts)} rows in a batch; cu_seqlens (int32) counts to {_TOKENS_MAX}"
            )
        return counts

    def close(self) -> None:
        self._opened.clear()
        self._opener.close()

    def _check(self, index: int, record: Record) -> None:
        first = record if index == 0 else self[0]
        if record.routes is not first.routes and _geometry(record) != _geometry(first):
            raise LayoutMismatch(
                f"source 0 (rid {first.rid!r}) has {_described(first)}, source {index} (rid "
                f"{record.rid!r}) has {_described(record)}: read each model's records in a batch "
                "of their own"
            )
        other = self._known.setdefault(_identity(record), index)
        if other != index:
            raise ValueError(
                f"sources {min(other, index)} and {max(other, index)} are the same record, of rid "
                f"{record.rid!r}: read it once and index the result"
            )


def _geometry(record: Record) -> tuple[int, int, tuple[int, ...]]:
    # Not the model's name, which engines may take from different paths.
    return record.routes.num_experts, record.routes.top_k, record.routes.layer_ids


def _described(record: Record) -> str:
    experts, top_k, layer_ids = _geometry(record)
    return f"top-{top_k} of {experts} experts in {len(layer_ids)} layers {list(layer_ids)[:64]}"


def _identity(record: Record) -> Any:
    if isinstance(record, SlotRecord):
        return record.rows.address  # no other record has it while we hold this one
    return record.rid, record.start, record.tokens


def _packed(
    records: _Records,
    layers: slice | Iterable[int] | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> RouteBatch:
    import torch

    from . import transfer

    layout = records[0].routes
    chosen = selection.positions(layers, len(layout.layer_ids))
    firsts = [0, *itertools.accumulate(records.tokens())]
    rows = transfer.pack(
        (record.rows for record in records),
        selection.runs(chosen),
        tokens=firsts[-1],
        layout=layout,
        device=device,
        dtype=dtype,
    )
    opened = list(records)
    return RouteBatch(
        rows=rows,
        # Not ``torch.tensor(..., device=device)``, which waits for the stream.
        cu_seqlens=torch.tensor(firsts, dtype=torch.int32).to(device, non_blocking=True),
        rids=tuple([record.rid for record in opened]),
        starts=tuple([record.start for record in opened]),
        layer_ids=tuple(layout.layer_ids[position] for position in chosen),
        missing=tuple(
            (at + first, at + end)
            for at, record in zip(firsts, opened, strict=False)
            for first, end in record.metadata.missing
        ),
    )


def _device(device: Any) -> torch.device:
    import torch

    where = torch.device("cpu" if device is None else device)
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device {where}: routes are read to the CPU or to a CUDA device")
    return where


def _check_dtype(dtype: torch.dtype | None) -> None:
    import torch

    if dtype not in (None, torch.int32, torch.int64):
        raise ValueError(f"dtype {dtype}: torch.int32, torch.int64, or None for as stored")
