"""Finding a record by rid: waiting, newest first, and the full rid decides."""

from __future__ import annotations

import time

import pytest
from actors import add, is_intact

from shmroute import (
    ArenaNotFound,
    RouteFailed,
    RouteGone,
    RouteNotFound,
    RouteTimeout,
    ShmRouteReader,
    release,
)
from shmroute.memory import rid_hash
from shmroute.opening import Opener


def test_an_unknown_rid_is_route_not_found_after_the_timeout(arena):
    begun = time.monotonic()
    with pytest.raises(RouteNotFound, match=r"rid 'unknown' is in none of 1 arenas \(.*n > 1"):
        ShmRouteReader("unknown", arena=arena.name, timeout=0.2)
    assert time.monotonic() - begun >= 0.2


def test_route_not_found_is_a_key_error_whose_text_is_its_message(arena):
    with pytest.raises(KeyError) as caught:
        ShmRouteReader("unknown", arena=arena.name, timeout=0)
    assert str(caught.value).startswith("rid 'unknown'")


def test_no_arena_of_the_name_is_arena_not_found(name):
    with pytest.raises(ArenaNotFound, match=f"no arena {name} .*--shmroute-arena"):
        ShmRouteReader("r", arena=name, timeout=0.1)


def test_a_record_of_another_arena_is_not_found_under_this_name(arena, name):
    add(arena, "r")
    with pytest.raises(ArenaNotFound):
        ShmRouteReader("r", arena=f"{name}-other", timeout=0)


def test_one_arena_of_a_name_can_be_asked_for_by_its_segment(make_arena):
    first, second = make_arena(), make_arena()
    add(first, "r")
    with ShmRouteReader("r", arena=first.segment.base) as routes:
        assert is_intact(routes)
    with pytest.raises(RouteNotFound):
        ShmRouteReader("r", arena=second.segment.base, timeout=0)


def test_all_arenas_of_a_name_are_searched(make_arena):
    arenas = [make_arena() for _ in range(3)]
    for index, arena in enumerate(arenas):
        add(arena, f"rank-{index}")
    for index in range(3):
        with ShmRouteReader(f"rank-{index}", arena=arenas[0].name) as routes:
            assert is_intact(routes)


def test_an_arena_that_is_made_later_is_found(name, make_arena):
    with pytest.raises(ArenaNotFound):
        ShmRouteReader("r", arena=name, timeout=0)
    add(make_arena(), "r")
    with ShmRouteReader("r", arena=name, timeout=0) as routes:
        assert is_intact(routes)


@pytest.mark.parametrize("by", ["ticket", "rid"])
def test_a_record_in_flight_is_route_timeout(arena, by):
    record = arena.reserve("r", tokens=3)
    source = record.ticket if by == "ticket" else "r"
    with pytest.raises(RouteTimeout, match=r"still being written after 0.05 s"):
        ShmRouteReader(source, arena=arena.name, timeout=0.05)


def test_among_equal_rids_the_newest_wins(arena):
    records = [add(arena, "same", tokens=5 + index) for index in range(4)]
    with ShmRouteReader("same", arena=arena.name) as routes:
        assert routes.tokens == records[-1].tokens
        assert is_intact(routes)


def test_tickets_of_equal_rids_stay_exact(arena):
    for record in [add(arena, "same", tokens=5 + index) for index in range(4)]:
        with ShmRouteReader(record.ticket) as routes:
            assert routes.tokens == record.tokens
            assert is_intact(routes)


def test_releasing_the_newest_of_equal_rids_does_not_hand_out_an_older_one(arena):
    add(arena, "same")
    release(add(arena, "same").ticket)
    for _ in range(2):
        with pytest.raises(RouteGone):
            ShmRouteReader("same", arena=arena.name)
        arena.writer.reclaim()


def test_the_newest_of_equal_rids_is_waited_for(arena):
    add(arena, "same")
    arena.reserve("same", tokens=5)
    with pytest.raises(RouteTimeout):
        ShmRouteReader("same", arena=arena.name, timeout=0)


def test_a_rid_that_was_run_again_after_a_failure_is_found(arena):
    arena.reserve("same", tokens=5).fail("no")
    add(arena, "same")
    with ShmRouteReader("same", arena=arena.name) as routes:
        assert is_intact(routes)


# -- colliding hashes --------------------------------------------------------------------------


@pytest.fixture
def collide(arena):
    """Give a slot another rid's hash, as if the two collided."""

    def collide(record, rid):
        arena.memory.hashes[record.slot] = rid_hash(rid)

    return collide


def test_colliding_rids_are_told_apart_by_the_full_rid(arena, collide):
    one, other = add(arena, "one"), add(arena, "other")
    collide(other, "one")
    with ShmRouteReader("one", arena=arena.name) as routes:
        assert routes.rid == "one"
        assert is_intact(routes)
    collide(one, "other")
    collide(other, "other")
    with ShmRouteReader("other", arena=arena.name) as routes:
        assert routes.rid == "other"
        assert is_intact(routes)


def test_an_unknown_rid_whose_hash_collides_is_not_found(arena, collide):
    collide(add(arena, "one"), "unknown")
    with pytest.raises(RouteNotFound):
        ShmRouteReader("unknown", arena=arena.name, timeout=0)


def test_a_collision_leaves_no_lease(arena, collide):
    record = add(arena, "one")
    collide(record, "unknown")
    with pytest.raises(RouteNotFound):
        ShmRouteReader("unknown", arena=arena.name, timeout=0.05)
    release(record.ticket)
    assert arena.writer.reclaim() == 1


def test_rids_of_512_bytes_that_differ_in_the_last_are_told_apart(arena):
    rids = ["x" * 511 + last for last in "ab"]
    for rid in rids:
        add(arena, rid)
    for rid in rids:
        with ShmRouteReader(rid, arena=arena.name) as routes:
            assert routes.rid == rid
            assert is_intact(routes)


def test_a_reader_that_looks_while_the_slot_goes_on_does_not_get_another_s_failure(
    make_arena, monkeypatch
):
    """The slot of a failed record is reserved again between the look at it and its lease."""
    arena = make_arena(slots=1)
    arena.reserve("failed", tokens=1).fail("not yours")
    arena.memory.hashes[0] = rid_hash("r")  # reserve wrote the hash, not yet the word
    original = Opener._try_slot

    def late(self, *arguments):
        if not arena.memory.words[0]:
            add(arena, "r")
        return original(self, *arguments)

    monkeypatch.setattr(Opener, "_try_slot", late)
    with ShmRouteReader("r", arena=arena.name) as routes:
        assert is_intact(routes)


def test_a_failed_rid_is_route_failed_by_rid(arena):
    arena.reserve("r", tokens=1).fail("a CUDA error")
    with pytest.raises(RouteFailed, match="a CUDA error"):
        ShmRouteReader("r", arena=arena.name)
