"""Tags tell whose forward wrote a row, and under which weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_bridge.tags import (
    INVALID,
    POSITION_MAX,
    epochs_of,
    expected_places,
    make_tags,
    wrong_rows,
)

VOCABULARY = 1000
EPOCHS = 1 << 17


def tags_of(tokens: list[int], start: int, epoch: int = 0, dtype: torch.dtype = torch.int64):
    positions = torch.arange(start, start + len(tokens))
    return make_tags(torch.tensor(tokens, dtype=dtype), positions, epoch, VOCABULARY).numpy()


def places_of(tokens: list[int], start: int):
    return expected_places(np.array(tokens, dtype=np.int64), start, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("start", [0, 7, POSITION_MAX - 3])
def test_a_tag_names_its_own_token_and_position(start: int, dtype: torch.dtype) -> None:
    tokens = [0, 1, 999]
    assert not wrong_rows(tags_of(tokens, start, 5, dtype), places_of(tokens, start)).any()


def test_another_token_is_noticed() -> None:
    assert wrong_rows(tags_of([3, 4, 5], 0), places_of([3, 9, 5], 0)).tolist() == [0, 1, 0]


def test_another_position_is_noticed() -> None:
    assert wrong_rows(tags_of([3, 3, 3], 1), places_of([3, 3, 3], 0)).all()


def test_a_location_that_was_never_written_is_wrong_for_every_token() -> None:
    tags = np.full(3, INVALID, dtype=np.int64)
    assert wrong_rows(tags, places_of([0, VOCABULARY, -1], 0)).all()


@pytest.mark.parametrize("foreign", [VOCABULARY, VOCABULARY + 1, 1 << 40, -1, -(1 << 63)])
def test_ids_outside_the_vocabulary_share_one_code(foreign: int) -> None:
    """Multimodal code stands images in with such ids and clamps them at different moments."""
    assert not wrong_rows(tags_of([7, foreign], 0), places_of([7, foreign], 0)).any()
    assert not wrong_rows(tags_of([7, foreign], 0), places_of([7, VOCABULARY], 0)).any()


def test_an_id_outside_the_vocabulary_is_no_id_inside_it() -> None:
    assert wrong_rows(tags_of([VOCABULARY], 0), places_of([VOCABULARY - 1], 0)).all()
    assert wrong_rows(tags_of([0], 0), places_of([-1], 0)).all()


def test_the_epoch_does_not_touch_token_and_position() -> None:
    for epoch in (0, 1, EPOCHS - 1, EPOCHS, 12345678):
        tags = tags_of([7, 8], 100, epoch)
        assert (tags >= 0).all()
        assert not wrong_rows(tags, places_of([7, 8], 100)).any()


@pytest.mark.parametrize("current", [0, 1, 3, EPOCHS - 1, EPOCHS, EPOCHS + 2, 10 * EPOCHS + 5])
def test_epochs_come_back_whole_also_when_their_bits_have_wrapped_around(current: int) -> None:
    for behind in (0, 1, 2, EPOCHS - 1):
        if behind <= current:
            tags = tags_of([1, 2], 0, current - behind)
            assert epochs_of(tags, current).tolist() == [current - behind] * 2
