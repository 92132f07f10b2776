"""The page of all results is what the committed result files say."""

from __future__ import annotations

import re

import pytest
import report
from report_plots import PLOTS
from report_results import Results


@pytest.fixture(scope="module")
def results():
    return Results(report.RESULTS)


def test_the_page_is_what_the_results_say(results):
    assert report.PAGE.read_text() == report.page(results), "run python bench/report.py"


def test_the_readme_says_the_same(results):
    readme = report.README.read_text()
    assert readme == report.with_part(readme, results), "run python bench/report.py"


def test_every_figure_is_on_the_page_with_its_run(results):
    page = report.PAGE.read_text()
    for result in results.all:
        section = page.partition(f"\n## {result.name}\n")[2].partition("\n## ")[0]
        assert f"`{result.command}`, commit {result.commit}" in section
        shown = sum(line.count("|") - 1 for line in section.splitlines() if line.startswith("|"))
        assert shown >= len(result.rows)


def test_every_plot_that_the_page_shows_is_there(results):
    shown = re.findall(r"\(results/(\w+)\.svg\)", report.PAGE.read_text())
    assert set(shown) == {result.name for result in results.all if result.bench in PLOTS}


def test_a_readme_without_its_markers_is_refused(results):
    with pytest.raises(ValueError, match="markers"):
        report.with_part("# shmroute\n", results)
