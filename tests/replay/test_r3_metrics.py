"""The R3 demonstration's figures mean what their definitions say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from r3_metrics import Comparison, Pass, differing_sets

ROLLOUT = np.array([0.5, 0.25, 0.125, 0.125])  # of four tokens
TRAINER = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.fixture
def policy() -> Pass:
    """Eight sampled tokens, each as often as the rollout's policy has it."""
    tokens = np.repeat(np.arange(4), (8 * ROLLOUT).astype(int))
    differs = np.array([[False, True], [False, False], [True, True], [False, False]])
    return Pass(np.log(TRAINER / ROLLOUT)[tokens], differs)


def test_kl_is_that_of_rollout_and_trainer_on_samples_of_the_rollout(policy: Pass) -> None:
    assert policy.kl == pytest.approx((ROLLOUT * np.log(ROLLOUT / TRAINER)).sum())


def test_equal_policies_have_no_kl_and_no_extreme_tokens() -> None:
    same = Pass(np.zeros(8), np.zeros((8, 2), dtype=bool))
    assert (same.kl, same.kl_error, same.extreme(1.001)) == (0, 0, 0)


def test_extreme_tokens_are_those_beyond_tau_on_either_side(policy: Pass) -> None:
    """Ratios 0.8 (four tokens), 1.2 (two), 1.6 and 0.8."""
    assert policy.extreme(1.3) == 1 / 8
    assert policy.extreme(1.24) == 6 / 8
    assert policy.extreme(1.1) == 1


def test_routers_count_by_layer_and_token_and_tokens_once(policy: Pass) -> None:
    assert policy.routers == 3 / 8
    assert policy.tokens == 2 / 4
    assert policy.by_layer.tolist() == [1 / 4, 2 / 4]


def test_routes_are_compared_as_sets() -> None:
    one = np.array([[[3, 1, 2], [3, 1, 2]]], dtype=np.uint8)
    other = np.array([[[1, 2, 3], [1, 2, 4]]])
    assert differing_sets(one, other).tolist() == [[False, True]]


def test_a_comparison_is_read_as_it_was_written(policy: Pass, tmp_path: Path) -> None:
    use = np.arange(6).reshape(2, 3)
    Comparison(np.log(ROLLOUT), policy, policy, use).save(tmp_path / "saved.npz")
    found = Comparison.load(tmp_path / "saved.npz")
    assert found.replayed.kl == found.own.kl == policy.kl
    assert found.own.routers == policy.routers
    np.testing.assert_array_equal(found.expert_use, use)
    assert (found.sampled, found.rows) == (4, 4)
