"""What a prefill outside of CUDA graphs does for its routes: layer after layer, then at its end.

Two ways: the routers' tensors are kept and read where they are (`sglang_bridge.eager_forwards`),
or each layer's is copied into the capture buffer (`sglang_bridge.layer_views`). The tensors are the
same each time, so none is allocated, and most of them are in the GPU's cache.
"""

from __future__ import annotations

import torch

from sglang_bridge.eager_forwards import EagerForwards
from sglang_bridge.layer_views import LayerViews
from sglang_bridge.table import RouteTable
from shmroute import RouteLayout

TOKENS = 8192


class Prefill:
    """The routers' outputs of a prefill of ``TOKENS`` tokens, and where they go."""

    def __init__(self, routes: RouteLayout, locations: int, vocabulary: int, device: torch.device):
        self._layers, top_k = routes.layer_ids, routes.top_k
        scores = TOKENS, routes.num_experts
        self._routers = [
            torch.rand(scores, device=device).topk(top_k, dim=-1).indices.to(torch.int32)
            for _ in self._layers
        ]
        ids = torch.randint(0, vocabulary, (TOKENS,), device=device)
        where = torch.randperm(locations - 1, device=device)[:TOKENS] + 1
        self._given = where, ids, torch.arange(TOKENS, device=device)
        self._table = RouteTable(routes, locations, device, vocabulary=vocabulary)
        buffer = TOKENS, routes.num_layers, top_k
        self._buffer = torch.full(buffer, -1, dtype=torch.int32, device=device)
        self._views = LayerViews(self._buffer)
        self._eager = EagerForwards(self._table, top_k, self._views)

    def keep(self, layers: int | None = None) -> None:
        """Of the first so many layers, of all by default."""
        self._eager.begin()
        for layer, ids in self._some(layers):
            self._eager.keep(layer, ids)

    def store(self) -> None:
        if not self._eager.store(*self._given, 0):
            raise RuntimeError("the forward's routes went through the capture buffer")

    def copy(self, layers: int | None = None) -> None:
        """Of the first so many layers, of all by default."""
        for layer, ids in self._some(layers):
            self._views.copy(layer, ids)

    def scatter(self) -> None:
        self._table.scatter(self._buffer, *self._given, 0)

    def _some(self, layers: int | None) -> list[tuple[int, torch.Tensor]]:
        return list(zip(self._layers, self._routers, strict=True))[:layers]
