"""Memory of a real engine, natively and with an arena, is read by process and row. Two starts."""

from __future__ import annotations

import pytest
from engine_process import shared_memory_files

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def short(short_run):
    """The result of a short run, by name, and what it left in shared memory."""
    before = set(shared_memory_files())
    rows = short_run("memory_overhead.py", "bench-memory-", "native", "arena")["rows"]
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


def test_trainer_ranks_are_read(short):
    figures, _ = short
    for kind in ("native", "native, one by one", "as stored", "int32"):
        assert figures[f"2 ranks, {kind}: bytes a row, records and ranks"] > 0


def test_nothing_stays_in_shared_memory(short):
    _, left = short
    assert left == set()
