"""Which record a rid names when several have it: ranks, restarts, repeated rids."""

from __future__ import annotations

import time

import pytest
from actors import add

import shmroute
from shmroute import ArenaFull, RouteGone, RouteNotFound, ShmRouteReader


def tokens_of(rid, arena):
    with ShmRouteReader(rid, arena=arena.name, timeout=0) as routes:
        return routes.tokens


@pytest.fixture
def ranks(make_arena):
    """Two data-parallel ranks: two arenas of one name."""
    first = make_arena()
    return first, make_arena()


@pytest.mark.parametrize("later", [0, 1])
def test_between_ranks_the_later_sealed_record_is_the_newest(ranks, later):
    add(ranks[1 - later], "rid", tokens=1)
    add(ranks[later], "rid", tokens=2)
    assert tokens_of("rid", ranks[0]) == 2


def test_a_record_that_another_rank_released_later_is_gone_not_replaced(ranks):
    add(ranks[0], "rid", tokens=1)
    add(ranks[1], "rid", tokens=2)
    with ShmRouteReader("rid", arena=ranks[0].name) as routes:
        routes.release()
    with pytest.raises(RouteGone):
        tokens_of("rid", ranks[0])


def test_a_record_released_on_one_rank_does_not_hide_a_later_one_on_the_other(ranks):
    released = add(ranks[1], "rid", tokens=1)
    shmroute.release([released.ticket])
    add(ranks[0], "rid", tokens=2)
    assert tokens_of("rid", ranks[0]) == 2


def test_an_older_record_of_a_rid_does_not_come_up_again(make_arena):
    arena = make_arena(slots=2)
    older = add(arena, "rid", tokens=1)
    newer = add(arena, "rid", tokens=2)
    shmroute.release([newer.ticket])
    arena.writer.reclaim()
    add(arena, "another", tokens=3)
    with pytest.raises(RouteNotFound):
        tokens_of("rid", arena)
    with ShmRouteReader(older.ticket) as routes:
        assert routes.tokens == 1


def test_release_goes_on_behind_a_source_that_cannot_be_released(make_arena):
    arena = make_arena()
    record = add(arena, "rid", tokens=1)
    with pytest.raises(RouteNotFound):
        shmroute.release(["nobody", record.ticket], arena=arena.name, timeout=0)
    with pytest.raises(RouteGone):
        ShmRouteReader(record.ticket)


def test_release_waits_for_all_that_nobody_knows_together(make_arena):
    arena = make_arena()
    began = time.monotonic()
    with pytest.raises(RouteNotFound, match="nobody-0"):
        shmroute.release(
            [f"nobody-{number}" for number in range(20)], arena=arena.name, timeout=0.5
        )
    assert 0.5 <= time.monotonic() - began < 5


def test_an_unattended_writer_reclaims_whatever_a_large_record_needs(make_arena):
    arena = make_arena(slots=512)
    small = [add(arena, f"rid-{index}", tokens=1) for index in range(512)]
    with pytest.raises(ArenaFull):
        add(arena, "one more", tokens=1)
    shmroute.release([record.ticket for record in small])
    rows = arena.memory.description.heap_bytes // arena.memory.description.routes.row_bytes
    with arena.reserve("large", tokens=rows * 9 // 10):
        pass
