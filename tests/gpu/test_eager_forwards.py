"""Forwards outside any graph store their routes, however far ahead of the GPU they are launched."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from router_model import LOCATIONS, ROUTES, RouterModel

pytestmark = pytest.mark.gpu

# Of the GPU's clock: 0.2 s or so, longer than it takes to launch what is behind it.
_CYCLES = 400_000_000


class Model(RouterModel):
    """Its forwards are not captured."""

    def __init__(self, in_host_memory: bool = False) -> None:
        from sglang_bridge.eager_forwards import EagerForwards
        from sglang_bridge.layer_views import LayerViews

        super().__init__(in_host_memory)
        self.eager = EagerForwards(self.table, ROUTES.top_k, LayerViews(self.buffer))
        self.eager.compile()

    def forward(self, given: SimpleNamespace, epoch: int) -> bool:
        self.eager.begin()
        kept = self.route(given.hidden, self.eager.keep)
        inputs = given.out_cache_loc, given.input_ids, given.positions
        return all(kept) and self.eager.store(*inputs, epoch)


def launched_ahead(model: Model, forwards: Sequence[SimpleNamespace], epoch: int) -> bool:
    """Launch forwards, each of an epoch of its own, while the GPU does something else; whether it
    still did when all were launched.
    """
    torch.cuda.synchronize()
    torch.cuda._sleep(_CYCLES)
    asleep = torch.cuda.Event()
    asleep.record()
    for number, given in enumerate(forwards):
        assert model.forward(given, epoch + number)
    ahead = not asleep.query()
    torch.cuda.synchronize()
    return ahead


@pytest.mark.parametrize("in_host_memory", [False, True], ids=["gpu table", "host table"])
def test_forwards_that_are_launched_ahead_each_store_their_own_routes(
    in_host_memory: bool,
) -> None:
    model = Model(in_host_memory)
    each, taken = [], 1
    for seed, tokens in enumerate((24, 24, 3, 50, 1, 24, 24, 24)):
        given = model.inputs(tokens)
        model.fill(given, seed)
        given.out_cache_loc.copy_(torch.arange(taken, taken + tokens))
        taken += tokens
        each.append(given)
    assert taken < LOCATIONS
    launched_ahead(model, each, 0)  # kernels are loaded, and memory is page-locked
    assert launched_ahead(model, each, 10), "something waited for the GPU"
    for number, given in enumerate(each):
        model.check(given, 10 + number)
    assert (model.buffer == -1).all()


@pytest.mark.parametrize("in_host_memory", [False, True], ids=["gpu table", "host table"])
def test_a_table_that_was_given_back_is_left_alone_and_found_again(in_host_memory: bool) -> None:
    model = Model(in_host_memory)
    given = model.inputs(24)
    model.fill(given, 1)
    model.table.give_back()
    torch.cuda.empty_cache()
    elsewhere = torch.full((LOCATIONS * 64,), 55, dtype=torch.uint8, device="cuda")
    assert model.forward(given, 0)
    torch.cuda.synchronize()
    assert (elsewhere == 55).all()
    model.table.take_again()
    assert model.forward(given, 1)
    model.check(given, 1)


def test_layers_on_a_stream_beside_the_forward_s_are_not_kept() -> None:
    """Torch gives their memory away in the order of that stream."""
    model = Model()
    given = model.inputs(24)
    model.eager.begin()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert not any(model.route(given.hidden, model.eager.keep))
    torch.cuda.synchronize()


def test_what_a_graph_is_made_of_is_not_kept() -> None:
    """Its tensors hold this forward's routes only when it is replayed."""
    model = Model()
    given = model.inputs(24)
    model.route(given.hidden, lambda *_: True)
    model.eager.begin()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert not any(model.route(given.hidden, model.eager.keep))
    assert not model.eager.store(given.out_cache_loc, given.input_ids, given.positions, 0)
