"""The GPU kernels do what the torch forms do, bit for bit.

Run by ``test_kernels`` in a process of its own, whose Triton interprets: the same source, one
program after another, no GPU. Compiled and on a GPU the kernels are tested in ``tests/gpu``.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, Forwards

from sglang_bridge import kernels
from sglang_bridge.decode_graphs import DecodeGraphs
from sglang_bridge.eager_forwards import EagerForwards
from sglang_bridge.layer_views import LayerViews
from sglang_bridge.table import RouteTable
from shmroute import RouteLayout


def fused_form(table: RouteTable, captured: torch.Tensor) -> kernels.Scatter:
    """The kernel for a table on the CPU, which by itself takes the torch form."""
    return kernels.Scatter(
        table.rows,
        table.tags,
        torch.tensor(table.routes.layer_ids),
        strides=captured.stride()[:2],
        num_experts=table.routes.num_experts,
        top_k=table.routes.top_k,
        vocabulary=VOCABULARY,
    )


def test_the_scatter_kernel_is_the_torch_form() -> None:
    for experts, top_k, fused in ((8, 2, 0), (256, 8, 1), (257, 3, 0), (512, 10, 2)):
        routes = RouteLayout(experts, top_k, [1, 2, 4], num_layers=6)
        ours, reference = (RouteTable(routes, 99, "cpu", vocabulary=VOCABULARY) for _ in range(2))
        forwards = Forwards(ours, seed=experts)
        tokens = 12
        buffer = torch.full((tokens + 4, 6, top_k + fused), -1, dtype=torch.int32)
        view = buffer[4:, :, :top_k]
        view.copy_(torch.from_numpy(forwards.routes(tokens)))
        view[2, 4, 1] = view[2, 4, 0]  # twice
        view[3, 1, 0] = -1  # never captured
        view[4, 2, 1] = experts  # too large
        view[5, 3, 0] = -1  # a dense layer
        before = buffer.clone()
        ids = forwards.token_ids(tokens)
        ids[7], ids[8] = VOCABULARY + 5, -3  # images
        locations = torch.from_numpy(forwards.locations(tokens))
        positions = torch.arange(7, 7 + tokens)
        where = locations.to(torch.int32) if fused else locations
        fused_form(ours, view)(view, where, torch.from_numpy(ids), positions, 5)
        reference.scatter_with_torch(
            before[4:, :, :top_k], locations, torch.from_numpy(ids), positions, 5
        )
        np.testing.assert_array_equal(ours.tags.numpy(), reference.tags.numpy())
        good = reference.tags >= 0
        assert int(good.sum()) == tokens - 3
        np.testing.assert_array_equal(ours.rows[good].numpy(), reference.rows[good].numpy())
        moe = list(routes.layer_ids)
        assert (view[:, moe] == -1).all()
        untouched = before.clone()
        untouched[4:, moe, :top_k] = -1
        assert (buffer[:4] == untouched[:4]).all()
        assert (buffer[..., top_k:] == untouched[..., top_k:]).all()


def test_a_location_outside_the_table_is_neither_written_nor_read() -> None:
    routes = RouteLayout(8, 2, range(3))
    table = RouteTable(routes, 10, "cpu", vocabulary=VOCABULARY)
    forwards = Forwards(table)
    captured = torch.from_numpy(forwards.routes(4))
    beyond = torch.tensor([3, 10, -1, 1 << 40])
    fused_form(table, captured)(captured, beyond, torch.arange(4), torch.arange(4), 0)
    assert (table.tags >= 0).nonzero().flatten().tolist() == [3]
    wanted = torch.tensor([3, 10, -1], dtype=torch.int32)
    none = torch.zeros((1, 4), dtype=torch.int64)
    staging = torch.zeros(9, dtype=table.words.dtype)
    tags = torch.zeros(3, dtype=torch.int64)
    kernels.Gather(table.words, table.tags)((wanted.data_ptr(), 3, 0, 0), none, tags, 1, 3, staging)
    assert tags.tolist() == [int(table.tags[3]), -1, -1]


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_the_gather_kernel_takes_several_pieces_to_their_places(top_k: int) -> None:
    routes = RouteLayout(256, top_k, range(5))
    table = RouteTable(routes, 300, "cpu", vocabulary=VOCABULARY)
    table.rows.copy_(torch.randint(0, 256, table.rows.shape, dtype=torch.uint8))
    table.tags.copy_(torch.arange(300) * 7)
    lengths, places = (70, 1, 33), (5, 3000, 1100)
    words = table.words.shape[1]
    staging = torch.full((4096 * words,), 0, dtype=table.words.dtype)
    tags = torch.zeros(200, dtype=torch.int64)
    locations = [torch.randperm(300)[:n].to(torch.int32) for n in lengths]
    firsts = (0, 70, 71)
    each = [
        (where.data_ptr(), n, place, first)
        for where, n, place, first in zip(locations, lengths, places, firsts, strict=True)
    ]
    pieces = torch.tensor(each)
    pieces[0] = -1  # which nobody reads
    kernels.Gather(table.words, table.tags)(each[0], pieces, tags, 3, max(lengths), staging)
    for where, n, place, first in zip(locations, lengths, places, firsts, strict=True):
        got = staging[place : place + n * words].view(n, words)
        assert (got == table.words[where.long()]).all()
        assert (tags[first : first + n] == table.tags[where.long()]).all()


ROUTES = RouteLayout(9, 3, [1, 2, 4], num_layers=6)


class Runner:
    """Stands for SGLang's, by which graphs are told from those of an earlier one."""


