"""The rows of a sequence before anybody has read them: which rows of which records.

A sample passes through several processes before a trainer replays its routes. Up to there
it carries ``RowRange``s: a ticket, and which of its record's rows belong to the sample. Turns
of a conversation are several of them, one behind the other. Cutting and joining are arithmetic
on that list; bytes move when a trainer asks for rows, from the arena to where it asks for.

Promises
    - What is pickled is tickets, about 200 bytes a turn, at any length of the rows. (Of a
      record that came inline it is the record.)
    - A gap between turns, or rows that a turn does not have, is a ``ReplayError`` where the
      turns are joined, not rows of another token.
    - A record is opened only while it is read: a sample that waits keeps no lease.
    - Ranges arrive in pickles and are not believed: one that reaches beyond its record is a
      ``ReplayError`` where it is read, not rows of the record that lies beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import selection
from ..errors import LayoutMismatch, ReplayError
from ..layout import RouteLayout
from ..reader import ShmRouteReader
from ..releasing import release
from ..selection import Run
from ..ticket import InlineRecord, Ticket, parse_source
from . import native_rows

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True)
class RowRange:
    """Rows ``[first, end)`` of one record.

    Attributes
    ----------
    ticket
        The record's envelope, see ``shmroute.ticket``.
    first, end
        Counted within the record.
    """

    ticket: bytes
    first: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.first


def rows_of(source: Any, *, top_k: int) -> tuple[RowRange, int]:
    """All rows of the record that a response speaks of, and the token that the first belongs to.

    The record is not opened: this may be another node, and it may not be sealed yet.

    Parameters
    ----------
    source
        A ticket, a ``meta_info`` or a response, as ``ShmRouteReader`` takes them; not a rid,
        which may name another record by the time it is read.
    top_k
        Experts that the trainer's router takes.

    Raises
    ------
    ReplayError
        A rid, the rows of an engine that has no arena, or routes of another top-k.
    InvalidTicket, RouteFailed
        See ``shmroute.errors``.
    """
    if isinstance(source, str) and native_rows.looks_native(source, top_k=top_k):
        raise ReplayError(
            f"{len(source)} characters of SGLang's native routes (int32 in base64), and no ticket: "
            "this engine has no arena. Start it with --shmroute-arena NAME, or SHMROUTE_ARENA=NAME "
            "in its environment"
        )
    found = parse_source(source)
    if not isinstance(found, (Ticket, InlineRecord)):
        raise ReplayError(f"{found!r:.80} is a rid: hand over the ticket that its response carries")
    check_top_k(found.rid, found.top_k if isinstance(found, Ticket) else found.routes.top_k, top_k)
    return RowRange(found.encode(), 0, found.tokens), found.start


def count(ranges: Iterable[RowRange]) -> int:
    """How many rows these are together."""
    return sum(part.rows for part in ranges)


def joined(
    before: Sequence[RowRange], turn: RowRange, start: int, *, tokens: int
) -> tuple[RowRange, ...]:
    """Put a turn behind those before it.

    Parameters
    ----------
    before
        The rows of tokens ``[0, n)``; none if the turn begins with token 0.
    turn, start
        The turn's rows, and the token that the first belongs to. What ``before`` has of that
        token and those behind it is replaced: the newer turn computed them with what follows.
    tokens
        Tokens of the sequence by now: of the last one there is no row.

    Raises
    ------
    ReplayError
        The rows would leave a gap, or end elsewhere.
    """
    known = count(before)
    if start > known:
        raise ReplayError(
            f"a turn has routes from token {start} on, those before it end with token {known}: "
            f"ask for it with routed_experts_start_len={known}, or less"
        )
    if start + turn.rows != tokens - 1:
        raise ReplayError(
            f"routes of tokens [{start}, {start + turn.rows}) for a sequence of {tokens} tokens, "
            f"which has {tokens - 1} rows: were tokens changed after the engine returned them?"
        )
    return (*cut(before, 0, start), turn)


def cut(ranges: Iterable[RowRange], first: int, end: int) -> tuple[RowRange, ...]:
    """Rows ``[first, end)`` of all that these ranges have, one behind the other."""
    kept = []
    at = 0
    for part in ranges:
        low, high = max(first - at, 0), min(end - at, part.rows)
        if low < high:
            kept.append(RowRange(part.ticket, part.first + low, part.first + high))
        at += part.rows
    return tuple(kept)


def read_placed(
    places: Sequence[tuple[int, RowRange]],
    *,
    rows: int,
    device: torch.device,
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Read ranges to their places in one tensor ``[rows, layers, top_k]``, as stored.

    Only these rows and layers are read. To a CUDA device the copies are queued on the current
    stream, see ``shmroute.read_batch``.

    Parameters
    ----------
    places
        Ranges, at least one, and the row of the tensor at which each begins.
    rows
        Rows of the tensor; those without a range are left as they are allocated.
    device
        The CPU, or a CUDA device with its index.
    layers
        Decoder-layer numbers; None: all layers that the engine routes in.

    Raises
    ------
    ReplayError
        The engine does not route in one of these layers, a record does not have a range's rows,
        or a place is not within the tensor.
    LayoutMismatch
        The records are of models with other layers, experts or top-k.
    ShmRouteError
        What ``ShmRouteReader`` raises.
    """
    from .. import transfer

    ranges: dict[bytes, list[RowRange]] = {}
    runs: dict[bytes, list[Run]] = {}
    for to, part in places:
        ranges.setdefault(part.ticket, []).append(part)
        runs.setdefault(part.ticket, []).append(Run(to, part.first, part.end))
    try:
        with contextlib.ExitStack() as opened:
            records = [opened.enter_context(_opened(*each)) for each in ranges.items()]
            _check_places(places, rows)
            layout = records[0].layout
            for record in records:
                check_same_model(layout, record.layout)
            routed = layout.layer_ids
            return transfer.pack(
                zip([record.stored() for record in records], runs.values(), strict=True),
                selection.runs(
                    range(len(routed)) if layers is None else _positions(layers, routed)
                ),
                rows=rows,
                layout=layout,
                device=device,
                dtype=None,
            )
    except BaseException as error:
        # Frames of the traceback hold rows, which hold leases, for as long as it is kept.
        traceback.clear_frames(error.__traceback__)
        raise


