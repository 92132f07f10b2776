"""What follows from the measurements of the engine benchmark's workers."""

from __future__ import annotations

import pytest
from engine_figures import result_rows

LONG = 32_768
KINDS = ("forward_begin", "forward_end", "finalize", "idle_flush", "pinned_bytes", "gpu_bytes")


def run_of(configuration, collecting, sending):
    """A run on a GPU in whose one step one long request finished; seconds."""
    trace = {kind: [] for kind in KINDS}
    trace |= {"block": "itl", "finished": [[LONG, collecting]]}
    trace |= {"steps": [[1, LONG, collecting, sending]]}
    return {
        "configuration": configuration,
        "gpu": True,
        "start_seconds": 1.0,
        "trace": [trace],
    }


@pytest.fixture
def rows():
    runs = [run_of("native", 0.030, 0.020), run_of("arena", 80e-6, 20e-6)]
    return {row.name: row for row in result_rows(runs)}


def test_a_finished_request_is_compared_with_the_send_on_both_sides(rows):
    name = "native gather + send / arena collect + ticket + flush + send, 32K"
    assert rows[name].value == pytest.approx(0.050 / 100e-6)
    assert rows[name].budget is None


def test_its_budget_is_on_what_the_arena_takes_instead_of_gather_and_pickle(rows):
    name = "native gather + send / arena collect + ticket + flush, 32K, its send not counted"
    assert rows[name].value == pytest.approx(0.050 / 80e-6)
    assert rows[name].ok is True
