"""The short form of the crash campaign: SIGKILL at every kill point, and nothing is found.

The long form is ``bench/crash_campaign.py``; its results are in ``bench/results``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benches import ShortRun
from crash_audit import KINDS
from crash_points import POINTS
from processes import Processes

# It takes 12 s on an idle machine; what takes so much longer hangs.
LIMIT_SECONDS = 60.0

# -- kill points -------------------------------------------------------------------------------


def test_every_kill_point_has_a_name_of_its_own():
    assert len({point.name for point in POINTS}) == len(POINTS)


@pytest.mark.parametrize(
    "operation",
    ["reserve", "write", "seal", "fail", "reclaim", "evict", "create", "close"],
)
def test_the_writer_dies_in_every_operation(operation):
    assert any(point.role == "writer" and point.operation == operation for point in POINTS)


@pytest.mark.parametrize("operation", ["attach", "open", "lease", "hold", "release", "drop"])
def test_the_reader_dies_in_every_operation(operation):
    assert any(point.role == "reader" and point.operation == operation for point in POINTS)


# -- the campaign ------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> ShortRun:
    return ShortRun(folder, "crash_campaign.py", "crash", *arguments)


def start_one_point(folder: Path) -> ShortRun:
    return start(folder, "--seed", "7", "--point", "seal 3", "--kills", "1", "--reads", "1")


def figures_of(run: ShortRun) -> dict[str, Any]:
    return {row["name"]: row["value"] for row in run.result()["rows"]}


@pytest.fixture(scope="module")
def short(processes: Processes) -> tuple[str, dict[str, Any]]:
    """Output of the short form and, by name, its figures."""
    run = processes.done(start, LIMIT_SECONDS)
    return run.said, figures_of(run)


@pytest.fixture(scope="module")
def one_point(processes: Processes) -> dict[str, Any]:
    """Figures of a campaign at one kill point."""
    return figures_of(processes.done(start_one_point, LIMIT_SECONDS))


def test_every_kill_point_is_hit(short):
    _said, figures = short
    missed = [point.name for point in POINTS if not figures.get(f"kills: {point.name}")]
    assert missed == []


def test_nothing_is_found(short):
    said, figures = short
    assert {kind: figures[kind] for kind in KINDS} == dict.fromkeys(KINDS, 0), said


def test_slots_are_used_again_all_the_time(short):
    _said, figures = short
    assert figures["reserved"] > 12 * figures["eras, each ending with a proof of every slot"]
    assert figures["slots proved usable"] > 0


def test_sealed_records_are_read_after_their_writer_s_death(short):
    _said, figures = short
    assert figures["unreleased records read after their writer's death"] > 0


def test_the_seed_is_told(short):
    said, figures = short
    assert f"seed {figures['seed']}" in said


def test_one_kill_point_can_be_hit_alone(one_point):
    assert one_point["seed"] == 7
    points = {name for name in one_point if name.startswith("kills: ")}
    assert {name for name in points if "from outside" not in name} == {
        "kills: writer, seal 3 even word, before store_word",
        "kills: writer, seal 3 even word, after store_word",
    }
