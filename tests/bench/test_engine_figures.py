"""What follows from the measurements of the engine benchmark's workers."""

from __future__ import annotations

import engine_figures
import pytest
from engine_figures import result_rows

LONG = 32_768
KINDS = (
    "forward_begin", "forward_end", "finalize", "idle_issue", "idle_flush", "pinned_bytes",
    "gpu_bytes",
)  # fmt: skip


def run_of(configuration, *seconds):
    """A run on a GPU in whose one step one long request finished: tickets, flush and send."""
    trace = {kind: [] for kind in KINDS}
    trace |= {"block": "itl", "steps": [[1, LONG, *seconds]]}
    return {
        "configuration": configuration,
        "gpu": True,
        "start_seconds": 1.0,
        "trace": [trace],
    }


@pytest.fixture
def rows():
    runs = [run_of("native", 0.030, 0.0, 0.020), run_of("arena", 50e-6, 30e-6, 20e-6)]
    return {row.name: row for row in result_rows(runs)}


def test_a_finished_request_is_compared_with_the_send_on_both_sides(rows):
    name = "native gather + send / arena, a request of 32K, its send counted"
    assert rows[name].value == pytest.approx(0.050 / 100e-6)
    assert rows[name].budget is None


def test_its_budget_is_on_what_the_arena_takes_instead_of_gather_and_pickle(rows):
    name = "native gather + send / arena, a request of 32K, its send not counted"
    assert rows[name].value == pytest.approx(0.050 / 80e-6)
    assert rows[name].ok is True


def test_what_a_request_alone_costs_is_held_to_its_budget_with_the_flush(rows):
    what = "arena, scheduler thread, a request of 32K finishes alone"
    assert rows[f"{what}: collect + ticket p50"].value == pytest.approx(50)
    assert rows[f"{what}: collect + ticket p50"].budget is None
    assert rows[f"{what}: all of it p50"].value == pytest.approx(80)
    assert rows[f"{what}: all of it p50"].ok is True
    assert rows[f"{what}: all of it p99 of 1"].budget == 300


@pytest.mark.parametrize("traced", [(), ("off",), ("arena",), ("off", "arena")])
def test_the_output_s_budget_is_for_engines_that_are_traced_alike(traced):
    runs = [
        {
            "configuration": name,
            "gpu": True,
            "start_seconds": 1.0,
            "throughput": [{"tokens_per_second": 100.0, "last_open_seconds": 0.0}],
        }
        for name in ("off", "arena")
    ]
    for run in runs:
        if run["configuration"] in traced:
            run["trace"] = [{kind: [] for kind in KINDS} | {"block": "throughput", "steps": []}]
    for run in runs:
        run["throughput"][0] |= {"route_bytes": 0, "response_bytes": 0}
    rows = {row.name: row for row in result_rows(runs)}
    share = rows["arena / off, all finish in one step: output"]
    assert share.budget == (None if len(traced) == 1 else 99.8)
    assert not any("spread" in name for name in rows)  # of one round there is none


def turn_of(name, rate, started, counted):
    """A turn of an engine, which has finished so many requests by its end."""
    counters = dict.fromkeys(
        ("inline", "failed_requests", "no_routes", "tags_checked", "page_locked_bytes",
         "pageable_copies", "tags_wrong", "inline_full", "hook_errors"), 0
    )  # fmt: skip
    load = {"tokens_per_second": rate, "last_open_seconds": 0.0}
    return {
        "configuration": name,
        "gpu": True,
        "start_seconds": started,
        "throughput": [{**load, "route_bytes": 0, "response_bytes": 0}],
        "counters": {**counters, "finished": counted, "ticketed": counted},
    }


def rows_of_turns(rates, against):
    turns = [turn_of("off", rate, 1.0, 0) for rate in against]
    turns += [turn_of("arena", rate, 2.0, 160 * n) for n, rate in enumerate(rates, 1)]
    return {row.name: row for row in result_rows(turns)}


def test_an_engine_that_takes_turns_is_one_engine_and_counts_what_its_last_turn_says():
    rows = rows_of_turns([100.0, 101.0, 102.0], [100.0, 100.0])
    assert rows["arena: engines started"].value == 1
    assert rows["arena: finished"].value == 480
    assert rows["arena / off, all finish in one step: output"].value == pytest.approx(101)


def test_a_ratio_of_many_loads_says_between_which_bounds_it_lies():
    what = "arena / off, all finish in one step: output"
    rows = rows_of_turns([99.0, 99.2, 99.4, 99.8], [100.0] * 4)
    assert 99.0 <= rows[f"{what}, 95% interval, low"].value < rows[what].value
    assert rows[what].value < rows[f"{what}, 95% interval, high"].value <= 99.8
    assert not any("interval" in name for name in rows_of_turns([99.0] * 3, [100.0] * 4))


def test_a_batch_that_is_sent_in_one_request_has_its_own_budget():
    runs = [turn_of("off", 100.0, 1.0, 0), turn_of("arena", 50.0, 2.0, 160)]
    for run, rate in zip(runs, (100.0, 99.9), strict=True):
        run["together"] = [{"tokens_per_second": rate}]
    rows = {row.name: row for row in result_rows(runs)}
    assert rows["arena / off, sent in one request: output"].ok
    assert not rows["arena / off, all finish in one step: output"].ok


def test_so_does_one_of_inter_token_latencies():
    def load(gap):
        gaps = [20.0] * 50 + [gap] * 50
        seen = {"gaps": gaps, "windows_cut": 0, "finish_times": [], "route_bytes": 0}
        return {"name": "8K", **seen}

    runs = [turn_of("off", 100.0, 1.0, 0) for _ in range(4)]
    runs += [turn_of("arena", 100.0, 2.0, 1) for _ in range(4)]
    for run, gap in zip(runs, [20, 21, 22, 23, 22, 23, 24, 25], strict=True):
        run["itl"] = [load(gap)]
    rows = {row.name: row for row in result_rows(runs)}
    what = "arena / off, 8K requests finish: ITL max"
    low, high = (rows[f"{what}, 95% interval, {bound}"].value for bound in ("low", "high"))
    assert rows[what].value == pytest.approx(23.5 / 21.5)
    assert low < rows[what].value < high
    assert rows[f"{what}, 95% interval, low"].unit == "x"


def test_gaps_around_finishes_are_told_by_how_many_finished():
    load = {
        "finish_times": [10.0, 20.0, 20.004, 20.001, 20.002, 30.0, 30.001],
        "gap_ends": [9.9, 9.96, 10.2, 10.3, 20.0, 20.2, 30.0],
        "gaps": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    }
    assert engine_figures._gaps_around(load, 1) == [2.0, 3.0]
    assert engine_figures._gaps_around(load, 4) == [5.0, 6.0]
    del load["gap_ends"]
    assert engine_figures._gaps_around(load, 1) == []
