"""Weight epochs: which weights computed a row, and what their version is called."""

from __future__ import annotations

from sglang_bridge.epochs import WeightEpochs


def test_an_update_after_a_forward_begins_an_epoch() -> None:
    epochs = WeightEpochs()
    assert epochs.mark_used() == 0
    epochs.begin_update(None)
    assert epochs.mark_used() == 1


def test_the_many_calls_of_one_update_are_one_epoch() -> None:
    epochs = WeightEpochs()
    epochs.mark_used()
    for _ in range(50):  # one call a bucket
        epochs.begin_update(None)
    assert epochs.current == 1


def test_a_forward_between_two_calls_of_an_update_has_an_epoch_of_its_own() -> None:
    epochs = WeightEpochs()
    epochs.mark_used()
    epochs.begin_update(None)
    half_updated = epochs.mark_used()
    epochs.begin_update("new")
    assert half_updated == 1
    assert epochs.mark_used() == 2
    assert epochs.label(1) == "epoch-1"
    assert epochs.label(2) == "new"


def test_an_update_before_the_first_forward_renames_the_first_epoch() -> None:
    epochs = WeightEpochs("loaded")
    epochs.begin_update("step-0")
    assert epochs.mark_used() == 0
    assert epochs.label(0) == "step-0"


def test_an_epoch_without_a_given_version_is_called_by_its_number() -> None:
    epochs = WeightEpochs("loaded")
    epochs.mark_used()
    epochs.begin_update(None)
    assert epochs.label(0) == "loaded"
    assert epochs.label(1) == "epoch-1"
    assert epochs.label(77) == "epoch-77"


def test_only_the_latest_labels_are_kept() -> None:
    epochs = WeightEpochs()
    for number in range(3000):
        epochs.mark_used()
        epochs.begin_update(f"step-{number + 1}")
    assert epochs.label(3000) == "step-3000"
    assert epochs.label(2000) == "step-2000"
    assert epochs.label(1) == "epoch-1"
