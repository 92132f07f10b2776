"""Memory of a real engine, natively and with an arena, is read by process and row. Two starts."""

from __future__ import annotations

import pytest
from benches import ShortRun
from engine_process import shared_memory_files

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def short(valid_rows, tmp_path_factory):
    """The result of a short run, by name, and what it left in shared memory."""
    before = set(shared_memory_files())
    folder = tmp_path_factory.mktemp("short")
    run = ShortRun(folder, "memory_overhead.py", "bench-memory-", "native", "arena")
    try:
        rows = valid_rows(run)
    finally:
        run.end()
    left = {name for name in set(shared_memory_files()) - before if "bench-memory-" in name}
    return {row["name"]: row["value"] for row in rows}, left


@pytest.mark.parametrize("way", ["native", "arena"])
def test_every_process_of_an_engine_is_read(short, way):
    figures, _ = short
    for role in ("HTTP server", "scheduler", "detokenizer"):
        assert 0 < figures[f"{way}: {role}: USS"] <= figures[f"{way}: {role}: resident at most"]
    total = figures[f"{way}: all processes: PSS"]
    assert total >= figures[f"{way}: all processes: USS"] > 0


def test_a_row_costs_the_arena_little_more_than_its_ids(short):
    figures, _ = short
    rows = next(value for name, value in figures.items() if "arena in use a row" in name)
    assert figures["floor: bytes a row"] < rows < 1.02 * figures["floor: bytes a row"]


def test_responses_carry_tickets_instead_of_rows(short):
    figures, _ = short
    texts = {name.partition(":")[0]: figures[name] for name in figures if "response text" in name}
    assert texts["native"] == 2048
    assert texts["arena"] < 10


@pytest.mark.parametrize("way", ["native", "arena"])
def test_the_growth_of_every_process_with_tokens_in_flight_is_shown(short, way):
    figures, _ = short
    for process in ("HTTP server", "scheduler", "detokenizer", "all processes"):
        for what in ("USS", "PSS", "shared memory"):
            assert f"{way}: {process}: {what} beyond before the load, 128 tokens" in figures


def test_a_ranks_pss_has_its_part_of_the_arena(short):
    figures, _ = short
    for kind in ("as stored", "int32"):
        pss = figures[f"2 ranks, {kind}: PSS at most"]
        arena = figures[f"2 ranks, {kind}: PSS at most, the arena's pages alone"]
        # Of 128 rows, which the engine has mapped as well.
        assert 2 / 3 * 128 * 384 / (1 << 20) <= arena < pss + 0.01


def test_what_reading_the_memory_takes_is_not_in_it(short):
    figures, _ = short
    packed = 2 * 130 * 12 * 8 / (1 << 20)  # both ranks: 65 rows of two records, 12 layers
    assert figures["2 ranks, as stored: private at most"] < packed + 0.2


def test_trainer_ranks_are_read(short):
    figures, _ = short
    for kind in ("native", "native, one by one", "as stored", "int32"):
        assert figures[f"2 ranks, {kind}: bytes a row, records and ranks"] > 0


def test_nothing_stays_in_shared_memory(short):
    _, left = short
    assert left == set()
