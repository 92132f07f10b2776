"""With DP attention a rank takes its own rows out of all ranks' and leaves none of them behind.

SGLang's own ``_get_local_slice`` runs here. That ranks' rows really lie as these layouts say is
what ``tests/engine`` asks of a real engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, Forwards, started_publisher

import shmroute
from sglang_bridge.gather_host import HostGatherer
from sglang_bridge.table import RouteTable
from shmroute import RouteLayout

ROUTES = RouteLayout(16, 2, range(3))
LOCATIONS, BUFFER_ROWS = 64, 40


class Layout(NamedTuple):
    """How a forward of two ranks lies in the capture buffer.

    ``tokens`` of each rank; ``lengths`` as SGLang leaves them in the batch; the ``batch`` of the
    decode graph that ran, if one did; where each rank's rows begin, and where all of them end.
    """

    tokens: tuple[int, int]
    lengths: tuple[int, int]
    batch: int | None
    begin: tuple[int, int]
    end: int


LAYOUTS = {
    "eager, each its own length": Layout((3, 5), (3, 5), None, (0, 3), 8),
    "eager, multiples of two attention-TP ranks": Layout((3, 5), (4, 6), None, (0, 4), 10),
    "eager, all the longest": Layout((3, 5), (5, 5), None, (0, 5), 10),
    "eager, the first has nothing": Layout((0, 5), (0, 5), None, (0, 0), 5),
    "eager, the second has nothing": Layout((5, 0), (5, 5), None, (0, 5), 10),
    "decode graph": Layout((3, 5), (3, 5), 8, (0, 8), 16),
    "decode graph, the first has nothing": Layout((0, 5), (0, 5), 8, (0, 8), 16),
    "decode graph, the second has nothing": Layout((5, 0), (5, 0), 8, (0, 8), 16),
}


class Rank:
    """One rank's capturer, its buffer with the routes of both ranks' tokens in it."""

    def __init__(self, arena: shmroute.Arena) -> None:
        from capturers import WithoutModel

        self.table = RouteTable(ROUTES, LOCATIONS, "cpu", vocabulary=VOCABULARY)
        publisher = started_publisher(arena, HostGatherer(self.table))
        self.forwards = Forwards(self.table)
        self.capturer = WithoutModel(publisher, self.table)
        self.capturer._shares_buffer = True
        self.capturer.topk_size = ROUTES.top_k
        # Of an earlier, larger forward that nobody took care of.
        self.buffer = torch.full((BUFFER_ROWS, *ROUTES.row_shape), 9, dtype=torch.int32)
        self.capturer.device_cache = SimpleNamespace(buffer=self.buffer)

    def forward(self, layout: Layout, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Run one forward as rank ``number``; its routes of all ranks, and where ours were put."""
        from capturers import Batch
        from sglang.srt.runtime_context import get_flags, get_parallel

        count = layout.tokens[number]
        batch: Any = Batch(self.forwards.token_ids(count), self.forwards.locations(count))
        where = batch.out_cache_loc.numpy()
        with (
            get_flags().dp.override(enabled=True),
            get_parallel().override(attn_dp_size=2, attn_dp_rank=number),
        ):
            self.capturer.on_forward_begin(batch)
            # SGLang pads and does not take it back.
            batch.out_cache_loc = torch.cat(
                (batch.out_cache_loc, torch.zeros(3, dtype=torch.int64))
            )
            batch.global_num_tokens_cpu = list(layout.lengths)
            captured = self.forwards.routes(layout.end)
            self.buffer[: layout.end] = torch.from_numpy(captured)
            self.capturer.on_forward_end(batch, layout.batch is not None, layout.batch)
        return captured, where


@pytest.fixture
def rank(sglang: SimpleNamespace, arena_name: str) -> Iterator[Rank]:
    made = Rank(shmroute.Arena.create(arena_name, ROUTES, capacity="1MiB", slots=8))
    yield made
    made.capturer.destroy()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_rank_s_rows_are_those_of_its_own_tokens(rank: Rank, layout: Layout, number: int) -> None:
    captured, where = rank.forward(layout, number)
    begin, count = layout.begin[number], layout.tokens[number]
    rows = rank.table.rows[where].view(-1, *ROUTES.row_shape)
    np.testing.assert_array_equal(rows, captured[begin : begin + count])
    assert (rank.table.tags[where] >= 0).all()
    assert int((rank.table.tags >= 0).sum()) == count  # SGLang's padding at location 0 is no row


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_rank_s_routes_are_left_in_the_buffer(rank: Rank, layout: Layout, number: int) -> None:
    """The next forward's rows lie elsewhere: a layer that does not capture would show these."""
    rank.forward(layout, number)
    assert (rank.buffer[: layout.end] == -1).all()
    # More is not touched: that would cost each decode step what the largest prefill costs.
    assert (rank.buffer[layout.end :] == 9).all()
