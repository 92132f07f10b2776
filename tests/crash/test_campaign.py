"""The short form of the crash campaign: SIGKILL at every kill point, and nothing is found.

The long form is ``bench/crash_campaign.py``; its results are in ``bench/results``.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from crash_audit import KINDS
from crash_points import POINTS

# It takes 12 s on an idle machine; what takes so much longer hangs, or has become slow.
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


@pytest.fixture(scope="module")
def campaign(
    start_bench: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Run the campaign with these arguments; its output and, by name, its figures."""
    folder = tmp_path_factory.mktemp("crash")

    def run(*arguments: str) -> tuple[str, dict[str, Any]]:
        result = folder / f"{len(list(folder.iterdir()))}.json"
        process = start_bench("crash_campaign.py", "crash", *arguments, "--json", str(result))
        try:
            said, _ = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired as expired:
            so_far = (expired.output or b"").decode(errors="replace")
            pytest.fail(f"not done after {LIMIT_SECONDS:.0f} s, and said {so_far}")
        assert process.returncode == 0, said
        rows = json.loads(result.read_text())["rows"]
        return said, {row["name"]: row["value"] for row in rows}

    return run


@pytest.fixture(scope="module")
def short(campaign: Callable[..., Any]) -> Any:
    return campaign("--quick")


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


def test_one_kill_point_can_be_hit_alone(campaign):
    limits = ("--kills", "1", "--reads", "1")
    _said, figures = campaign("--quick", "--seed", "7", "--point", "seal 3", *limits)
    assert figures["seed"] == 7
    points = {name for name in figures if name.startswith("kills: ")}
    assert {name for name in points if "from outside" not in name} == {
        "kills: writer, seal 3 even word, before store_word",
        "kills: writer, seal 3 even word, after store_word",
    }
