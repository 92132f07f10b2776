"""The demonstration runs, keeps what it says, and leaves nothing behind. Two engine starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import result_file
from engine_process import SGLANG_FILES, shared_memory_files

pytestmark = pytest.mark.engine

DEMO = Path(result_file.__file__).with_name("demo.py")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, set[str]]:
    """Output, report, and new files in ``/dev/shm`` of a short run."""
    report = tmp_path_factory.mktemp("demo") / "report.json"
    before = set(shared_memory_files())
    command = [sys.executable, str(DEMO), "--quick", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    new = set(shared_memory_files()) - before
    left = {name for name in new if "-demo-" in name or SGLANG_FILES.match(name)}
    return done.stdout, json.loads(report.read_text()), left


def test_the_report_has_the_result_format_and_every_promise_kept(demo) -> None:
    _, report, _ = demo
    result_file.validate(report)
    judged = [row for row in report["rows"] if "ok" in row]
    assert judged
    assert all(row["ok"] for row in judged)


def test_the_table_says_that_every_row_equals_the_native_path(demo) -> None:
    output, _, _ = demo
    assert "rows equal to the native path" in output
    assert output.count("100%") >= 2


def test_nothing_stays_in_shared_memory(demo) -> None:
    _, _, left = demo
    assert left == set()
