"""Rows of records as the tokens of a trainer's routers, and whether they fit these.

A router sees scores ``[tokens, experts]``: which token a row is, it cannot tell, and neither can
anyone behind it. So what can be compared is compared, and an error has the figures: layers,
``top_k``, experts, tokens, ids, and how many sequences lie side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..batch import RouteBatch, read_batch
from ..errors import ReplayError
from ..layout import RouteLayout
from ..partition import Partition
from ..reader import ShmRouteReader
from ..releasing import as_many, records_of


class RouterRows:
    """The records of one micro-batch and this rank's share of their tokens.

    Parameters
    ----------
    sources
        Of ``shmroute.read_batch``.
    tokens
        The rank's share and how sequences are padded. None: all tokens, no padding.
    arena, timeout
        Of ``shmroute.read_batch``.
    """

    def __init__(
        self, sources: Any, tokens: Partition | None, arena: str | None, timeout: float
    ) -> None:
        self._sources = list(as_many(sources))
        if not self._sources:
            raise ReplayError(
                "routes of no sequences: a micro-batch without any needs none, so run its forward "
                "without replay"
            )
        if tokens is not None and not isinstance(tokens, Partition):
            raise ReplayError(
                f"tokens is a {type(tokens).__name__}: give a shmroute.Partition, or None"
            )
        self._tokens = tokens or Partition()
        self._options: dict[str, Any] = {"arena": arena, "timeout": timeout}
        self._layout: RouteLayout | None = None

    def read(
        self,
        layer_ids: Sequence[int],
        device: torch.device,
        *,
        num_layers: int,
        sequences_abreast: int = 1,
    ) -> torch.Tensor:
        """``[tokens, layers, top_k]`` as stored, in the order of a router's tokens.

        Parameters
        ----------
        layer_ids
            Global 0-based decoder-layer numbers.
        num_layers
            What they count up to: the layers of the whole model.
        sequences_abreast
            The batch dimension of a router's input ``[length, batch, hidden]``. 1: the sequences
            are packed one behind the other.
        """
        tokens = self._tokens
        if sequences_abreast > 1:  # then sequence parallelism cuts their length, not the batch
            tokens = dataclasses.replace(tokens, sp_rank=0, sp_size=1)
        batch = read_batch(
            self._sources,
            layers=self._positions(layer_ids, num_layers),
            tokens=tokens,
            pad="distinct",
            device=device,
            **self._options,
        )
        _check_starts(batch)
        rows = batch.rows
        return rows if sequences_abreast == 1 else self._side_by_side(rows, sequences_abreast)

    def check(self, layer_id: int, experts: torch.Tensor, scores: torch.Tensor, topk: int) -> None:
        """Raise unless these ``experts [tokens, top_k]`` are of a router with such scores."""
        tokens, known = scores.shape
        assert self._layout is not None
        if experts.shape[1] != topk or self._layout.num_experts != known:
            raise ReplayError(
                f"layer {layer_id} chooses {topk} of {known} experts, the records have "
                f"{experts.shape[1]} of {self._layout.num_experts}: they are of another model"
            )
        if len(experts) != tokens:
            raise ReplayError(
                f"layer {layer_id} has {tokens} tokens on this rank, the routes of its "
                f"{len(self._sources)} sequences {len(experts)}, cut by {self._tokens}: give the "
                "sequences of this micro-batch and, as tokens, how they are padded and cut"
            )
        # On a GPU to look would be to wait for it, and there the gather stops at such an id.
        if experts.device.type == "cpu":
            _check_ids(layer_id, experts.to(torch.int64), known)

    def _positions(self, layer_ids: Sequence[int], num_layers: int) -> list[int]:
        """Of the layers, on axis 1 of the records."""
        with ShmRouteReader(self._first_record(), **self._options) as record:
            self._layout = record.layout
        if self._layout.num_layers != num_layers:
            raise ReplayError(
                f"the model counts {num_layers} layers, the records' {self._layout.num_layers}: "
                "this is another model, or one that counts attention and MoE as layers of their "
                "own, so that a layer's number says another thing in each; or its RouteLayout was "
                "made without num_layers"
            )
        position = {layer: at for at, layer in enumerate(self._layout.layer_ids)}
        lacking = [layer for layer in layer_ids if layer not in position]
        if lacking:
            raise ReplayError(
                f"the records have no routes of decoder layers {lacking[:16]} (from 0), they have "
                f"{list(self._layout.layer_ids)[:64]}: is this the model that the rollout ran?"
            )
        return [position[layer] for layer in layer_ids]

    def _first_record(self) -> Any:
        records = records_of(self._sources[0])
        if not records:
            raise ReplayError("the first sequence is a list of no records: leave it out")
        return records[0]

    def _side_by_side(self, rows: torch.Tensor, sequences: int) -> torch.Tensor:
        """Rows of sequences one behind the other as tokens ``[length, sequences]``, flattened."""
        tokens = self._tokens
        length = tokens.sequence_multiple // tokens.cp_size
        even = len(rows) == sequences * length and length % tokens.sp_size == 0
        whole = tokens.cp_size == 1 or tokens.zigzag  # else a rank has some sequences, not a part
        if len(self._sources) != sequences or not even or not whole:
            raise ReplayError(
                f"the router's input has {sequences} sequences side by side; given are "
                f"{len(self._sources)}, {len(rows)} rows cut by {tokens}: give one source a "
                "sequence, and as sequence_multiple the length that all are padded to"
            )
        piece = length // tokens.sp_size
        mine = rows.view(sequences, tokens.sp_size, piece, *rows.shape[1:])[:, tokens.sp_rank]
        return mine.transpose(0, 1).flatten(0, 1)


def _check_ids(layer_id: int, experts: torch.Tensor, known: int) -> None:
    """Raise unless each token has a set of experts that exist; of fewer the dispatcher would
    count too few.
    """
    if bool((experts >= known).any()):
        raise ReplayError(
            f"layer {layer_id} has experts 0 to {known - 1}, its routes expert "
            f"{int(experts.max())}: the record was written with ids outside of its layout"
        )
    ordered = experts.sort(dim=-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=-1).nonzero()
    if len(twice):
        token = int(twice[0])
        raise ReplayError(
            f"layer {layer_id}: {len(twice)} rows name an expert twice; the first, of token "
            f"{token} on this rank: {experts[token].tolist()}. A router's top-k writes no such row"
        )


def _check_starts(batch: RouteBatch) -> None:
    """Raise where tokens before a record's first would go to the experts of padding."""
    for number, (rid, start) in enumerate(zip(batch.rids, batch.starts, strict=True)):
        if start:
            raise ReplayError(
                f"sequence {number} (rid {rid!r}) has routes from token {start} on: give a list of "
                "all its turns in the place of the last one's ticket"
            )
