"""miles 0.0.2, in its own environment: the same routes by ticket as from native responses."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from peer_process import ROOT, PeerProcess
from processes import Processes
from rollouts import NUM_LAYERS, TOP_K, rollout

PYTHON = ROOT / ".venv/miles/bin/python"


def start_miles(folder: Path) -> PeerProcess:
    return PeerProcess(PYTHON, "miles_cases.py", folder / "errors")


@pytest.fixture(scope="module")
def miles(processes: Processes) -> Iterator[PeerProcess]:
    process = processes.done(start_miles)
    yield process
    process.end()


@pytest.mark.parametrize("ends", [[20], [8, 9, 20], [400]], ids=str)
def test_a_sample_travels_as_tickets_and_arrives_as_miles_has_it(miles, make_arena, layout, ends):
    sent = rollout(make_arena(layout), "r", ends, layout=layout)
    travelling = miles.ask("sample_has_its_rows", rollout=sent.facts())
    assert travelling < 350 * len(ends) < (ends[-1] - 1) * NUM_LAYERS * TOP_K * 4


def test_a_turn_that_repeats_the_prefix_replaces_the_turns_before_it(miles, arena):
    first, whole = rollout(arena, "first", [8], seed=1), rollout(arena, "whole", [20], seed=2)
    facts = {**whole.facts(), "turns": [*first.turns, *whole.turns]}
    assert miles.ask("sample_has_its_rows", rollout=facts) < 350


@pytest.mark.parametrize("strip", [1, 11])
def test_rows_are_stripped_with_their_tokens(miles, arena, strip):
    sent = rollout(arena, "r", [8, 20])
    miles.ask("stripped_sample_has_its_rows", rollout=sent.facts(), strip=strip)


@pytest.mark.parametrize(
    ("cp_size", "tp_size", "sequence_parallel"),
    [(1, 1, False), (2, 1, False), (1, 2, True), (2, 2, True)],
)
def test_the_trainer_gives_its_routers_the_same(miles, arena, cp_size, tp_size, sequence_parallel):
    sequences = [
        rollout(arena, f"r{i}", ends, seed=i) for i, ends in enumerate(([8, 20], [9], [7]))
    ]
    facts = [each.facts() for each in sequences]
    routed = 0
    for cp_rank in range(cp_size):
        for tp_rank in range(tp_size if sequence_parallel else 1):
            rank = {
                "cp_rank": cp_rank,
                "cp_size": cp_size,
                "tp_rank": tp_rank,
                "tp_size": tp_size,
            }
            rows, padded = miles.ask(
                "trainer_fills_the_same",
                rollouts=facts,
                rank=rank,
                sequence_parallel=sequence_parallel,
            )
            assert padded
            routed += rows
    assert routed == sum(each.tokens - 1 for each in sequences)


def test_records_are_released_before_the_first_training_step(miles, arena):
    sent = rollout(arena, "r", [8, 20])
    found = miles.ask("hook_releases", rollout={**sent.facts(), "tickets": sent.tickets})
    assert found == ["there"] * 2 + ["RouteGone"] * 2
    assert arena.writer.reclaim() == 2


def test_no_rank_releases_what_another_has_not_read(arena, tmp_path):
    """Ranks of one data-parallel group read the same records."""
    sent = rollout(arena, "r", [20])
    facts = {"ticket": sent.tickets[0], "native": sent.native, "wanting": str(tmp_path / "wanting")}
    ranks = [PeerProcess(PYTHON, "miles_ranks.py", tmp_path / f"errors{i}") for i in range(2)]
    try:
        with ThreadPoolExecutor() as pool:
            store = str(tmp_path / "store")
            join = [pool.submit(r.ask, "join", rank=i, store=store) for i, r in enumerate(ranks)]
            assert [each.result() for each in join] == [None, None]
            train = [
                pool.submit(rank.ask, "train", slow=slow, **facts)
                for rank, slow in zip(ranks, (False, True), strict=True)
            ]
            assert [each.result() for each in reversed(train)] == [True, True]
    finally:
        for rank in ranks:
            rank.end()
    assert arena.writer.reclaim() == 1


def test_generate_asks_a_continued_sample_for_new_rows_only(miles, arena):
    sent = rollout(arena, "r", [8, 20])
    found = miles.ask("generate_in_turns", turns=sent.turns)
    assert found == {
        "asked": [
            {"tokens": 3, "max_new_tokens": 40, "start": None, "routes": True},
            {"tokens": 8, "max_new_tokens": 35, "start": 7, "routes": True},
        ],
        "rows": 19,
        "status": "completed",
    }


def test_a_sample_that_was_unpickled_is_asked_for_all_rows(miles, arena):
    first, whole = rollout(arena, "first", [8], seed=1), rollout(arena, "whole", [20], seed=2)
    found = miles.ask("continued_after_a_pickle", turns=[*first.turns, *whole.turns])
    assert found["asked"] == {}
    native = np.frombuffer(base64.b64decode(whole.native), np.int32)
    assert found["rows"] == native.reshape(19, NUM_LAYERS, TOP_K).tolist()


def test_a_delta_for_a_sample_that_was_unpickled_is_named(miles, arena):
    found = miles.ask("continued_after_a_pickle", turns=rollout(arena, "r", [8, 20]).turns)
    assert found["refused"].startswith("ReplayError: this turn has routes from token 7 on")
    assert "without routed_experts_start_len" in found["refused"]


def test_an_evaluation_asks_for_no_routes(miles):
    found = miles.ask("generate_in_turns", turns=[[8, ""]], evaluation=True)
    assert [each["routes"] for each in found["asked"]] == [False]
    assert found["rows"] is None


def test_turns_that_do_not_fit_are_named(miles, arena):
    sent = rollout(arena, "r", [8, 20])
    (end, ticket), (later, delta) = sent.turns
    gap = miles.ask("refused", turns=[[later, delta]])
    assert "from token 7 on" in gap
    assert "routed_experts_start_len=0" in gap
    changed = miles.ask("refused", turns=[[end + 1, ticket]])
    assert "tokens [0, 7) for a sequence of 9 tokens, which has 8 rows" in changed
    other = miles.ask("refused", turns=[[end, ticket]], top_k=8)
    assert f"routes of top-{TOP_K}, the trainer replays top-8" in other
    lacking = miles.ask("refused", turns=[[end, None]])
    assert "carries no routed_experts" in lacking
    plain = miles.ask("refused", turns=[[8, rollout(arena, "n", [8]).native]])
    assert "Start it with --shmroute-arena NAME" in plain
    errors = (gap, changed, other, lacking, plain)
    assert {each.split(":")[0] for each in errors} == {"ReplayError"}
