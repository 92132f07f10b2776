"""Processes that stand still (SIGSTOP) at the worst moment: nobody waits for them, and when they
go on they find their own record or are told that it has gone.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from actors import add, is_intact

from shmroute import (
    ArenaFull,
    ArenaNotFound,
    RouteGone,
    RouteTimeout,
    ShmRouteReader,
    reap,
    release,
)
from shmroute.counters import read_counters

# -- a reader ----------------------------------------------------------------------------------


@pytest.fixture
def stopped_reader(make_arena, reader, text):
    """A stopped reader of three records, and the arena, whose four slots are all of use."""
    arena = make_arena(slots=4, retention=0.0)
    process = reader()
    for index in range(3):
        process.say(text(add(arena, f"rid-{index}").ticket))
        assert process.hear()["intact"]
    process.stop()
    return process, arena


def test_the_writer_goes_on_in_what_a_stopped_reader_does_not_hold(stopped_reader):
    process, arena = stopped_reader
    for index in range(200):
        record = add(arena, f"more-{index}")
        with ShmRouteReader(record.ticket) as routes:
            assert is_intact(routes)
    process.stopped()  # still


def test_what_a_stopped_reader_keeps_from_being_evicted_is_counted_and_shown(stopped_reader):
    _process, arena = stopped_reader
    for index in range(10):
        add(arena, f"more-{index}")
    kept = read_counters(arena.memory.counters)["kept_by_leases"]
    assert kept >= 3
    command = [sys.executable, "-m", "shmroute.cli", "stat", arena.name]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{kept:,} times kept by a reader's lease" in shown
    assert "3 leased by readers" in shown


def test_an_arena_that_a_stopped_reader_holds_whole_is_full_at_once(stopped_reader, text):
    process, arena = stopped_reader
    record = arena.reserve("the last slot", tokens=1)
    for _ in range(50):
        with pytest.raises(ArenaFull, match="0 of 4 slots"):
            arena.reserve("one more", tokens=1)
    record.fail("no more needed")
    process.stopped()  # still


def test_a_reader_that_goes_on_has_its_records_as_they_were(stopped_reader):
    process, arena = stopped_reader
    for index in range(20):
        add(arena, f"more-{index}")
    process.go_on()
    process.say("more-19")
    assert process.hear() == {"intact": True, "error": ""}
    process.say(None)
    assert process.hear() == {"held": 0}
    add(arena, "again")


# -- a reader on its way into a record ---------------------------------------------------------

# Is stopped right before or after it takes the lease of the record that it opens.
OPENING = """
    from shmroute import leases
    stop(WHEN, leases.SharedLeases, "try_acquire")
    try:
        with ShmRouteReader(SOURCE, arena=NAME, timeout=0.2) as routes:
            say(rows=routes.tokens, intact=is_intact(routes))
    except ShmRouteError as error:
        say(error=type(error).__name__)
