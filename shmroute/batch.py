"""``read_batch``: the routes of a batch of samples, packed into one tensor where they are used.

Protocol
    1 learn how many rows there are: tickets say it, records named by rid are opened. Where
      sequences are joined of several records, see ``sequences``, or a rank computes a part of
      them, see ``partition``, that is worked out now, too
    2 open each record, under its lease; check that it fits the others; queue its copies, see
      ``transfer``. That takes about 20 us, in which PCIe carries 1 MB: the copy of the one
      before is under way meanwhile. Before the first copy nothing is, so no more than what
      memory is taken by is looked at in step 1
    3 fill what no record has a row for, see ``padding``
    4 let go: at once where the copies are done, else when the GPU has passed them

An error lets go of every record: after copies that were under way already, and without
waiting for the error's traceback to be dropped.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import selection
from .metadata import merge_ranges
from .opening import Record
from .partition import Partition
from .reader import ShmRouteReader
from .records import Records
from .selection import Run
from .sequences import Share, Whole

if TYPE_CHECKING:
    import torch

    from .layout import RouteLayout
    from .padding import Pad
    from .transfer import Rows

_ROWS_MAX = (1 << 31) - 1  # cu_seqlens is int32


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RouteBatch:
    """Routes of several sequences, one behind the other, or a rank's share of them.

    Attributes
    ----------
    rows
        ``[rows, layers, top_k]``, contiguous.
    cu_seqlens
        ``int32 [sequences + 1]`` on the same device: sequence ``i`` has ``rows``
        ``[cu_seqlens[i], cu_seqlens[i + 1])``, with its own padding. What ``Partition`` pads the
        batch with lies behind the last.
    rids
        Of each sequence; where turns were joined, the last one's.
    starts
        The first token of each sequence that has a row. Without ``pad`` it is the token that the
        sequence's first row belongs to.
    lengths
        Tokens of each sequence, padding not counted.
    layer_ids
        Global 0-based decoder-layer numbers of axis 1.
    num_experts
        Ids are below this.
    missing
        Ranges ``[first, end)`` of ``rows`` that the engine could give no routes for.
    padding_mask
        With ``pad="mask"``, ``bool [rows]`` on the same device: True where ``rows`` has padding
        in place of routes, missing ones included. Else None.
    """

    rows: torch.Tensor
    cu_seqlens: torch.Tensor
    rids: tuple[str, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    layer_ids: tuple[int, ...]
    num_experts: int
    missing: tuple[tuple[int, int], ...]
    padding_mask: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.rids)


def read_batch(
    sources: Any,
    *,
    layers: slice | Iterable[int] | None = None,
    tokens: Partition | None = None,
    pad: Pad | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    arena: str | None = None,
    timeout: float = 5.0,
    allow_missing: bool = False,
) -> RouteBatch:
    """Read the routes of several sequences into one packed tensor. Needs torch.

    To a CUDA device the rows cross as they are stored and are widened there. The work is
    queued on the device's current stream and may still run on return; what that stream does
    next sees it done. The records are let go of when it is done, and may be released at once.

    The first read from an arena to a GPU has this process's mapping of it page-locked in the
    background. Until then, and where the driver or a memory limit refuses (a warning says so),
    copies go through a small page-locked buffer, at the speed of the CPU.

    Only the bytes of the layers and tokens that are asked for are read. But every rank opens
    every record, so that what is wrong with one is an error on all ranks alike.

    Parameters
    ----------
    sources
        What ``ShmRouteReader`` takes, several or one. In place of one record a list of them:
        those of one sequence, in the order of their ``start``, as a conversation's turns give
        them when they are asked for with ``routed_experts_start_len``. They are joined to the
        rows that one request for the whole sequence would give. Where two have a row of the same
        token, the later one's counts, and the sequence ends with the last record.
    layers
        Positions on axis 1, a slice or a sequence (a pipeline stage's). None: all.
    tokens
        The rank's share of the batch's tokens, see ``Partition``; needs ``pad``. None: all.
    pad
        What stands for tokens that have no row. Given, a sequence has a row for each of its
        tokens, from token 0 to the last, which the rollout sampled and never forwarded: one
        record from ``start`` 0 has ``record.tokens + 1``.

        ``"distinct"``
            Experts ``0, 1, ... top_k - 1``: a set as Megatron's dispatcher needs it.
        ``"minus_one"``
            -1, as miles marks them, to be routed by the router itself; needs ``dtype``.
        ``"mask"``
            As "distinct", and ``padding_mask`` says where.

        None: rows only, ``record.tokens`` of each.
    device
        None: that of ``out``, else the CPU.
    dtype
        ``torch.int32`` or ``torch.int64``; None: that of ``out``, else as stored, uint8 or uint16.
    out
        Memory for the rows: contiguous ``[at least the batch's rows, layers, top_k]``, of which
        ``rows`` of the result are the first. One that is long enough for every batch spares a read
        to the CPU the page faults of new memory; it overwrites the ``rows`` of the batch before,
        after what the current stream is still to do with them. An error may leave it half filled.
        None: new memory.
    arena
        See ``ShmRouteReader``.
    timeout
        Seconds to wait for records that are not there or not sealed yet, all together.
    allow_missing
        Take incomplete records. Rows that they miss are padded, without ``pad`` they are not to
        be used; ``missing`` of the batch says which they are. They belong to tokens that the
        trainer computes and others attend to: with ``pad="distinct"`` those go to experts that
        nobody chose, so let the router choose ("minus_one", "mask") or drop the sample.

    Raises
    ------
    LayoutMismatch
        The records are of models with other layers, experts or top-k.
    ValueError
        No source, the same record twice, turns that leave a gap, or layers, tokens, a pad, a
        device, a dtype or an ``out`` that cannot be.
    ShmRouteError
        What ``ShmRouteReader`` raises for the first source that cannot be opened.

    Examples
    --------
    >>> batch = shmroute.read_batch(                       # doctest: +SKIP
    ...     tickets,
    ...     layers=slice(0, 12),
    ...     tokens=Partition(cp_rank=1, cp_size=2),
    ...     pad="distinct",
    ...     device="cuda",
    ...     dtype=torch.int64,
    ... )
    """
    from . import padding

    if out is not None:
        device, dtype = _as_out(out, device, dtype)
    where = _device(device)
    _check_dtype(dtype)
    padding.check(pad, dtype)
    if tokens is not None and not isinstance(tokens, Partition):
        raise ValueError(f"tokens is a {type(tokens).__name__}: give a shmroute.Partition, or None")
    if tokens is not None and pad is None:
        raise ValueError(
            f"{tokens} without pad: it cuts the tokens that a trainer computes, and a sequence's "
            "last token has no row. Say what stands there: pad='distinct', 'minus_one' or 'mask'"
        )
    records = Records(sources, arena, timeout, allow_missing)
    try:
        return _packed(records, layers, tokens, pad, where, dtype, out)
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
        [(routes.stored(), selection.runs(range(routes.tokens)))],
        selection.runs(range(len(routes.layer_ids))),
        rows=routes.tokens,
        layout=routes.layout,
        device=where,
        dtype=dtype,
    )


def _packed(
    records: Records,
    layers: slice | Iterable[int] | None,
    tokens: Partition | None,
    pad: Pad | None,
    device: torch.device,
    dtype: torch.dtype | None,
    out: torch.Tensor | None,
) -> RouteBatch:
    import torch

    from . import transfer

    layout = records[0].routes
    chosen = selection.positions(layers, len(layout.layer_ids))
    share = _whole(records) if pad is None else _padded(records, tokens or Partition())
    if share.rows > _ROWS_MAX:
        raise ValueError(f"{share.rows} rows in a batch; cu_seqlens (int32) counts to {_ROWS_MAX}")
    if out is not None:
        out = _first_rows(out, (share.rows, len(chosen), layout.top_k), dtype, layout)
    placed: list[tuple[Record, Sequence[Run]]] = []
    rows = transfer.pack(
        _rows_of(records, share.places(), placed),
        selection.runs(chosen),
        rows=share.rows,
        layout=layout,
        device=device,
        dtype=dtype,
        out=out,
    )
    missing = _missing(placed)
    joined = share.joined
    return RouteBatch(
        rows=rows,
        # Not ``torch.tensor(..., device=device)``, which waits for the stream.
        cu_seqlens=torch.tensor(share.cumulative(), dtype=torch.int32).to(
            device, non_blocking=True
        ),
        rids=tuple([records[sequence.turns[-1].record].rid for sequence in joined]),
        starts=tuple([sequence.start for sequence in joined]),
        lengths=tuple([sequence.end + 1 for sequence in joined]),
        layer_ids=tuple(layout.layer_ids[position] for position in chosen),
        num_experts=layout.num_experts,
        missing=missing,
        padding_mask=_pad(rows, placed, missing, pad),
    )


def _padded(records: Records, tokens: Partition) -> Share:
    """What the rank computes."""
    joined = list(records.sequences())
    return Share(joined, tokens.cut([sequence.end + 1 for sequence in joined]))


def _whole(records: Records) -> Whole:
    """All rows there are."""
    if not records.in_turns:
        return Whole(records.rows(), records.sequences())
    joined = list(records.sequences())
    for number, (sequence, turns) in enumerate(zip(joined, records.turns, strict=True)):
        if turns is not None and sequence.start:
            raise ValueError(
                f"source {number}: its first turn has rows from token {sequence.start} on, so "
                f"tokens [0, {sequence.start}) have none: add the turn that has them, or say "
                "what stands there with pad"
            )
    return Whole(sum([sequence.end - sequence.start for sequence in joined]), joined)


def _rows_of(
    records: Records,
    places: Iterable[tuple[int, Sequence[Run]]],
    placed: list[tuple[Record, Sequence[Run]]],
) -> Iterator[tuple[Rows, Sequence[Run]]]:
    """What ``transfer.pack`` takes; each record is opened when it is asked for and noted down."""
    for index, runs in places:
        record = records[index]
        placed.append((record, runs))
        yield record.rows, runs


def _missing(placed: Iterable[tuple[Record, Sequence[Run]]]) -> tuple[tuple[int, int], ...]:
    """Ranges of the batch's rows that the records miss."""
    return tuple(
        sorted(
            (to + max(first, at) - at, to + min(end, until) - at)
            for record, runs in placed
            for first, end in record.metadata.missing
            for to, at, until in runs
            if max(first, at) < min(end, until)
        )
    )


def _pad(
    rows: torch.Tensor,
    placed: Iterable[tuple[Record, Sequence[Run]]],
    missing: Sequence[tuple[int, int]],
    pad: Pad | None,
) -> torch.Tensor | None:
    """Pad the rows that no record gave or that it misses; the mask, if one is asked for."""
    if pad is None:
        return None
    from . import padding

    given = merge_ranges((to, to + end - first) for _, runs in placed for to, first, end in runs)
    spans = merge_ranges([*padding.rest(given, len(rows)), *missing])
    return padding.fill(rows, spans, pad)


def _device(device: Any) -> torch.device:
    import torch

    where = torch.device("cpu" if device is None else device)
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device {where}: routes are read to the CPU or to a CUDA device")
    return where


def _as_out(
    out: Any, device: Any, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype | None]:
    """Device and dtype of a result that goes into ``out``; the dtype is None where as stored."""
    import torch

    if not isinstance(out, torch.Tensor) or out.dim() != 3 or not out.is_contiguous():
        shown = type(out).__name__
        if isinstance(out, torch.Tensor):
            shown = f"{tuple(out.shape)}, strides {out.stride()}"
        raise ValueError(f"out is {shown}: give a contiguous tensor [rows, layers, top_k]")
    if device is not None and _device(device) != out.device:
        raise ValueError(f"out is on {out.device}, device says {device}")
    if dtype not in (None, out.dtype):
        raise ValueError(f"out is {out.dtype}, dtype says {dtype}")
    return out.device, None if out.dtype in (torch.uint8, torch.uint16) else out.dtype


def _first_rows(
    out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, layout: RouteLayout
) -> torch.Tensor:
    """The part of ``out`` that a batch fills."""
    stored = str(out.dtype).removeprefix("torch.")
    if dtype is None and stored != layout.dtype.name:
        raise ValueError(
            f"out is {stored}, the records are {layout.dtype.name}: give that, int32 or int64"
        )
    if len(out) < shape[0] or out.shape[1:] != shape[1:]:
        raise ValueError(f"out is {tuple(out.shape)}, the batch {shape}: it needs as many rows")
    return out[: shape[0]]


def _check_dtype(dtype: torch.dtype | None) -> None:
    import torch

    if dtype not in (None, torch.int32, torch.int64):
        raise ValueError(f"dtype {dtype}: torch.int32, torch.int64, or None for as stored")