class Routers:
    """Forwards of a model with three MoE layers, and a table on the CPU that they go to."""

    def __init__(self, columns: int = 3) -> None:
        self.table = RouteTable(ROUTES, 50, "cpu", vocabulary=VOCABULARY)
        self.buffer = torch.full((40, 6, columns), -1, dtype=torch.int32)
        self.forwards = Forwards(self.table)

    def batch(self, tokens: int) -> SimpleNamespace:
        return SimpleNamespace(
            input_ids=torch.from_numpy(self.forwards.token_ids(tokens)),
            positions=torch.arange(3, 3 + tokens),
            out_cache_loc=torch.from_numpy(self.forwards.locations(tokens)),
        )

    def layers(self, tokens: int) -> dict[int, torch.Tensor]:
        """Each MoE layer's ids, with a shared expert in columns behind the routes."""
        routes = torch.from_numpy(self.forwards.routes(tokens))
        extra = self.buffer.shape[2] - ROUTES.top_k
        shared = torch.full((tokens, extra), ROUTES.num_experts, dtype=torch.int32)
        return {layer: torch.cat((routes[:, layer], shared), dim=1) for layer in ROUTES.layer_ids}

    def layers_in_one_memory(self, tokens: int) -> dict[int, torch.Tensor]:
        """The same; the last row of one layer's is the first of the next one's."""
        layers = self.layers(tokens)
        both = torch.cat((layers[1], layers[2]))
        layers[1], layers[2] = both[:tokens], both[tokens - 1 : 2 * tokens - 1]
        return layers

    def check(self, batch: SimpleNamespace, layers: Mapping[int, torch.Tensor], epoch: int) -> None:
        """The table holds what the torch form would have put there."""
        tokens = len(batch.input_ids)
        reference = RouteTable(ROUTES, 50, "cpu", vocabulary=VOCABULARY)
        captured = torch.full((tokens, 6, ROUTES.top_k), -1, dtype=torch.int32)
        for layer, ids in layers.items():
            captured[:, layer] = ids[:tokens, : ROUTES.top_k]
        reference.scatter_with_torch(
            captured, batch.out_cache_loc, batch.input_ids, batch.positions, epoch
        )
        where = batch.out_cache_loc
        assert (reference.tags[where] >= 0).all()
        np.testing.assert_array_equal(self.table.tags[where], reference.tags[where])
        np.testing.assert_array_equal(self.table.rows[where], reference.rows[where])


