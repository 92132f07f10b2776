"""The scaling benchmark runs, says where a cost stops being flat, and leaves nothing behind."""

from __future__ import annotations

import signal

import pytest
from benches import ShortRun
from engine_process import shared_memory_files
from scaling import flat_up_to

FLAT_COSTS = {
    "reserve, seal, ticket": "tokens",
    "open by ticket": "slots",
    "open by rid": "slots",
    "release and reclaim": "slots",
    "one opening": "readers",
    "reserve, seal, ticket beside readers": "readers",
    "reserve, seal, ticket beside spinning processes": "spinners",
}


def start_short(folder):
    return ShortRun(folder, "scaling.py", "bench-scaling")


@pytest.fixture(scope="module")
def short(processes, valid_rows):
    """The rows of a short run."""
    return valid_rows(processes.done(start_short))


@pytest.mark.parametrize(("cost", "unit"), FLAT_COSTS.items())
def test_it_says_up_to_where_each_cost_is_flat(short, cost, unit):
    assert any(row["name"] == f"{cost}: flat up to" and row["unit"] == unit for row in short)


def test_records_are_counted_with_and_without_the_copy(short):
    figures = {row["name"]: row["value"] for row in short}
    for how in ("with the copy", "no copy"):
        assert figures[f"records a second, 1024 tokens, {how}"] > 0


def test_a_cost_is_flat_up_to_the_size_before_it_first_rises_by_a_quarter():
    assert flat_up_to({1: 100.0, 10: 124.0, 100: 126.0, 1000: 90.0}) == 10
    assert flat_up_to({1: 100.0, 10: 50.0}) == 10


def test_interrupted_it_leaves_no_arena(start_bench):
    before = set(shared_memory_files())
    process = start_bench("scaling.py", "bench-scaling")
    while not any("bench-store" in name for name in set(shared_memory_files()) - before):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    left = set(shared_memory_files()) - before
    assert not {name for name in left if "bench-s" in name}
