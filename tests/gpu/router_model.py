"""Routers on a GPU whose choices depend on each other, and the table that they go to."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from sglang_bridge.table import RouteTable
from shmroute import RouteLayout

ROUTES = RouteLayout(128, 8, (1, 2, 3, 5, 6), num_layers=7)
LOCATIONS, VOCABULARY = 512, 1000
DEVICE = "cuda"


class RouterModel:
    """Layers that choose experts by their input, whose memory torch would use again."""

    def __init__(self, in_host_memory: bool = False) -> None:
        self.table = RouteTable(
            ROUTES, LOCATIONS, DEVICE, vocabulary=VOCABULARY, in_host_memory=in_host_memory
        )
        self.buffer = torch.full((64, 7, ROUTES.top_k), -1, dtype=torch.int32, device=DEVICE)

    def choices(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        scores = (hidden * (layer + 1)).sin()
        return scores.topk(ROUTES.top_k, dim=-1).indices.to(torch.int32)

    def route(self, hidden: torch.Tensor, keep: Callable[[int, torch.Tensor], bool]) -> list[bool]:
        """A forward's layers, each handed over; what ``keep`` said."""
        kept = []
        for layer in ROUTES.layer_ids:
            ids = self.choices(hidden, layer)
            kept.append(keep(layer, ids))
            hidden = hidden + ids.sum(-1, keepdim=True) * 1e-3
            del ids
            # What comes next in the pool: of the same size, and full of something else.
            torch.full((len(hidden), ROUTES.top_k), 77, dtype=torch.int32, device=DEVICE)
        return kept

    def inputs(self, tokens: int) -> SimpleNamespace:
        return SimpleNamespace(
            hidden=torch.zeros((tokens, 128), device=DEVICE),
            input_ids=torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
            positions=torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
            out_cache_loc=torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
        )

    def fill(self, given: SimpleNamespace, seed: int) -> None:
        """The inputs of a step."""
        dice = torch.Generator().manual_seed(seed)
        tokens = len(given.hidden)
        given.hidden.copy_(torch.randn(given.hidden.shape, generator=dice))
        given.input_ids.copy_(torch.randint(0, VOCABULARY, (tokens,), generator=dice))
        given.positions.copy_(torch.randint(0, 1 << 20, (tokens,), generator=dice))
        given.out_cache_loc.copy_(torch.randperm(LOCATIONS - 1, generator=dice)[:tokens] + 1)

    def check(self, given: SimpleNamespace, epoch: int) -> None:
        """The table holds, at the step's locations, what the torch form puts there."""
        hidden = given.hidden
        captured = torch.full((len(hidden), 7, ROUTES.top_k), -1, dtype=torch.int32, device=DEVICE)
        for layer in ROUTES.layer_ids:
            ids = self.choices(hidden, layer)
            hidden = hidden + ids.sum(-1, keepdim=True) * 1e-3
            captured[:, layer] = ids
        reference = RouteTable(ROUTES, LOCATIONS, DEVICE, vocabulary=VOCABULARY)
        where = given.out_cache_loc
        reference.scatter_with_torch(captured, where, given.input_ids, given.positions, epoch)
        assert (reference.tags[where] >= 0).all()
        assert torch.equal(self.table.tags[where], reference.tags[where])
        rows = self.table.rows.cpu()[where.cpu()]
        assert torch.equal(rows, reference.rows[where].cpu())
