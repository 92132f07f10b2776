"""What all the engines of this session have left, ended in good order and by SIGKILL.

Starts no engine: it looks back at the starts 1, 2 and 4 to 9 of the other modules, all of
which had an arena of the same name.
"""

from __future__ import annotations

import pytest
from engines import Ended, Engines

import shmroute

pytestmark = pytest.mark.engine


@pytest.fixture
def ended(engines: Engines) -> list[Ended]:
    if len(engines.ended) < 2:
        pytest.skip("fewer than two engines were started in this session")
    return engines.ended


def test_no_end_leaves_more_files_than_the_first_kill(ended: list[Ended]) -> None:
    """A killed engine cannot clean up after itself; the next one does."""
    after_a_kill = [end.files for end in ended if end.ending == "kill"]
    assert max(end.files for end in ended) <= next(iter(after_a_kill), 0), ended


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
