"""Routes in transformers' MoE models: replay those of a rollout, or record the model's own.

::

    batch = shmroute.read_batch(tickets)
    with replay_routes(model, batch, attention_mask=mask):
        logits = model(input_ids=ids, attention_mask=mask).logits
    loss(logits).backward()

Any model whose MoE blocks hold ``experts`` and whose router takes one ``topk`` over all of them
(``topk`` says how that is used). What the router makes of its choice, a softmax over it, a
normalisation, a scaling, is the model's own code on the model's own scores: the router keeps its
gradients, as Rollout Routing Replay (arXiv 2510.11370) wants it.

Promises
    Every MoE layer's router takes exactly the rows given, or ``ReplayError`` says what does not
    fit: layers, top_k, tokens, ids, the kind of router.
    Gradient checkpointing recomputes with the rows of its own forward, in the ``with`` or after it,
    several micro-batches in flight included.
    The model is as before after the ``with``, but for a hook on each MoE block that the next
    ordinary forward takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ReplayError
from .alignment import AlignedRows, Routes, align
from .topk import MoeBlock, Routing, moe_blocks

__all__ = ["RecordedRoutes", "Routes", "record_routes", "replay_routes"]


@contextmanager
def replay_routes(
    model: nn.Module,
    routes: Routes,
    *,
    attention_mask: torch.Tensor | None = None,
    layer_ids: Sequence[int] | None = None,
) -> Iterator[None]:
    """Force the experts of one forward of ``model``.

    Parameters
    ----------
    model
        A transformers model, also wrapped (PEFT, DDP, FSDP), not compiled.
    routes
        Of one sequence: rows ``[tokens, moe_layers, top_k]`` of any integer dtype (tensor or
        array), or an open ``ShmRouteReader``. Of several: a list of these or a ``RouteBatch`` of
        ``shmroute.read_batch``, in the order of the batch. A sequence of n tokens has n - 1 rows,
        as an engine has none for the last token; its router then chooses itself. So it does for
        a row of -1 and for rows that a record misses.
    attention_mask
        ``[batch, seq]`` as the model takes it, where sequences are padded (left or right): row i
        places sequence i; pads are routed natively. None: the forward's tokens, flattened, are
        the sequences one behind the other, all of them with their last token or all without.
    layer_ids
        Decoder-layer numbers of axis 1, 0-based. None: the record's; for arrays the model's MoE
        layers in order.

    Raises
    ------
    ReplayError
        What does not fit, with figures and remedy: before the forward, in it, or, where a layer
        was not reached, after it.

    Examples
    --------
    >>> with ShmRouteReader(rid) as record, replay_routes(model, record):  # doctest: +SKIP
    ...     logits = model(input_ids=tokens[None]).logits
    """
    blocks = moe_blocks(model)
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise ReplayError(
            f"attention_mask is a {type(attention_mask).__name__}: give the tensor [batch, seq] "
            "that the model gets"
        )
    aligned = align(routes, attention_mask)
    if aligned.recorded is not None:
        _check_experts(aligned.recorded.num_experts, blocks)
    columns = _columns(aligned, blocks, layer_ids)
    _check_ids(aligned.rows, blocks)
    with Routing(model, blocks, _replayed(aligned, columns)).installed():
        yield


class RecordedRoutes:
    """The choices that ``record_routes`` saw, complete when its ``with`` has ended.

    Attributes
    ----------
    layer_ids
        Decoder-layer numbers of the MoE layers.
    """

    def __init__(self, blocks: Sequence[MoeBlock]) -> None:
        self.layer_ids = tuple(block.layer_id for block in blocks)
        self._chosen: dict[int, torch.Tensor] = {}

    @property
    def rows(self) -> torch.Tensor:
        """``int64 [tokens, moe_layers, top_k]``, tokens flattened in the order of the input."""
        return torch.stack([self._chosen[layer] for layer in self.layer_ids], dim=1)

    def choose(
        self, block: MoeBlock, _: torch.Tensor, native: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The router's own choice, kept."""
        chosen = self._chosen[block.layer_id] = native()
        return chosen


