"""The GPU kernels do what the torch forms do, bit for bit.

Run by ``test_kernels`` in a process of its own, whose Triton interprets: the same source, one
program after another, no GPU. Compiled and on a GPU the kernels are tested in ``tests/gpu``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, Forwards

from sglang_bridge import kernels
from sglang_bridge.decode_graphs import DecodeGraphs
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
    pieces = torch.tensor([[wanted.data_ptr(), 3, 0, 0]])
    staging = torch.zeros(9, dtype=table.words.dtype)
    tags = torch.zeros(3, dtype=torch.int64)
    kernels.Gather(table.words, table.tags)(pieces, 1, 3, staging, tags)
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
    pieces = torch.tensor(
        [
            [where.data_ptr(), n, place, first]
            for where, n, place, first in zip(locations, lengths, places, firsts, strict=True)
        ]
    )
    kernels.Gather(table.words, table.tags)(pieces, 3, max(lengths), staging, tags)
    for where, n, place, first in zip(locations, lengths, places, firsts, strict=True):
        got = staging[place : place + n * words].view(n, words)
        assert (got == table.words[where.long()]).all()
        assert (tags[first : first + n] == table.tags[where.long()]).all()


def test_layers_that_were_kept_are_written_once_their_addresses_are_there() -> None:
    buffer = torch.full((50, 6, 3), -1, dtype=torch.int32)
    graphs = DecodeGraphs(buffer, [1, 2, 4], lambda: True)
    layers = {
        layer: torch.randint(0, 9, (40, 3), dtype=torch.int32, generator=torch.manual_seed(layer))
        for layer in (1, 2, 4)
    }
    assert graphs.keep(1, layers[1])
    assert not graphs.keep(2, layers[2].to(torch.int64)), "of another type: copied at once"
    assert not graphs.keep(3, layers[2]), "no MoE layer"
    assert graphs.keep(4, layers[4])
    assert (buffer == -1).all(), "no address is known yet, so nothing was read"

    graphs.before_forward()
    graphs._write(graphs._addresses[0], 40)  # what a replay does
    for layer in (1, 4):
        np.testing.assert_array_equal(buffer[:40, layer], layers[layer])
    assert (buffer[:, [0, 2, 3, 5]] == -1).all()
    assert (buffer[40:] == -1).all()


def test_a_capture_that_was_given_up_leaves_nothing_to_the_next() -> None:
    buffer = torch.full((4, 2, 2), -1, dtype=torch.int32)
    graphs = DecodeGraphs(buffer, [0, 1], lambda: True)
    given_up, first, last = (torch.full((3, 2), value, dtype=torch.int32) for value in (5, 6, 7))
    assert graphs.keep(0, given_up)
    assert graphs.keep(0, first)
    assert graphs.keep(1, last)
    graphs.before_forward()
    graphs._write(graphs._addresses[0], 3)
    assert buffer[:3, 0].eq(6).all()
    assert buffer[:3, 1].eq(7).all()