class Captured(Routers):
    """Decode graphs that "are captured" while ``on``; interpreted, a launch runs at once."""

    def __init__(self, columns: int = 3) -> None:
        super().__init__(columns)
        self.on, self.runner = True, Runner()
        self.graphs = DecodeGraphs(self.table, self.buffer, lambda: self.on)

    def run(self, batch: SimpleNamespace, layers: dict[int, torch.Tensor]) -> list[bool]:
        """A forward: to warm up, or into a capture."""
        kept = [self.graphs.keep(layer, ids) for layer, ids in layers.items()]
        self.graphs.end_capture(self.runner, None, batch, len(batch.input_ids))
        return kept

    def capture(self, batch: SimpleNamespace, layers: dict[int, torch.Tensor]) -> list[bool]:
        self.on = False
        assert not any(self.run(batch, layers))
        self.on = True
        return self.run(batch, layers)

    def replay(self, graph: int, batch: SimpleNamespace, epoch: int = 0) -> None:
        self.graphs.before_forward(epoch)
        given = batch.out_cache_loc, batch.input_ids, batch.positions
        self.graphs._scatter(self.graphs._addresses[graph], self.graphs._state, *given)


@pytest.mark.parametrize("columns", [3, 4])
def test_a_graph_stores_its_layers_once_their_addresses_are_there(columns: int) -> None:
    made = Captured(columns)
    batch, layers = made.batch(20), made.layers(20)
    assert made.capture(batch, layers) == [True] * 3
    assert (made.table.tags < 0).all(), "no address is known yet, so nothing was read"
    assert made.graphs.has_stored(20)
    assert not made.graphs.has_stored(8)
    assert not made.graphs.has_stored(None)
    made.replay(0, batch, epoch=5)
    made.check(batch, layers, 5)
    assert int((made.table.tags >= 0).sum()) == 20
    assert (made.buffer == -1).all(), "the capture buffer is left alone"


def test_a_graph_sees_a_new_epoch_and_a_table_that_has_moved() -> None:
    made = Captured()
    batch, layers = made.batch(6), made.layers(6)
    made.capture(batch, layers)
    made.replay(0, batch, epoch=1)
    made.table.give_back()
    made.replay(0, batch, epoch=1)  # to no address: nothing is written
    elsewhere = made.table.rows, made.table.tags
    made.table.take_again()
    made.table.rows, made.table.tags = (part.clone() for part in elsewhere)
    made.replay(0, batch, epoch=(1 << 17) + 2)
    made.check(batch, layers, 2)


def test_a_graph_with_a_layer_of_another_form_leaves_its_routes_in_the_buffer() -> None:
    made = Captured()
    batch, layers = made.batch(20), made.layers(20)
    given = {**layers, 2: layers[2].to(torch.int64), 3: layers[4]}
    assert made.capture(batch, given) == [True, False, True, False]
    assert not made.graphs.has_stored(20)
    for layer in (1, 4):
        np.testing.assert_array_equal(made.buffer[:20, layer], layers[layer])
    assert (made.buffer[:, [0, 2, 3, 5]] == -1).all(), "who was refused copies by itself"
    made.graphs.before_forward(0)
    assert (made.table.tags < 0).all()


def test_two_graphs_for_as_many_tokens_must_both_store() -> None:
    made = Captured()
    batch, layers = made.batch(4), made.layers(4)
    made.capture(batch, layers)
    made.capture(batch, layers)
    with pytest.raises(RuntimeError, match="two decode graphs for 4 tokens"):
        made.capture(batch, {1: layers[1], 2: layers[2]})


def test_layers_that_share_memory_end_the_capture() -> None:
    made = Captured()
    batch, layers = made.batch(6), made.layers_in_one_memory(6)
    with pytest.raises(RuntimeError, match="write to the same memory"):
        made.capture(batch, layers)


