"""Forwards without a model: random routes at given KV locations, and what they must read as."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sglang_bridge.epochs import WeightEpochs
from sglang_bridge.finished import Finished, Gatherer
from sglang_bridge.publisher import Publisher
from sglang_bridge.table import RouteTable
from shmroute import Arena

VOCABULARY = 1000


def started_publisher(arena: Arena, gatherer: Gatherer) -> Publisher:
    """A publisher as an engine has it: what finds no room goes inline, no shadow."""
    publisher = Publisher(
        arena,
        WeightEpochs(),
        gatherer,
        vocabulary=VOCABULARY,
        inline_when_full=True,
        shadow=False,
    )
    publisher.start()
    return publisher


def finished_request(
    rid: str,
    ids: npt.NDArray[np.int64],
    locations: Any,
    start: int = 0,
    native: torch.Tensor | None = None,
) -> Finished:
    """A request of which tokens ``[start, start + len(ids))`` have rows; half of that is prompt."""
    tokens, prompt = [0] * start + ids.tolist(), len(ids) // 2
    req = SimpleNamespace(
        rid=rid,
        session=None,
        origin_input_ids=array("q", tokens[:prompt]),
        output_ids=array("q", tokens[prompt:]),
    )
    finished = Finished(req, start, start + len(ids), locations, native)
    finished.describe()
    return finished


class Forwards:
    """Runs "forwards" into a route table and makes finished requests of what they computed."""

    def __init__(self, table: RouteTable, seed: int = 0) -> None:
        self.table = table
        self.epoch = 0
        self._random = np.random.default_rng(seed)
        # 0 is SGLang's padding.
        self._free = self._random.permutation(np.arange(1, len(table.rows)))

    def routes(self, tokens: int) -> npt.NDArray[np.int32]:
        """``int32 [tokens, all layers, top_k]`` of distinct ids, the largest one among them."""
        routes = self.table.routes
        keys = self._random.random((tokens, routes.num_layers, routes.num_experts))
        chosen = keys.argpartition(routes.top_k, axis=-1)[..., : routes.top_k].astype(np.int32)
        last = routes.num_experts - 1
        chosen[..., 0] = np.where((chosen == last).any(axis=-1), chosen[..., 0], last)
        return chosen

    def token_ids(self, tokens: int) -> npt.NDArray[np.int64]:
        return self._random.integers(0, VOCABULARY, tokens)

    def locations(self, tokens: int) -> npt.NDArray[np.int64]:
        """Scattered KV locations, the longest free ones first."""
        taken = self._free[:tokens].copy()
        self._free = np.roll(self._free, -tokens)
        return taken

    def run(
        self,
        ids: npt.NDArray[np.int64],
        locations: npt.NDArray[np.int64],
        start: int = 0,
        routes: npt.NDArray[np.int32] | None = None,
    ) -> npt.NDArray[np.int32]:
        """One forward of tokens ``[start, start + len(ids))``; returns its routes."""
        captured = self.routes(len(ids)) if routes is None else routes
        self.table.scatter(
            torch.from_numpy(captured.copy()),
            torch.from_numpy(locations),
            torch.from_numpy(ids),
            torch.arange(start, start + len(ids)),
            self.epoch,
        )
        return captured

    def rows(self, captured: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """What a reader must see of captured routes."""
        routes = self.table.routes
        return captured[:, list(routes.layer_ids)].astype(routes.dtype)

    def finished(
        self,
        rid: str,
        ids: npt.NDArray[np.int64],
        locations: npt.NDArray[np.int64],
        captured: npt.NDArray[np.int32] | None = None,
        start: int = 0,
    ) -> Finished:
        """A finished request; with ``captured`` also SGLang's own rows, for shadow mode."""
        return finished_request(
            rid,
            ids,
            torch.from_numpy(locations.copy()),
            start,
            native=None if captured is None else torch.from_numpy(captured.copy()),
        )
