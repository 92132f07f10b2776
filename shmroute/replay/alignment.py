"""Which token of a trainer's forward each row of routes belongs to.

Problem: an engine has no row for a sequence's last token, which it sampled and never forwarded;
a trainer forwards it, or not, and pads sequences to one length, on either side. Rows that are
one token off are other tokens' routes, and nothing downstream would tell.

Approach: rows are set out over the forward's tokens, flattened in the order of the model's
input; what has no row is -1, which stands for the router's own choice. Sequences that lie one
behind the other (packed) may each have their last token or not, which the number of tokens in
the forward tells; padded ones are placed by their attention mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ..batch import RouteBatch
from ..errors import ReplayError
from ..reader import ShmRouteReader

#: Routes of one sequence: rows ``[tokens, moe_layers, top_k]``, or a record that has them.
SequenceRoutes: TypeAlias = "torch.Tensor | np.ndarray[Any, Any] | ShmRouteReader"
#: Routes of a forward: of one sequence, of several in the order of the batch, or a batch of them.
Routes: TypeAlias = "SequenceRoutes | RouteBatch | Sequence[SequenceRoutes]"


class Recorded(NamedTuple):
    """Of what model routes were recorded: decoder-layer numbers of axis 1, experts a layer."""

    layer_ids: tuple[int, ...]
    num_experts: int


@dataclass(frozen=True, slots=True, eq=False)
class AlignedRows:
    """Rows for the tokens of one forward.

    Attributes
    ----------
    rows
        ``[tokens, moe_layers, top_k]``, a signed dtype; a row of -1 is the router's own choice.
    optional
        ``bool [tokens]``: rows of last tokens, which a forward may leave out, all or none.
    recorded
        What the routes say of the model that they were recorded from; arrays do not.
    """

    rows: torch.Tensor
    optional: torch.Tensor
    recorded: Recorded | None

    def for_forward(self, tokens: int) -> torch.Tensor:
        """The rows of a forward of so many tokens; ``ReplayError`` if it can be none of these."""
        whole, without = len(self.rows), int((~self.optional).sum())
        if tokens == whole:
            return self.rows
        if tokens == without:
            return self.rows[~self.optional]
        either = f" or {whole} with each sequence's last" if whole != without else ""
        raise ReplayError(
            f"the forward has {tokens} tokens, the routes are of {without}{either}: give the "
            "routes of this forward's sequences, and their attention_mask if they are padded"
        )


def align(routes: Routes, attention_mask: torch.Tensor | None) -> AlignedRows:
    """Set routes out over the tokens of a forward, see ``transformers.replay_routes``.

    Raises
    ------
    ReplayError
        The routes contradict one another or the mask, or do not begin at token 0.
    """
    sequences, recorded = _sequences(routes)
    shapes = {tuple(rows.shape[1:]) for rows in sequences}
    if len(shapes) != 1 or any(rows.dim() != 3 for rows in sequences):
        found = sorted({tuple(rows.shape) for rows in sequences})[:4]
        raise ReplayError(
            f"rows must be [tokens, moe_layers, top_k], the same layers and top_k for every "
            f"sequence of one batch; these are {found}"
        )
    if attention_mask is None:
        return _packed(sequences, recorded)
    return _padded(sequences, recorded, attention_mask)


def _packed(sequences: Sequence[torch.Tensor], recorded: Recorded | None) -> AlignedRows:
    pieces, optional = [], []
    for rows in sequences:
        pieces += [rows, rows.new_full((1, *rows.shape[1:]), -1)]
        optional += [*[False] * len(rows), True]
    return AlignedRows(torch.cat(pieces), torch.tensor(optional), recorded)


def _padded(
    sequences: Sequence[torch.Tensor], recorded: Recorded | None, mask: torch.Tensor
) -> AlignedRows:
    real = mask.bool().to(sequences[0].device)
    if real.dim() != 2 or len(real) != len(sequences):
        raise ReplayError(
            f"attention_mask of shape {list(mask.shape)} for the routes of {len(sequences)} "
            "sequences: it must be the model's [batch, seq], one row a sequence"
        )
    placed = sequences[0].new_full((*real.shape, *sequences[0].shape[1:]), -1)
    for index, rows in enumerate(sequences):
        where = real[index].nonzero().squeeze(-1)
        if len(where) - len(rows) not in (0, 1):
            raise ReplayError(
                f"sequence {index} has {len(where)} tokens in attention_mask and {len(rows)} rows: "
                "a sequence of n tokens has n - 1 rows, or n with one for its last token. If it "
                "was cut or lengthened after the rollout, cut its rows, or add rows of -1"
            )
        placed[index, where[: len(rows)]] = rows
    flat = placed.flatten(0, 1)
    return AlignedRows(flat, torch.zeros(len(flat), dtype=torch.bool), recorded)


def _sequences(routes: Routes) -> tuple[list[torch.Tensor], Recorded | None]:
    if isinstance(routes, RouteBatch):
        return list(_of_batch(routes)), Recorded(routes.layer_ids, routes.num_experts)
    if not isinstance(routes, (list, tuple)):
        routes = [routes]
    if not routes:
        raise ReplayError("routes of no sequence")
    recorded = {
        Recorded(each.layer_ids, each.layout.num_experts)
        for each in routes
        if isinstance(each, ShmRouteReader)
    }
    if len(recorded) > 1:
        raise ReplayError(f"records of different models: {sorted(recorded)}")
    return [_of_one(each) for each in routes], next(iter(recorded), None)


def _of_batch(batch: RouteBatch) -> Iterator[torch.Tensor]:
    rows = _without(_signed(batch.rows), batch.missing)
    if batch.padding_mask is not None:
        rows[batch.padding_mask] = -1
    bounds = batch.cu_seqlens.tolist()
    for index, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        piece = rows[bounds[index] : bounds[index + 1]]
        if len(piece) == length - 1 - start:  # as recorded: from ``start`` on, no padding
            _check_start(batch.rids[index], start)
        elif len(piece) < length or bool((piece[length - 1] >= 0).any()):
            raise ReplayError(
                f"sequence {index} of the batch has {length} tokens and {len(piece)} rows, of "
                "which padding cannot be told from routes: read the batch without pad or with "
                "pad='mask', and whole, without a Partition"
            )
        yield piece


def _of_one(routes: SequenceRoutes) -> torch.Tensor:
    if isinstance(routes, ShmRouteReader):
        _check_start(routes.rid, routes.start)
        return _without(_signed(routes.torch()), routes.missing)
    if isinstance(routes, np.ndarray):
        # torch takes neither read-only arrays nor, before 2.3, unsigned 16-bit ones.
        return torch.from_numpy(np.array(routes, dtype=_signed_numpy(routes.dtype)))
    if not isinstance(routes, torch.Tensor):
        raise ReplayError(
            f"a {type(routes).__name__} is no rows: give tickets, rids and responses to "
            "shmroute.read_batch, and rows as tensors or arrays [tokens, moe_layers, top_k]"
        )
    return _signed(routes)


def _check_start(rid: str, start: int) -> None:
    if start:
        raise ReplayError(
            f"the record of rid {rid!r} begins at token {start}: join it behind the rows of the "
            "tokens before, and give the whole as an array"
        )


def _without(rows: torch.Tensor, missing: Iterable[tuple[int, int]]) -> torch.Tensor:
    """The rows, with -1 for those that must not be used."""
    for first, end in missing:
        rows[first:end] = -1
    return rows


def _signed(rows: torch.Tensor) -> torch.Tensor:
    """A copy in a dtype that holds the ids and -1."""
    if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
        raise ReplayError(f"rows of dtype {rows.dtype}: expert ids are integers")
    wider = {torch.uint8: torch.int16, torch.uint16: torch.int32}
    signed = wider.get(rows.dtype, rows.dtype if rows.dtype.is_signed else torch.int64)
    return rows.detach().to(signed, copy=True)


def _signed_numpy(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind not in "iu":
        raise ReplayError(f"rows of dtype {dtype}: expert ids are integers")
    return np.promote_types(dtype, np.int8) if dtype.itemsize < 8 else np.dtype(np.int64)