@pytest.mark.parametrize("what", ["length", "inputs"])
def test_a_graph_that_cannot_be_trusted_leaves_its_routes_in_the_buffer(what: str) -> None:
    """Locations are not one a token, inputs are not where they were."""
    made = Captured()
    batch, layers = made.batch(6), made.layers(6)
    if what == "length":
        batch.out_cache_loc = batch.out_cache_loc[:5]
    made.on = False
    made.run(batch, layers)
    if what == "inputs":
        batch.positions = batch.positions.clone()
    made.on = True
    assert made.run(batch, layers) == [True] * 3
    assert not made.graphs.has_stored(6)
    for layer, ids in layers.items():
        np.testing.assert_array_equal(made.buffer[:6, layer], ids)


def test_graphs_that_are_captured_again_replace_all_that_there_were() -> None:
    """As after an update of weights; in the end there is room for no more."""
    made = Captured()
    for turn in range(3):
        made.runner = Runner()
        batch, layers = made.batch(5), made.layers(5)
        made.capture(batch, layers)
        assert made.graphs._graphs == 1
        assert made.graphs.before_forward(0)
        assert not made.graphs.before_forward(0)
        made.replay(0, batch, epoch=turn)
        made.check(batch, layers, turn)
    made.runner = Runner()
    made.on = False
    made.run(batch, layers)
    assert not made.graphs.has_stored(5)
    assert (made.graphs._addresses == 0).all(), "a replay of the old ones would read nothing"


def test_a_capture_that_was_given_up_leaves_nothing_to_the_next() -> None:
    made = Captured()
    batch, layers = made.batch(5), made.layers(5)
    made.graphs.keep(1, made.layers(5)[1])
    made.graphs.keep(2, made.layers(5)[2])
    made.capture(batch, layers)
    made.replay(0, batch)
    made.check(batch, layers, 0)


def test_nothing_is_kept_or_stored_while_a_forward_warms_up() -> None:
    made = Captured()
    batch, layers = made.batch(5), made.layers(5)
    made.on = False
    made.graphs.before_forward(0)
    assert made.run(batch, layers) == [False] * 3
    assert not made.graphs.has_stored(5)
    assert (made.table.tags < 0).all()


def test_a_graph_for_more_requests_than_there_are_writes_beside_them_at_location_0_only() -> None:
    made = Captured()
    batch, layers = made.batch(8), made.layers(8)
    batch.out_cache_loc[:3] = torch.tensor([7, 8, 9])
    made.capture(batch, layers)
    batch.out_cache_loc[3:], batch.positions[3:] = 0, 0
    made.replay(0, batch)
    assert (made.table.tags >= 0).nonzero().flatten().tolist() == [0, 7, 8, 9]
    first = SimpleNamespace(**{name: value[:3] for name, value in vars(batch).items()})
    made.check(first, {layer: ids[:3] for layer, ids in layers.items()}, 0)


class Eager(Routers):
    """Forwards outside any graph; the stream "is captured" while ``on``."""

    def __init__(self, columns: int = 3) -> None:
        super().__init__(columns)
        self.on, self.stream = False, 7
        self.views = LayerViews(self.buffer[:, :, : ROUTES.top_k])
        streams = {"capturing": lambda: self.on, "stream": lambda _: self.stream}
        self.eager = EagerForwards(self.table, columns, self.views, **streams)

    def capture(self, layers: Mapping[int, torch.Tensor]) -> list[bool]:
        """What the capturer does at each layer; whether it was kept."""
        kept = [self.eager.keep(layer, ids) for layer, ids in layers.items()]
        for (layer, ids), one in zip(layers.items(), kept, strict=True):
            if not one:
                self.views.copy(layer, ids)
        return kept

    def store(self, batch: SimpleNamespace, epoch: int = 0) -> bool:
        given = batch.out_cache_loc, batch.input_ids, batch.positions
        return self.eager.store(*given, epoch)

    def forward(
        self, batch: SimpleNamespace, layers: Mapping[int, torch.Tensor], epoch: int = 0
    ) -> bool:
        self.eager.begin()
        self.capture(layers)
        return self.store(batch, epoch)

    def check_buffer(self, layers: Mapping[int, torch.Tensor], tokens: int) -> None:
        """The capture buffer holds these layers, and none of the others."""
        expected = torch.full_like(self.buffer, -1)
        for layer, ids in layers.items():
            expected[:tokens, layer, : ROUTES.top_k] = ids[:, : ROUTES.top_k]
        np.testing.assert_array_equal(self.buffer, expected)


