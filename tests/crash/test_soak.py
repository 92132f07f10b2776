"""The short form of the soak test, that it would see what drifts, and that it cleans up.

The long form is ``bench/soak.py``; its result is in ``bench/results``.
"""

from __future__ import annotations

import os
import signal
from functools import partial

import numpy as np
import pytest
import soak
from benches import ShortRun
from soak_samples import Samples, theil_sen


@pytest.fixture(scope="module")
def start(start_bench):
    """Start the soak test with these arguments."""
    return partial(start_bench, "soak.py", "soak", "--quick")


def start_short(folder):
    return ShortRun(folder, "soak.py", "soak", "--seconds", "10", "--seed", "5")


@pytest.fixture(scope="module")
def short(processes):
    """Output and, by name, rows of a run of ten seconds."""
    run = processes.done(start_short)
    rows = {row["name"]: row for row in run.result()["rows"]}
    assert run.files() == []
    return run.said, rows


def test_nothing_drifts_and_nothing_is_wrong(short):
    said, rows = short
    assert [name for name, row in rows.items() if row.get("ok") is False] == [], said


def test_everything_that_can_become_of_a_record_becomes_of_some(short):
    said, rows = short
    for what in ("released early", "released late", "never released", "read by rid", "read again"):
        assert rows[what]["value"] > 10, said
    assert rows["refused as failed"]["value"] > 0, said
    assert rows["readers killed"]["value"] > 0, said


def test_the_seed_is_told(short):
    said, rows = short
    assert "seed 5" in said
    assert rows["seed"]["value"] == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_neither_processes_nor_files(start, number):
    process = start()
    while " sealed " not in process.stdout.readline():
        assert process.poll() is None
    assert process.files()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert process.files() == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_run_that_is_too_short_to_see_a_drift_is_refused(start):
    process = start("--seconds", "3")
    said, _ = process.communicate()
    assert process.returncode == 2
    assert "too short" in said


# -- drift -------------------------------------------------------------------------------------


def test_an_outlier_moves_no_slope():
    times = np.arange(100.0)
    values = 2 * times
    values[::10] = 1e9
    assert theil_sen(times, values) == pytest.approx(2, abs=0.2)


@pytest.fixture
def sampled():
    """Samples of twenty minutes, one a half minute, of these values at rest."""

    def sampled(name, values):
        samples = Samples()
        samples.times = [30.0 * index for index in range(40)]
        samples.series[name] = [float(value) for value in values]
        return samples

    return sampled


def verdict(samples, name, tolerated):
    return [row.ok for row in soak._series_rows(samples, name, name, tolerated)][-1]


def test_a_descriptor_that_leaks_every_minute_is_a_drift(sampled):
    leaking = sampled("writer: descriptors", (50 + index // 2 for index in range(40)))
    assert verdict(leaking, "writer: descriptors", soak._TOLERATED_AT_REST) is False


def test_memory_that_leaks_30_bytes_a_record_is_a_drift(sampled):
    per_sample = 200 * 30 * 30 / (1 << 20)  # MiB, at 200 records a second
    leaking = sampled(f"writer: {soak._OWN}", (100 + per_sample * index for index in range(40)))
    assert verdict(leaking, f"writer: {soak._OWN}", soak._TOLERATED) is False


def test_what_only_rises_at_first_is_no_drift(sampled):
    filling = sampled(f"writer: {soak._OWN}", (min(90 + index, 100) for index in range(40)))
    assert verdict(filling, f"writer: {soak._OWN}", soak._TOLERATED) is True
