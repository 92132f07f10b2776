"""Ranges of rows that are not their record's are refused where they are read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from rollouts import NUM_LAYERS, TOP_K, rollout

from shmroute import ReplayError, release
from shmroute.replay import row_ranges
from shmroute.replay.row_ranges import RowRange
from shmroute.replay.travelling import TravellingRows

CPU = torch.device("cpu")
OUTSIDE = [(0, 40), (7, 8), (-1, 3), (5, 2), (-3, -1), (0, 1 << 60)]


def two_records(arena) -> tuple[bytes, bytes]:
    """Of 7 and 59 rows, one behind the other in the arena."""
    tickets = [rollout(arena, rid, [end]).tickets[0] for rid, end in (("a", 8), ("b", 60))]
    one, other = (row_ranges.rows_of(ticket, top_k=TOP_K)[0].ticket for ticket in tickets)
    return one, other


def read_placed(part: RowRange, to: int = 0, rows: int = 40, **chosen) -> torch.Tensor:
    return row_ranges.read_placed([(to, part)], rows=rows, device=CPU, **chosen)


def native(part: RowRange) -> object:
    return row_ranges.native([part], num_layers=NUM_LAYERS, top_k=TOP_K)


def one_layer(part: RowRange) -> object:
    return row_ranges.one_layer(part, 1)


@pytest.mark.parametrize("read", [read_placed, native, one_layer])
@pytest.mark.parametrize(("first", "end"), OUTSIDE)
def test_rows_that_a_record_does_not_have_are_refused(arena, read, first, end):
    ticket, _ = two_records(arena)
    part = pickle.loads(pickle.dumps(RowRange(ticket, first, end)))
    with pytest.raises(ReplayError, match=rf"rows \[{first}, {end}\) of rid 'a-0'.*\[0, 7\)"):
        read(part)


@pytest.mark.parametrize("to", [-1, 34, 1 << 60])
def test_a_place_outside_the_tensor_is_refused(arena, to):
    ticket, _ = two_records(arena)
    with pytest.raises(ReplayError, match=f"7 rows at row {to} of a tensor of 40"):
        read_placed(RowRange(ticket, 0, 7), to=to)


def test_a_range_of_some_rows_is_read_to_its_place(arena):
    ticket, other = two_records(arena)
    parts = [(0, RowRange(other, 50, 59)), (33, RowRange(ticket, 0, 7))]
    read = row_ranges.read_placed(parts, rows=40, device=CPU)
    for to, part in parts:
        assert (read[to : to + part.rows].numpy() == native(part)[:, [1, 2, 4]]).all()


def test_another_top_k_is_named(arena):
    ticket, _ = two_records(arena)
    with pytest.raises(ReplayError, match="routes of top-4, the trainer replays top-2"):
        row_ranges.native([RowRange(ticket, 0, 7)], num_layers=NUM_LAYERS, top_k=2)


@pytest.mark.parametrize(
    "read",
    [
        lambda part: read_placed(RowRange(part.ticket, 0, 40)),
        lambda part: read_placed(part, to=34),
        lambda part: read_placed(part, layers=[3]),
        lambda part: read_placed(part, rows=1 << 56),
        lambda part: native(RowRange(part.ticket, 0, 40)),
        lambda part: row_ranges.native([part], num_layers=3, top_k=TOP_K),
        lambda part: one_layer(RowRange(part.ticket, 0, 40)),
    ],
    ids=["range", "place", "layers", "memory", "native", "few layers", "one layer"],
)
def test_an_error_that_is_kept_keeps_no_lease(arena, read):
    ticket, _ = two_records(arena)
    with pytest.raises((ReplayError, MemoryError)) as kept:
        read(RowRange(ticket, 0, 7))
    release([ticket])
    assert arena.writer.reclaim() == 1
    assert kept.value.__traceback__ is not None


@pytest.mark.skipif(np.__version__ < "2", reason="NumPy 1 does not ask")
def test_travelling_rows_are_an_array_by_numpys_contract(arena):
    ticket, _ = two_records(arena)
    rows = TravellingRows([RowRange(ticket, 0, 7)], NUM_LAYERS, TOP_K, row_ranges.native)
    for copy in (None, True):
        assert np.array_equal(np.array(rows, copy=copy), native(RowRange(ticket, 0, 7)))
    assert np.asarray(rows, dtype=np.int16).dtype == np.int16
    with pytest.raises(ValueError, match="only a copy"):
        np.array(rows, copy=False)