@pytest.mark.parametrize("columns", [3, 4])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_forward_s_routes_are_stored_without_the_capture_buffer(
    columns: int, padding: int
) -> None:
    made = Eager(columns)
    made.eager.compile()
    assert (made.table.tags < 0).all()
    for epoch in (0, 1, (1 << 17) + 2):
        batch, layers = made.batch(20), made.layers(20 + padding)
        assert made.forward(batch, layers, epoch)
        made.check(batch, layers, epoch)
    made.check_buffer({}, 0)


def test_it_finds_a_table_that_has_moved() -> None:
    made = Eager()
    made.forward(made.batch(6), made.layers(6))
    made.table.rows, made.table.tags = made.table.rows.clone(), made.table.tags.clone()
    batch, layers = made.batch(6), made.layers(6)
    assert made.forward(batch, layers)
    made.check(batch, layers, 0)


def test_nothing_of_a_forward_is_referenced_when_it_is_stored() -> None:
    """Its memory serves the next one."""
    made = Eager()
    for turn in range(2):
        batch, layers = made.batch(6), made.layers(6 if turn else 5)
        left = [weakref.ref(ids) for ids in layers.values()]
        assert made.forward(batch, layers) == bool(turn)
        del layers
        assert [one() for one in left] == [None] * 3


@pytest.mark.parametrize("wrong", ["integers", "columns", "strides"])
def test_a_forward_with_a_layer_of_another_form_goes_through_the_buffer(wrong: str) -> None:
    made = Eager()
    layers = made.layers(20)
    ids = layers[2]
    layers[2] = {
        "integers": ids.to(torch.int64),
        "columns": torch.cat((ids, ids), dim=1),
        "strides": ids.t().contiguous().t(),
    }[wrong]
    made.eager.begin()
    assert made.capture(layers) == [True, False, False]
    assert not made.store(made.batch(20))
    made.check_buffer(layers, 20)
    assert (made.table.tags < 0).all()


def test_layers_inside_a_graph_bring_the_others_into_the_buffer() -> None:
    made = Eager()
    layers = made.layers(20)
    made.eager.begin()
    made.capture({1: layers[1]})
    made.on = True
    assert not made.eager.keep(2, layers[2])
    made.on = False
    assert made.capture({4: layers[4]}) == [False]
    assert not made.store(made.batch(20))
    made.check_buffer({1: layers[1], 4: layers[4]}, 20)


@pytest.mark.parametrize("what", ["absent", "short"])
def test_a_layer_that_does_not_capture_enough_is_missing(what: str) -> None:
    made = Eager()
    layers = made.layers(20)
    if what == "absent":
        del layers[2]
    else:
        layers[2] = layers[2][:19]
    made.eager.begin()
    assert all(made.capture(layers))
    assert not made.store(made.batch(20))
    for layer in (1, 2, 4):
        there = int((made.buffer[:, layer] >= 0).all(dim=-1).sum())
        assert there == (20 if layer != 2 else 19 if what == "short" else 0)


def test_a_forward_longer_than_is_kept_goes_through_the_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sglang_bridge.eager_forwards._BYTES_MAX", 20 * 3 * 3 * 4)
    made = Eager()
    layers = made.layers(21)
    assert not made.forward(made.batch(21), layers)
    made.check_buffer(layers, 21)
    assert made.forward(made.batch(20), made.layers(20))


