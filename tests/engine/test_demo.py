"""The demonstration runs, keeps what it says, and leaves nothing behind. Two engine starts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import result_file
from engine_process import SGLANG_FILES, left_behind, shared_memory_files

pytestmark = pytest.mark.engine

DEMO = Path(result_file.__file__).with_name("demo.py")


@dataclass(frozen=True, slots=True)
class Run:
    """Output, report and picture of a short run, and new files in ``/dev/shm`` after it."""

    output: str
    report: dict[str, Any]
    picture: bytes
    left: list[str]

    def value(self, name: str) -> float:
        return next(row["value"] for row in self.report["rows"] if row["name"] == name)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    report = tmp_path_factory.mktemp("demo") / "report.json"
    picture = report.with_suffix(".png")
    before = set(shared_memory_files().values())
    command = [sys.executable, str(DEMO), "--quick", "--json", str(report), "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    left = left_behind(re.compile(f".*-demo-|{SGLANG_FILES.pattern}"), before)
    return Run(done.stdout, json.loads(report.read_text()), picture.read_bytes(), left)


def test_the_report_has_the_result_format_and_every_promise_kept(demo: Run) -> None:
    result_file.validate(demo.report)
    judged = [row for row in demo.report["rows"] if "ok" in row]
    assert judged
    assert all(row["ok"] for row in judged)


def test_the_table_says_that_every_row_equals_the_native_path(demo: Run) -> None:
    assert "rows equal to the native path" in demo.output
    assert demo.output.count("100%") >= 2


def test_replay_gives_every_router_the_rollouts_experts_and_lowers_kl(demo: Run) -> None:
    layers = [
        [
            demo.value(f"layer {layer}: routers that choose another set, {way}")
            for layer in range(12)
        ]
        for way in ("own routing", "replayed")
    ]
    assert all(share > 0 for share in layers[0])
    assert not any(layers[1])
    own, replayed = (
        demo.value(f"KL(rollout || trainer), k3 estimator, {way}: mean")
        for way in ("own routing", "replayed")
    )
    assert replayed < own
    for kl in (own, replayed):
        assert f"{kl:.2e}" in " ".join(demo.output.splitlines()[-4:])


def test_the_picture_is_a_png(demo: Run) -> None:
    assert demo.picture.startswith(b"\x89PNG\r\n")


def test_nothing_stays_in_shared_memory(demo: Run) -> None:
    assert demo.left == []
