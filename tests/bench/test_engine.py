"""The engine benchmark's bar follows what its workers write."""

from __future__ import annotations

import io
import json

import pytest
from engine import BlocksBar
from rich.console import Console
from rich.progress import Progress

BLOCKS = ("throughput", "itl")


@pytest.fixture
def progress():
    return Progress(console=Console(file=io.StringIO()))


@pytest.fixture
def bar(progress):
    bar = BlocksBar(progress, BLOCKS, engines=2)
    bar.begin_engine("01-off")
    return bar


def shown(progress):
    (task,) = progress.tasks
    return task.completed, task.total, task.description


def test_an_engine_that_starts_has_no_block_through(bar, progress, tmp_path):
    assert shown(progress) == (0, 4, "01-off: starting")
    bar.begin_blocks()
    bar.show(tmp_path / "not-written.json")
    assert shown(progress) == (0, 4, "01-off: throughput")


def test_blocks_count_when_all_their_loads_are_written(bar, progress, tmp_path):
    result = tmp_path / "01-off.json"
    result.write_text(json.dumps({"throughput": [{}, {}]}))
    bar.show(result)
    assert shown(progress) == (0, 4, "01-off: throughput")
    result.write_text(json.dumps({"throughput": [{}, {}], "throughput_seconds": 2.0}))
    bar.show(result)
    assert shown(progress) == (1, 4, "01-off: itl")


def test_an_engine_that_failed_does_not_hold_the_bar_up(bar, progress, tmp_path):
    bar.end_engine()
    bar.begin_engine("02-arena")
    result = tmp_path / "02-arena.json"
    result.write_text(json.dumps({"throughput_seconds": 2.0}))
    bar.show(result)
    assert shown(progress) == (3, 4, "02-arena: itl")
