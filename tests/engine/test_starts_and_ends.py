"""What all the engines of this session have left, ended in good order and by SIGKILL.

It looks back at the starts 1, 2, 4 to 9, 12 and 13 of the other modules, all of which had an arena
of the same name, and adds two that are killed after one request: twelve starts and ends in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import Ended, Engines

import shmroute

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def two_more(engines: Engines, checkpoint: Callable[[str], Path]) -> None:
    """Starts 10 and 11 of the suite: a request each, then SIGKILL."""
    for number in (10, 11):
        with engines.serve(f"start-{number}", checkpoint("qwen3-32"), ending="kill") as traffic:
            traffic.generate([5 + number] * 40, max_new_tokens=8)


@pytest.fixture
def ended(engines: Engines) -> list[Ended]:
    if len(engines.ended) < 2:
        pytest.skip("fewer than two engines were started in this session")
    return engines.ended


def test_ten_starts_and_ends_leave_no_more_than_one(ended: list[Ended]) -> None:
    """A killed engine cannot clean up after itself; the next one does."""
    with_arena = [end for end in ended if end.with_arena]
    first = next(end for end in with_arena if end.ending == "kill")
    assert first.files > 0
    assert max(end.files for end in ended) <= first.files, ended
    assert max(end.taken_bytes for end in ended) <= first.taken_bytes, ended


def test_they_were_ten(ended: list[Ended], request: pytest.FixtureRequest) -> None:
    started = sum(end.with_arena for end in ended)
    if len(request.session.items) < 100:
        pytest.skip(f"a part of the suite is run: {started} engines with an arena")
    assert started >= 10, ended


def test_an_end_by_sigterm_leaves_no_file_once_every_record_is_released(
    ended: list[Ended],
) -> None:
    in_good_order = [end for end in ended if end.ending == "terminate"]
    assert [end for end in in_good_order if end.files] == []


def test_what_a_killed_engine_left_is_removed_once_somebody_reaps(
    engines: Engines, ended: list[Ended]
) -> None:
    shmroute.reap(engines.arena)
    assert engines.files() == []
