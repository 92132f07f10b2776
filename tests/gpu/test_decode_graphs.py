"""Captured decode steps store their own routes, whatever the graphs' memory pool does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from router_model import DEVICE, LOCATIONS, RouterModel

pytestmark = pytest.mark.gpu

TOKENS = 24


class Runner:
    """Stands for SGLang's, by which graphs are told from those of an earlier one."""


class Model(RouterModel):
    """Its decode steps can be captured."""

    def __init__(self, in_host_memory: bool = False) -> None:
        from sglang_bridge.decode_graphs import DecodeGraphs

        super().__init__(in_host_memory)
        capturing = torch.cuda.is_current_stream_capturing
        self.graphs = DecodeGraphs(self.table, self.buffer, capturing)
        self.pool, self.runner = torch.cuda.graph_pool_handle(), Runner()
        self.kept: list[bool] = []

    def step(self, given: SimpleNamespace) -> None:
        self.kept = self.route(given.hidden, self.graphs.keep)
        self.graphs.end_capture(self.runner, None, given, len(given.hidden))

    def capture(self, tokens: int) -> tuple[torch.cuda.CUDAGraph, SimpleNamespace]:
        given = self.inputs(tokens)
        self.step(given)  # warms up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(given)
        return graph, given


@pytest.fixture
def model() -> Iterator[Model]:
    yield Model()
    torch.cuda.synchronize()


@pytest.mark.parametrize("in_host_memory", [False, True], ids=["gpu table", "host table"])
def test_replays_store_the_routes_of_their_own_step(in_host_memory: bool) -> None:
    model = Model(in_host_memory)
    graph, given = model.capture(TOKENS)
    assert all(model.kept)
    assert model.graphs.has_stored(TOKENS)
    for seed in range(5):
        model.graphs.before_forward(seed)
        model.fill(given, seed)
        graph.replay()
        torch.cuda.synchronize()
        model.check(given, seed)
    assert (model.buffer == -1).all()


def test_graphs_of_one_pool_do_not_mix(model: Model) -> None:
    captured = [model.capture(tokens) for tokens in (TOKENS, 16, 8)]
    model.graphs.before_forward(0)
    for turn in range(6):
        graph, given = captured[turn % 3]
        model.fill(given, turn)
        graph.replay()
        model.check(given, 0)


def test_a_replay_before_its_addresses_are_known_stores_nothing(model: Model) -> None:
    graph, _ = model.capture(TOKENS)
    graph.replay()
    torch.cuda.synchronize()
    assert (model.table.tags < 0).all()


def test_a_table_that_was_given_back_is_found_where_it_is_now(model: Model) -> None:
    graph, given = model.capture(TOKENS)
    model.graphs.before_forward(0)
    torch.cuda.synchronize()
    before = model.table.rows.data_ptr()
    model.table.give_back()
    torch.cuda.empty_cache()
    elsewhere = torch.full((LOCATIONS * 64,), 55, dtype=torch.uint8, device=DEVICE)
    model.graphs.before_forward(0)
    graph.replay()
    model.table.take_again()
    assert (model.table.tags < 0).all()
    model.graphs.before_forward(0)
    model.fill(given, 3)
    graph.replay()
    model.check(given, 0)
    assert (elsewhere == 55).all(), "the graph wrote where the table was"
    assert elsewhere.data_ptr() == before or model.table.rows.data_ptr() == before
