"""Captured decode steps store their own routes, whatever the graphs' memory pool does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from sglang_bridge.table import RouteTable
from shmroute import RouteLayout

pytestmark = pytest.mark.gpu

ROUTES = RouteLayout(128, 8, (1, 2, 3, 5, 6), num_layers=7)
LOCATIONS, TOKENS, VOCABULARY = 512, 24, 1000
DEVICE = "cuda"


class Runner:
    """Stands for SGLang's, by which graphs are told from those of an earlier one."""


class Model:
    """Layers that choose experts by their input, whose memory the pool would use again."""

    def __init__(self, in_host_memory: bool = False) -> None:
        from sglang_bridge.decode_graphs import DecodeGraphs

        self.table = RouteTable(
            ROUTES, LOCATIONS, DEVICE, vocabulary=VOCABULARY, in_host_memory=in_host_memory
        )
        self.buffer = torch.full((64, 7, ROUTES.top_k), -1, dtype=torch.int32, device=DEVICE)
        capturing = torch.cuda.is_current_stream_capturing
        self.graphs = DecodeGraphs(self.table, self.buffer, capturing)
        self.pool, self.runner = torch.cuda.graph_pool_handle(), Runner()
        self.kept: list[bool] = []

    def choices(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        scores = (hidden * (layer + 1)).sin()
        return scores.topk(ROUTES.top_k, dim=-1).indices.to(torch.int32)

    def step(self, given: SimpleNamespace) -> None:
        hidden = given.hidden
        for layer in ROUTES.layer_ids:
            ids = self.choices(hidden, layer)
            self.kept.append(self.graphs.keep(layer, ids))
            hidden = hidden + ids.sum(-1, keepdim=True) * 1e-3
            del ids
            # What comes next in the pool: of the same size, and full of something else.
            torch.full((len(hidden), ROUTES.top_k), 77, dtype=torch.int32, device=DEVICE)
        self.graphs.end_capture(self.runner, None, given, len(hidden))

    def inputs(self, tokens: int) -> SimpleNamespace:
        return SimpleNamespace(
            hidden=torch.zeros((tokens, 128), device=DEVICE),
            input_ids=torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
            positions=torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
            out_cache_loc=torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
        )

    def capture(self, tokens: int) -> tuple[torch.cuda.CUDAGraph, SimpleNamespace]:
        given = self.inputs(tokens)
        self.step(given)  # warms up
        self.kept.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(given)
        return graph, given

    def fill(self, given: SimpleNamespace, seed: int) -> None:
        """The inputs of a decode step."""
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
