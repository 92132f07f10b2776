"""Routes of captured decode steps: read by address at the end, whatever the pool does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytestmark = pytest.mark.gpu

LAYERS, TOKENS, TOP_K = (1, 2, 3, 5, 6), 24, 8
DEVICE = "cuda"


class Model:
    """Layers that choose experts by their input, whose memory the pool would use again."""

    def __init__(self) -> None:
        from sglang_bridge.decode_graphs import DecodeGraphs

        self.buffer = torch.full((64, 7, TOP_K), -1, dtype=torch.int32, device=DEVICE)
        self.graphs = DecodeGraphs(self.buffer, LAYERS, torch.cuda.is_current_stream_capturing)
        self.pool = torch.cuda.graph_pool_handle()
        self.kept: list[bool] = []

    def choices(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        scores = (hidden * (layer + 1)).sin()
        return scores.topk(TOP_K, dim=-1).indices.to(torch.int32)

    def step(self, hidden: torch.Tensor) -> None:
        for layer in LAYERS:
            ids = self.choices(hidden, layer)
            self.kept.append(self.graphs.keep(layer, ids))
            hidden = hidden + ids.sum(-1, keepdim=True) * 1e-3
            del ids
            # What comes next in the pool: of the same size, and full of something else.
            torch.full((len(hidden), TOP_K), 77, dtype=torch.int32, device=DEVICE)

    def capture(self, tokens: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        given = torch.zeros((tokens, 128), device=DEVICE)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(given)
        return graph, given

    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = []
        for layer in LAYERS:
            ids = self.choices(hidden, layer)
            hidden = hidden + ids.sum(-1, keepdim=True) * 1e-3
            rows.append(ids)
        return torch.stack(rows, dim=1)


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    made.step(torch.randn((4, 128), device=DEVICE))  # eager: nothing is kept
    assert not any(made.kept)
    made.kept.clear()
    yield made
    torch.cuda.synchronize()


def test_replays_write_the_routes_of_their_own_step(model: Model) -> None:
    graph, given = model.capture(TOKENS)
    assert all(model.kept)
    model.graphs.before_forward()
    for seed in range(5):
        given.copy_(torch.randn(given.shape, generator=torch.manual_seed(seed)))
        graph.replay()
        written = model.buffer[:TOKENS, list(LAYERS)]
        assert torch.equal(written, model.expected(given))
    assert (model.buffer[TOKENS:] == -1).all()
    assert (model.buffer[:, [0, 4]] == -1).all()


def test_graphs_of_one_pool_do_not_mix(model: Model) -> None:
    captured = [model.capture(tokens) for tokens in (TOKENS, 16, 8)]
    model.graphs.before_forward()
    for turn in range(6):
        graph, given = captured[turn % 3]
        given.copy_(torch.randn(given.shape, generator=torch.manual_seed(turn)))
        graph.replay()
        assert torch.equal(model.buffer[: len(given), list(LAYERS)], model.expected(given))


def test_a_replay_before_its_addresses_are_known_writes_nothing(model: Model) -> None:
    graph, _ = model.capture(TOKENS)
    graph.replay()
    torch.cuda.synchronize()
    assert (model.buffer == -1).all()