def _opened(ticket: bytes, ranges: Iterable[RowRange]) -> ShmRouteReader:
    """The record that these ranges are of, if it has their rows."""
    record = ShmRouteReader(ticket)
    for part in ranges:
        if not 0 <= part.first <= part.end <= record.tokens:
            record.close()
            raise ReplayError(
                f"rows [{part.first}, {part.end}) of rid {record.rid!r}, whose record has rows "
                f"[0, {record.tokens}): was this range changed on its way? Take a record's with "
                "rows_of, and cut and join it with cut and joined"
            )
    return record


def _check_places(places: Iterable[tuple[int, RowRange]], rows: int) -> None:
    for to, part in places:
        if not 0 <= to <= rows - part.rows:
            raise ReplayError(
                f"{part.rows} rows at row {to} of a tensor of {rows}: give places within "
                f"[0, {rows}), or the tensor as many rows as its ranges have"
            )


def _positions(layers: Sequence[int], routed: Sequence[int]) -> list[int]:
    dense = sorted(set(layers) - set(routed))
    if dense:
        raise ReplayError(
            f"the trainer has routers in decoder layers {dense}, the engine routes in "
            f"{list(routed)}: is it the same model, and the trainer's moe_layer_freq right?"
        )
    return [routed.index(layer) for layer in layers]


def check_same_model(one: RouteLayout, other: RouteLayout) -> None:
    """Refuse to join routes of different models; their names may differ, as paths do."""
    shapes = [(each.num_experts, each.top_k, each.layer_ids) for each in (one, other)]
    if shapes[0] != shapes[1]:
        raise LayoutMismatch(
            f"routes of models with other (experts, top_k, layers): {shapes[0]} and {shapes[1]}"
        )


def native(
    ranges: Sequence[RowRange], *, num_layers: int, top_k: int, dtype: npt.DTypeLike = np.int32
) -> npt.NDArray[Any]:
    """Read ranges in the shape that SGLang returns natively: ``[rows, num_layers, top_k]``.

    Layers without experts are zero, as there.

    Parameters
    ----------
    num_layers
        Decoder layers of the trainer's model.

    Raises
    ------
    ReplayError
        The engine's model has more layers or another top-k, or a record does not have a
        range's rows.
    ShmRouteError
        What ``ShmRouteReader`` raises.
    """
    with contextlib.ExitStack() as opened:
        records = [opened.enter_context(_opened(part.ticket, [part])) for part in ranges]
        for record in records:
            check_layers(record.layout, num_layers)
            check_top_k(record.rid, record.layout.top_k, top_k)
        full = np.zeros((count(ranges), num_layers, top_k), dtype=dtype)
        at = 0
        for record, part in zip(records, ranges, strict=True):
            full[at : at + part.rows, list(record.layer_ids)] = record.numpy()[
                part.first : part.end
            ]
            at += part.rows
    return full


def one_layer(part: RowRange, layer: int) -> npt.NDArray[np.int32]:
    """``[rows, top_k]`` of one decoder layer as SGLang returns it: zero without experts."""
    with _opened(part.ticket, [part]) as routes:
        if layer not in routes.layer_ids:
            return np.zeros((part.rows, routes.layout.top_k), dtype=np.int32)
        column = routes.layer_ids.index(layer)
        return routes.numpy()[part.first : part.end, column].astype(np.int32)


def check_layers(layout: RouteLayout, num_layers: int) -> None:
    """Refuse routes of layers that the trainer's model does not have."""
    if layout.layer_ids[-1] >= num_layers:
        raise ReplayError(
            f"the engine's model {layout.model!r} routes in decoder layer {layout.layer_ids[-1]}, "
            f"the trainer's has layers [0, {num_layers}): is it the same model?"
        )


def check_top_k(rid: str, routed: int, top_k: int) -> None:
    """Refuse routes of another number of experts a token than the trainer's router takes."""
    if routed != top_k:
        raise ReplayError(
            f"rid {rid!r} has routes of top-{routed}, the trainer replays top-{top_k}: is its "
            "model the engine's?"
        )


def release_all(ranges: Iterable[RowRange]) -> None:
    """Release the records of these ranges; those that are gone already count as released."""
    release(list(dict.fromkeys(part.ticket for part in ranges)))
