"""The campaigns' counts come from pytest's report: none of a case that failed is lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import trust
from result_file import Row, exit_code


@pytest.fixture
def rows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a campaign of one file of tests."""

    def run(source: str) -> dict[str, Row]:
        file = tmp_path / "test_campaign.py"
        file.write_text(source)
        monkeypatch.setitem(trust.CAMPAIGNS, "some", trust.Campaign("", (str(file),)))
        return {row.name.removeprefix("some: "): row for row in trust.run("some", 1, quick=True)}

    return run


def test_cases_and_what_they_counted_are_figures(rows_of) -> None:
    rows = rows_of(
        "import pytest\n"
        "def test_one(record_property): record_property('steps', 12)\n"
        "def test_two(): pytest.skip('not here')\n"
    )
    assert rows["cases"].value == 1
    assert rows["cases that could not run here"].value == 1
    assert rows["steps"].value == 12
    assert exit_code([*rows.values()]) == 0


def test_a_failed_case_and_an_empty_campaign_miss_their_budget(rows_of) -> None:
    assert rows_of("def test_one(): assert 0\n")["cases that failed"].ok is False
    assert rows_of("")["cases"].ok is False


def test_no_campaign_means_all_and_an_unknown_one_is_named(capsys) -> None:
    assert trust._arguments([]).campaigns == []
    assert trust._arguments(["model", "hostile"]).campaigns == ["model", "hostile"]
    with pytest.raises(SystemExit):
        trust._arguments(["modell"])
    assert "modell" in capsys.readouterr().err


def test_ended_in_the_background_of_a_shell_its_tests_end_too(start_bench) -> None:
    """There SIGINT is ignored, which children inherit; the campaign would take many minutes."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start_bench("trust.py", "bench-trust", "model")
    finally:
        signal.signal(signal.SIGINT, before)
    while not process.children():
        assert process.poll() is None
        time.sleep(0.05)
    children = process.children()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []
