"""What a record says beside its rows survives packing, and garbage is a ValueError."""

from __future__ import annotations

from itertools import pairwise

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmroute import RouteLayout
from shmroute.layout import plan_extent
from shmroute.metadata import Metadata, WeightRun, merge_ranges, ranges_of, weight_runs

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
MASKS = st.lists(st.booleans(), min_size=1, max_size=300)


@given(rid=TEXT, mask=MASKS, runs=st.lists(st.tuples(st.integers(0, 5000), TEXT), max_size=9))
def test_metadata_survives_packing(rid, mask, runs):
    tokens = len(mask)
    versions = tuple(
        WeightRun(index % tokens, epoch, label) for index, (epoch, label) in enumerate(runs)
    )
    metadata = Metadata(rid, ranges_of(mask), versions)
    assert metadata.missing_rows == sum(mask)
    for packed in (metadata.pack(), metadata.pack(tokens)):
        assert Metadata.unpack(packed, tokens) == metadata


@given(mask=st.lists(st.booleans(), min_size=1, max_size=3000))
def test_any_missing_rows_fit_the_room_of_their_extent(mask):
    routes = RouteLayout(256, 1, [0])
    metadata = Metadata("x" * 64, ranges_of(mask), (WeightRun(0, 1, "epoch-1"),))
    plan = plan_extent(routes.row_bytes, 64, len(mask))
    assert len(metadata.pack(len(mask))) <= plan.metadata_capacity


@given(st.binary(max_size=100), st.integers(0, 100))
def test_garbage_is_a_value_error(garbage, tokens):
    try:
        Metadata.unpack(garbage, tokens)
    except ValueError:
        return


LISTS = st.one_of(st.none(), st.floats(), st.integers(-9, 99), st.lists(st.none()))
JUNK = st.one_of(
    st.none(),
    st.floats(),
    st.integers(-9, 1 << 62),
    TEXT,
    st.binary(max_size=9),
    st.lists(LISTS, max_size=4),
)


@given(rid=JUNK, missing=JUNK, versions=JUNK)
def test_junk_in_a_field_is_a_value_error_or_within_the_record(rid, missing, versions):
    try:
        metadata = Metadata.unpack(msgpack.packb([rid, missing, versions]), 50)
    except ValueError:
        return
    assert all(0 <= first <= end <= 50 for first, end in metadata.missing)


@pytest.mark.parametrize("missing", [[3, 2], [0, 51], [-1, 2], [1], [5, 9, 7, 12], b"\xff", "ab"])
def test_rows_that_the_record_does_not_have_are_refused(missing):
    with pytest.raises(ValueError, match=r"missing rows|bitmap|invalid literal"):
        Metadata.unpack(msgpack.packb(["r", missing, []]), 50)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=8))
def test_merged_ranges_cover_the_same_rows_and_do_not_touch(spans):
    merged = merge_ranges(spans)
    rows = {row for first, end in spans for row in range(first, end)}
    assert {row for first, end in merged for row in range(first, end)} == rows
    assert all(a[1] < b[0] for a, b in pairwise(merged))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_weight_runs_cover_every_row_with_its_epoch(epochs):
    runs = weight_runs(np.array(epochs, np.int64), lambda epoch: f"epoch-{epoch}")
    ends = [run.first for run in runs[1:]] + [len(epochs)]
    again = [run.epoch for run, end in zip(runs, ends, strict=True) for _ in range(run.first, end)]
    assert again == epochs
    assert all(a.epoch != b.epoch for a, b in pairwise(runs))