def test_a_router_that_reuses_its_memory_costs_one_forward_s_routes() -> None:
    """Whatever the buffer holds: an error has its rows declared missing (``test_capturer``)."""
    made = Eager()
    batch, layers = made.batch(6), made.layers_in_one_memory(6)
    with pytest.raises(RuntimeError, match="write to the same memory"):
        made.forward(batch, layers)
    assert (made.table.tags < 0).all()
    made.eager.begin()
    assert made.capture(layers) == [False] * 3
    assert not made.store(batch)
    made.check_buffer(layers, 6)


@pytest.mark.parametrize("how", ["strides", "later"])
def test_so_does_one_whose_output_is_kept_in_one_layer_only(how: str) -> None:
    made = Eager()
    batch, layers = made.batch(6), made.layers(6)
    memory = layers[1]
    if how == "strides":
        layers[2] = memory.as_strided((6, 3), (1, 6), 0).copy_(layers[2])
    else:
        layers[2], layers[4] = layers[2].to(torch.int64), memory.copy_(layers[4])
    with pytest.raises(RuntimeError, match="write to the same memory"):
        made.forward(batch, layers)
    apart = made.layers(6)
    apart[2] = apart[2].to(torch.int64)
    made = Eager()
    assert not made.forward(batch, apart)
    made.check_buffer(apart, 6)


@pytest.mark.parametrize("then", ["integers", "captured"])
def test_of_a_layer_that_captures_twice_the_latest_counts(then: str) -> None:
    made = Eager()
    earlier, layers = made.layers(6), made.layers(6)
    made.eager.begin()
    made.capture(earlier)
    made.on = then == "captured"
    given = {layer: ids.to(torch.int64) for layer, ids in layers.items()}
    assert made.capture(given if then == "integers" else layers) == [False] * 3
    assert not made.store(made.batch(6))
    made.check_buffer(layers, 6)
    made.on = False
    made.buffer.fill_(-1)
    made.eager.begin()
    made.capture(earlier)
    made.capture(layers)
    batch = made.batch(6)
    assert made.store(batch)
    made.check(batch, layers, 0)


def test_layers_on_a_stream_beside_the_forward_s_are_copied_there() -> None:
    """Their memory is given away in the order of that stream, which the kernel is not in."""
    made = Eager()
    layers = made.layers(6)
    made.eager.begin()
    made.stream = 8
    assert made.capture(layers) == [False] * 3
    made.stream = 7
    assert not made.store(made.batch(6))
    made.check_buffer(layers, 6)
    made.stream = 8
    assert made.forward(made.batch(6), made.layers(6)), "it is the forward's own now"


def test_a_table_without_tags_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in host memory that was given back keeps its rows' memory."""
    made = Eager()
    rows = made.table.rows.clone()
    monkeypatch.setattr(made.table, "state", lambda _: (made.table.rows.data_ptr(), 0, 0))
    assert made.forward(made.batch(6), made.layers(6))
    np.testing.assert_array_equal(made.table.rows, rows)


def test_a_forward_that_ended_early_leaves_nothing_to_the_next() -> None:
    made = Eager()
    made.eager.begin()
    made.capture({1: made.layers(6)[1], 2: made.layers(6)[2].to(torch.int64)})
    made.buffer.fill_(-1)
    batch, layers = made.batch(6), made.layers(6)
    assert made.forward(batch, layers)
    made.check(batch, layers, 0)
    made.eager.begin()
    made.capture({1: made.layers(6)[1]})
    assert not made.forward(batch, {2: layers[2], 4: layers[4]})
    made.check_buffer({2: layers[2], 4: layers[4]}, 6)


def test_other_layers_than_the_table_s_are_none_of_its() -> None:
    made = Eager()
    made.eager.begin()
    assert not made.eager.keep(3, made.layers(6)[1])
    batch, layers = made.batch(6), made.layers(6)
    assert all(made.capture(layers))
    assert made.store(batch)


def test_the_kernel_waits_for_the_gathers_that_were_asked_for() -> None:
    made = Eager()
    tags_at_fence: list[int] = []
    made.table.fence = lambda: tags_at_fence.append(int((made.table.tags >= 0).sum()))
    assert made.forward(made.batch(6), made.layers(6))
    assert tags_at_fence == [0]
