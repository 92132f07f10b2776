"""Whatever forwards do with routers' tensors and the capture buffer, no row is wrong.

Run by ``test_kernels`` like ``kernel_cases``: the routers' tensors are read by the GPU's kernel, on
a CPU. Forwards are made up: each layer's routes come in a form that is kept or copied, on the
forward's stream or beside it, once or twice, into memory that a layer before it had, out of a graph
that writes them past Python, too short, or not at all; with padding, and some forwards end early.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from capturers import Batch, WithoutModel
from forwards import VOCABULARY, Forwards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_bridge.eager_forwards import EagerForwards
from sglang_bridge.layer_views import LayerViews
from sglang_bridge.table import RouteTable
from shmroute import RouteLayout

ROUTES = RouteLayout(64, 3, [1, 2, 4], num_layers=6)
LOCATIONS, ROWS = 40, 16
COMPLETE = (
    "kept",
    "long integers",
    "strided",
    "beside",
    "twice",
    "then otherwise",
    "out of a graph",
)
LOST = ("in the memory of the layer before", "short", "absent")

Row = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class MadeUp:
    """A forward. ``layers``: how each MoE layer's routes come."""

    tokens: int
    padding: int
    layers: tuple[str, ...]
    ends: bool


FORWARDS = st.builds(
    MadeUp,
    tokens=st.integers(1, 8),
    padding=st.integers(0, 6),
    # Not all ways at once, or every forward would be lost for several reasons.
    layers=st.sampled_from((*COMPLETE, *LOST)).flatmap(
        lambda how: st.tuples(*[st.sampled_from(("kept", "long integers", how, how))] * 3)
    ),
    ends=st.sampled_from((True, True, True, False)),
)


class Engine:
    """A capturer on a CPU that reads routers' tensors as on a GPU, and what its table must hold."""

    def __init__(self) -> None:
        self.table = RouteTable(ROUTES, LOCATIONS, "cpu", vocabulary=VOCABULARY)
        self.forwards = Forwards(self.table)
        self.errors = 0
        publisher: Any = SimpleNamespace(
            flush=lambda: None,
            gatherer=SimpleNamespace(forward_begins=lambda _: 1, result_processed=lambda _: None),
            counters=SimpleNamespace(add=self._count),
        )
        self.capturer = WithoutModel(publisher, self.table)
        self.buffer = torch.full((ROWS, ROUTES.num_layers, ROUTES.top_k), -1, dtype=torch.int32)
        self.capturer.device_cache = SimpleNamespace(buffer=self.buffer)
        self.capturer._every_row = self.buffer
        self.capturer._layers = LayerViews(self.buffer)
        self.stream = 1
        self.capturer._eager = EagerForwards(
            self.table,
            ROUTES.top_k,
            self.capturer._layers,
            capturing=lambda: False,
            stream=lambda _: self.stream,
        )
        # By location: what was routed there, None where that is not known.
        self.truth: dict[int, Row | None] = {}

    def _count(self, _name: str, _by: int = 1) -> None:
        self.errors += 1

    def run(self, made: MadeUp) -> None:
        batch = Batch(self.forwards.token_ids(made.tokens), self.forwards.locations(made.tokens))
        batch.forward_mode = ForwardMode.EXTEND
        chosen = self.forwards.routes(made.tokens + made.padding)
        before = self.errors
        self.capturer.on_forward_begin(batch)
        self._capture(made, chosen)
        if not made.ends:
            return
        in_graph = "out of a graph" in made.layers
        self.capturer.on_forward_end(batch, in_graph, 4 if in_graph else None)
        whole = not set(made.layers) & {"short", "absent"}
        for at, location in enumerate(batch.out_cache_loc.tolist()):
            known = whole or ("absent" not in made.layers and at < made.tokens - 1)
            self.truth[location] = chosen[at, list(ROUTES.layer_ids)] if known else None
        if set(made.layers) <= set(COMPLETE):
            assert self.errors == before
            assert (self.table.tags[batch.out_cache_loc] >= 0).all(), "nothing is lost for nothing"

    def _capture(self, made: MadeUp, chosen: Row) -> None:
        memory: torch.Tensor | None = None
        alive = []  # as the forward's own would be: no memory is used twice but on purpose
        for layer, how in zip(ROUTES.layer_ids, made.layers, strict=True):
            ids = torch.from_numpy(chosen[:, layer].copy())
            if how == "out of a graph":
                self.buffer[: len(ids), layer] = ids
                continue
            if how == "absent":
                continue
            if how in ("twice", "then otherwise"):
                other = torch.from_numpy(self.forwards.routes(len(ids))[:, layer].copy())
                self.capturer.capture(layer, other)
                alive.append(other)
                ids = ids.to(torch.int64) if how == "then otherwise" else ids
            elif how == "in the memory of the layer before" and memory is not None:
                ids = memory.copy_(ids)
            elif how == "long integers":
                ids = ids.to(torch.int64)
            elif how == "strided":
                ids = ids.t().contiguous().t()
            elif how == "short":
                ids = ids[: made.tokens - 1]
            self.stream = 2 if how == "beside" else 1
            self.capturer.capture(layer, ids)
            self.stream = 1
            alive.append(ids)
            if ids.dtype == torch.int32 and len(ids) == len(chosen) and ids.is_contiguous():
                memory = ids

    def check(self) -> None:
        """No row is wrong, of this forward and of those before it."""
        rows, tags = self.table.rows.view(LOCATIONS, 3, ROUTES.top_k).numpy(), self.table.tags
        for location, routed in self.truth.items():
            if tags[location] >= 0:
                assert routed is not None, f"location {location}: nobody knows its routes"
                np.testing.assert_array_equal(rows[location], routed)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Forwards that are lost say so, with their stack."""
    import logging

    logger = logging.getLogger("shmroute")
    logger.disabled = True
    yield
    logger.disabled = False


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FORWARDS, min_size=2, max_size=6))
def test_no_row_is_wrong_whatever_forwards_do(forwards: list[MadeUp]) -> None:
    engine = Engine()
    for made in forwards:
        engine.run(made)
        engine.check()
