"""What a record's tags say: which rows are missing, and whose weights computed the others."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, finished_request
from hypothesis import given
from hypothesis import strategies as st

from sglang_bridge.judge import Verdict, judge
from sglang_bridge.tags import (
    INVALID,
    are_all_right,
    epochs_of,
    expected_places,
    make_tags,
    wrong_rows,
)

IDS = np.arange(100, 112)


def tags_of(epochs: list[int], missing: tuple[int, ...] = (), start: int = 3) -> np.ndarray:
    """Tags of ``IDS`` at positions from ``start`` on, computed in these epochs."""
    tags = torch.full((len(IDS),), INVALID)
    for index, epoch in enumerate(epochs):
        here = slice(index, index + 1)
        positions = torch.arange(start, start + len(IDS))[here]
        tags[here] = make_tags(torch.from_numpy(IDS[here]), positions, epoch, VOCABULARY)
    tags[list(missing)] = INVALID
    return tags.numpy()


def verdict(tags: np.ndarray, epoch: int = 5, ids: np.ndarray = IDS) -> Verdict:
    nowhere = torch.empty(len(tags), dtype=torch.int64)
    request = finished_request("r", ids, nowhere, start=3)
    request.tokens = len(tags)
    return judge(request, tags, epoch, vocabulary=VOCABULARY, label="epoch-{}".format)


def test_rows_that_all_fit_are_complete_and_have_their_epochs_runs() -> None:
    found = verdict(tags_of([2] * 4 + [3] * 8))
    assert found.missing == ()
    assert found.missing_rows == 0
    assert found.versions == ((0, 2, "epoch-2"), (4, 3, "epoch-3"))


def test_missing_rows_are_ranges_and_are_said_with_rid_and_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, "shmroute"):
        found = verdict(tags_of([1] * 12, missing=(2, 3, 11)))
    assert found.missing == ((2, 4), (11, 12))
    assert found.missing_rows == 3
    assert "rid 'r' misses 3 of 12 rows" in caplog.text
    assert "first at token 5" in caplog.text


def test_a_missing_row_begins_no_run_of_its_own() -> None:
    found = verdict(tags_of([1] * 6 + [2] * 6, missing=(4, 5, 6)))
    assert found.versions == ((0, 1, "epoch-1"), (7, 2, "epoch-2"))


def test_missing_rows_at_the_front_belong_to_the_first_run_there_is() -> None:
    assert verdict(tags_of([4] * 12, missing=(0, 1))).versions == ((0, 4, "epoch-4"),)


def test_where_every_row_is_missing_the_run_is_the_epoch_of_the_request_s_end() -> None:
    found = verdict(tags_of([1] * 12, missing=tuple(range(12))))
    assert found.missing == ((0, 12),)
    assert found.versions == ((0, 5, "epoch-5"),)


def test_another_token_s_row_is_missing_whatever_its_epoch() -> None:
    ids = IDS.copy()
    ids[7] += 1
    assert verdict(tags_of([1] * 12), ids=ids).missing == ((7, 8),)


@given(st.data())
def test_the_short_check_agrees_with_the_long_one(data: st.DataObject) -> None:
    """Most records are right in every row and of one epoch, and are not looked at row by row."""
    count = data.draw(st.integers(1, 8))
    start = data.draw(st.integers(0, 5))
    tokens = st.integers(-1, VOCABULARY + 1)
    ids = np.array(data.draw(st.lists(tokens, min_size=count, max_size=count)), dtype=np.int64)
    tags = make_tags(
        torch.from_numpy(ids), torch.arange(start, start + count), 3, VOCABULARY
    ).numpy()
    places = expected_places(ids, start, VOCABULARY)
    assert are_all_right(tags, places)
    for row in data.draw(st.lists(st.integers(0, count - 1), max_size=2)):
        tags[row] = data.draw(st.sampled_from([INVALID, tags[row] + 1, tags[row] + (1 << 46)]))
    wrong, epochs = wrong_rows(tags, places), epochs_of(tags, 5)
    assert are_all_right(tags, places) == (not wrong.any() and len(set(epochs.tolist())) == 1)


def test_a_request_without_a_token_id_for_each_row_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="11 token ids for 12 rows"):
        verdict(tags_of([1] * 12), ids=IDS[:-1])