"""


@pytest.fixture
def single(make_arena):
    """An arena of one slot, whose record may be evicted at once."""
    return make_arena(slots=1, retention=0.0)


@pytest.fixture(params=["ticket", "rid"])
def by(request):
    return request.param


@pytest.fixture
def opening(single, by, actor, text):
    """An actor that opens the record "r" and is stopped on the way."""
    record = add(single, "r", tokens=20)

    def start(when):
        process = actor(OPENING, SOURCE=text(record.ticket) if by == "ticket" else "r", WHEN=when)
        process.stopped()
        return process

    return start


def test_a_record_that_is_evicted_before_its_reader_has_the_lease_is_gone(single, by, opening):
    process = opening("before")
    add(single, "next")
    process.go_on()
    assert process.hear() == {"error": "RouteGone" if by == "ticket" else "RouteNotFound"}


def test_a_record_that_its_like_replaced_before_its_reader_has_the_lease_is_not_mistaken(
    single, by, opening
):
    process = opening("before")
    add(single, "r", tokens=30)
    process.go_on()
    newer = {"rows": 30, "intact": True}
    assert process.hear() == ({"error": "RouteGone"} if by == "ticket" else newer)


def test_a_record_whose_reader_has_the_lease_is_not_evicted(single, opening):
    process = opening("after")
    with pytest.raises(ArenaFull):
        add(single, "next")
    process.go_on()
    assert process.hear() == {"rows": 20, "intact": True}
    process.wait()
    add(single, "next")


# -- a releaser --------------------------------------------------------------------------------


def not_released_already(arena):
    """Whether the next record of the slot is there, and not taken for released."""
    record = add(arena, "next")
    assert arena.writer.reclaim() == 0
    with ShmRouteReader(record.ticket) as routes:
        return is_intact(routes)


def test_a_releaser_that_stands_still_under_its_lease_cannot_hit_a_later_record(
    single, actor, text
):
    record = add(single, "r")
    slow = actor(
        """
        routes = ShmRouteReader(TICKET)
        memory = routes._arena.memory
        class Slow:
            column = memory.acknowledgements
            def __setitem__(self, slot, generation):
                os.kill(os.getpid(), signal.SIGSTOP)
                self.column[slot] = generation
        memory.acknowledgements = Slow()
        routes.release()
        """,
        TICKET=text(record.ticket),
    )
    slow.stopped()
    assert release(record.ticket) == 1
    assert single.writer.reclaim() == single.writer.evict_expired() == 0
    slow.go_on()
    slow.wait()
    assert single.writer.reclaim() == 1
    assert not_released_already(single)


def test_a_releaser_that_stands_still_before_its_lease_cannot_hit_a_later_record(
    make_arena, actor, text
):
    arena = make_arena(slots=1)
    record = add(arena, "r")
    slow = actor(
        """
        from shmroute import leases
        stop("before", leases.SharedLeases, "try_acquire")
        say(released=shmroute.release(TICKET))
        """,
        TICKET=text(record.ticket),
    )
    slow.stopped()
    assert release(record.ticket) == 1
    following = add(arena, "next")
    slow.go_on()
    assert slow.hear() == {"released": 0}
    assert arena.writer.reclaim() == 0
    with ShmRouteReader(following.ticket) as routes:
        assert is_intact(routes)


# -- a writer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "owner", "function"),
    [
        ("before", "layout", "write_record"),
        ("after", "layout", "write_record"),
        ("before", "leases.ExclusiveLeases", "release"),
    ],
)
def test_a_writer_that_stands_still_in_a_seal_keeps_nobody_from_other_records(
    actor, name, when, owner, function
):
    writer = actor(
        """
        from shmroute import layout, leases
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16)
        add(arena, "sealed")
        stop(WHEN, eval(OWNER), FUNCTION)
        add(arena, "in its seal")
        say(sealed=True)
        hear()
        """,
        WHEN=when,
        OWNER=owner,
        FUNCTION=function,
    )
    writer.stopped()
    with ShmRouteReader("sealed", arena=name) as routes:
        assert is_intact(routes)
        routes.release()
    with pytest.raises(RouteTimeout, match="still being written"):
        ShmRouteReader("in its seal", arena=name, timeout=0.02)
    assert reap(name, force=True) == []
    writer.go_on()
    assert writer.hear() == {"sealed": True}
    with ShmRouteReader("in its seal", arena=name) as routes:
        assert is_intact(routes)


# -- reaping against creation ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "owner", "function", "removed"),
    [
        ("before", "arena", "lock_range", True),
        ("after", "arena", "lock_range", False),
        ("before", "segments", "take_memory", False),
        ("before", "os", "rename", False),
        ("after", "os", "rename", False),
    ],
)
def test_an_arena_whose_creator_stands_still_is_reaped_only_without_its_life_lock(
    actor, name, files, when, owner, function, removed
):
    """Reaped, it is made anew."""
    creator = actor(
        """
        from shmroute import arena, segments
        stop(WHEN, eval(OWNER), FUNCTION)
        with Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16) as made:
            with ShmRouteReader(add(made, "r").ticket) as routes:
                say(intact=is_intact(routes))
                routes.release()
            del routes
        say(left=[entry for entry in os.listdir("/dev/shm") if NAME in entry])
        """,
        WHEN=when,
        OWNER=owner,
        FUNCTION=function,
    )
    creator.stopped()
    before = files()
    reap(name, force=True)
    assert files() == ([] if removed else before)
    creator.go_on()
    assert creator.hear() == {"intact": True}
    assert creator.hear() == {"left": []}


@pytest.mark.parametrize(
    ("owner", "function", "readable"),
    [("segments", "same_inode", True), ("reaper", "remove_files", False)],
)
def test_a_reaper_that_stands_still_stops_no_new_arena_and_takes_none_of_it(
    writer, actor, make_arena, files, owner, function, readable
):
    writer.kill()
    ticket = writer.facts["sealed"][0]
    reaper = actor(
        """
        from shmroute import reaper, segments
        stop("before", eval(OWNER), FUNCTION)
        (outcome,) = shmroute.reap(NAME, force=True)
        say(kept=outcome.kept)
        """,
        OWNER=owner,
        FUNCTION=function,
    )
    reaper.stopped()
    arena = make_arena()
    record = add(arena, "new")
    if readable:
        with ShmRouteReader(ticket) as routes:
            assert is_intact(routes)
    else:  # under the reaper's leases
        with pytest.raises((RouteTimeout, RouteGone)):
            ShmRouteReader(ticket, timeout=0.02)
    reaper.go_on()
    assert reaper.hear() == {"kept": ""}
    with pytest.raises((ArenaNotFound, RouteGone)):
        ShmRouteReader(ticket)
    with ShmRouteReader(record.ticket) as routes:
        assert is_intact(routes)
    assert {path.name.partition(".")[0] for path in files()} == {arena.segment.data}


def test_two_creators_of_one_name_of_which_one_stands_still_have_an_arena_each(
    actor, make_arena, name
):
    slow = actor("""
        stop("before", os, "rename")
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16)
        add(arena, "slow")
        say()
        hear()
    """)
    slow.stopped()
    add(make_arena(), "quick")
    slow.go_on()
    slow.hear()
    for rid in ("slow", "quick"):
        with ShmRouteReader(rid, arena=name) as routes:
            assert is_intact(routes)
