"""A layer's routes reach the rows of the capture buffer that a forward has."""

from __future__ import annotations

import pytest
import torch

from sglang_bridge.layer_views import LayerViews

ROWS, LAYERS, TOP_K = 12, 3, 2


@pytest.fixture
def buffer() -> torch.Tensor:
    return torch.full((ROWS, LAYERS, TOP_K), -1, dtype=torch.int32)


def routes(count: int, columns: int = TOP_K) -> torch.Tensor:
    return torch.randint(0, 64, (LAYERS, count, columns), dtype=torch.int32)


def forward(views: LayerViews, ids: torch.Tensor) -> None:
    for layer in range(LAYERS):
        views.copy(layer, ids[layer])


@pytest.mark.parametrize(
    "lengths", [(5, 5), (5, 9, 5), (9, 5, 5), (ROWS, 1, ROWS), (0, 4, 0)], ids=str
)
def test_forwards_of_any_lengths_one_after_the_other_have_their_own_rows(
    buffer: torch.Tensor, lengths: tuple[int, ...]
) -> None:
    views = LayerViews(buffer)
    for count in lengths:
        buffer.fill_(-1)
        ids = routes(count)
        forward(views, ids)
        assert torch.equal(buffer[:count], ids.transpose(0, 1))
        assert (buffer[count:] == -1).all()


def test_it_says_how_many_rows_were_written(buffer: torch.Tensor) -> None:
    views = LayerViews(buffer)
    assert views.written == 0
    for count, most in ((5, 5), (9, 9), (2, 9)):
        views.copy(1, routes(count)[1])
        assert views.written == most
    views.written = 0
    views.copy(1, routes(2)[1])
    assert views.written == 2


def test_fused_shared_experts_are_left_out(buffer: torch.Tensor) -> None:
    ids = routes(4, TOP_K + 1)
    forward(LayerViews(buffer), ids)
    assert torch.equal(buffer[:4], ids[:, :, :TOP_K].transpose(0, 1))


def test_other_integers_than_the_buffer_s_are_converted(buffer: torch.Tensor) -> None:
    ids = routes(4)
    forward(LayerViews(buffer), ids.to(torch.int64))
    assert torch.equal(buffer[:4], ids.transpose(0, 1))


def test_a_layer_that_does_not_capture_keeps_what_it_had(buffer: torch.Tensor) -> None:
    views, ids = LayerViews(buffer), routes(4)
    for layer in (0, 2):
        views.copy(layer, ids[layer])
    assert (buffer[:, 1] == -1).all()


def test_what_a_compiler_traces_writes_to_the_rows_of_each_call(buffer: torch.Tensor) -> None:
    """A view that the trace had kept would be of the length that it was traced with."""
    views = LayerViews(buffer)
    compiled = torch.compile(views.copy, backend="eager", dynamic=True, fullgraph=True)
    for count in (3, 7, 3):
        buffer.fill_(-1)
        ids = routes(count)
        compiled(1, ids[1])
        assert torch.equal(buffer[:count, 1], ids[1])
        assert (buffer[count:] == -1).all()
    assert not views._views