@contextmanager
def record_routes(model: nn.Module) -> Iterator[RecordedRoutes]:
    """Record the model's own routing of one forward, which stays as it is.

    For what compares a trainer's routers with the engine's, and for replaying the old policy's
    routes in the updates that follow it.

    Raises
    ------
    ReplayError
        As ``replay_routes``.
    """
    blocks = moe_blocks(model)
    recorded = RecordedRoutes(blocks)
    with Routing(model, blocks, recorded.choose).installed():
        yield recorded


def _replayed(aligned: AlignedRows, columns: dict[int, int]) -> Callable[..., torch.Tensor]:
    native_rows = bool((aligned.rows < 0).any())

    def choose(
        block: MoeBlock, scores: torch.Tensor, native: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        rows = aligned.for_forward(len(scores))[:, columns[block.layer_id]]
        indices = rows.to(scores.device, torch.int64)
        # The router's own top-k is only taken where some token needs it.
        return torch.where(indices < 0, native(), indices) if native_rows else indices

    return choose


def _columns(
    aligned: AlignedRows, blocks: Sequence[MoeBlock], layer_ids: Sequence[int] | None
) -> dict[int, int]:
    """Position on axis 1 of each block's layer."""
    _, layers, top_k = aligned.rows.shape
    model_layers = tuple(block.layer_id for block in blocks)
    recorded = aligned.recorded and aligned.recorded.layer_ids
    stated = recorded if layer_ids is None else tuple(layer_ids)
    if stated is not None and len(stated) != layers:
        raise ReplayError(f"{len(stated)} layer_ids for rows of {layers} layers")
    if (stated is None and layers != len(blocks)) or (
        stated is not None and sorted(stated) != list(model_layers)
    ):
        raise ReplayError(
            f"the routes are of {layers} layers {_shown(stated)}, the model's MoE layers are "
            f"{len(blocks)}: {_shown(model_layers)}. Of rows that count dense layers, too, take "
            "rows[:, layer_ids]; of others, give the layer_ids of axis 1"
        )
    if {block.top_k for block in blocks} != {top_k}:
        raise ReplayError(
            f"the routes are top-{top_k}, the model's routers are "
            f"top-{sorted({block.top_k for block in blocks})}: are they of another model, or do "
            "they count fused shared experts?"
        )
    return {layer: column for column, layer in enumerate(stated or model_layers)}


def _check_experts(num_experts: int, blocks: Sequence[MoeBlock]) -> None:
    known = {block.num_experts for block in blocks}
    if known != {num_experts}:
        raise ReplayError(
            f"the records are of layers with {num_experts} experts, the model's have "
            f"{sorted(known)}: they are of another model"
        )


def _check_ids(rows: torch.Tensor, blocks: Sequence[MoeBlock]) -> None:
    """Each row a set of experts that exist, or -1 throughout."""
    num_experts = min(block.num_experts for block in blocks)
    if len(rows) == 0:
        return
    low, high = int(rows.min()), int(rows.max())
    if low < -1 or high >= num_experts:
        raise ReplayError(
            f"expert ids from {low} to {high}, the model has {num_experts} experts (0 to "
            f"{num_experts - 1}; -1: native routing)"
        )
    ordered = rows.sort(dim=-1).values
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(dim=-1)
    partly = (ordered[..., 0] < 0) & (ordered[..., -1] >= 0)
    faulty = (twice | partly).nonzero()
    if len(faulty):
        token, column = faulty[0].tolist()
        raise ReplayError(
            f"{len(faulty)} rows name an expert twice or are -1 in part; the first, of token "
            f"{token} and layer position {column}: {rows[token, column].tolist()}. A row is a set "
            "of experts, or -1 in all its places"
        )


def _shown(layers: Sequence[int] | None) -> str:
    if layers is None:
        return "(which ones is not said)"
    return f"{list(layers[:16])}{' ...' if len(layers) > 16 else ''}"
