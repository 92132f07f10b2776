"""SIGKILL at any instruction: nobody is blocked, nothing is lost without a name or leaked."""

from __future__ import annotations

import os

import pytest
from actors import add, is_intact

from shmroute import (
    ArenaNotFound,
    RouteGone,
    RouteNotFound,
    ShmRouteError,
    ShmRouteReader,
    WriterDied,
    reap,
    release,
)
from shmroute.attached import attach_all
from shmroute.reaper import is_alive
from shmroute.segments import list_segments


@pytest.fixture
def dead(writer):
    """What the killed ``writer`` had told: tickets and segment."""
    writer.kill()
    return writer.facts


# -- readers -----------------------------------------------------------------------------------


def test_a_killed_reader_s_slots_are_usable_again(make_arena, reader):
    arena = make_arena(slots=4)
    records = [add(arena, f"rid-{index}") for index in range(4)]
    killed = reader()
    for record in records:
        killed.say(record.rid)
        assert killed.hear()["intact"]
    release([record.ticket for record in records])
    assert arena.writer.reclaim() == 0
    killed.kill()
    assert arena.writer.reclaim() == 4
    for index in range(4):
        add(arena, f"again-{index}")


def test_a_killed_reader_blocks_no_other_reader(arena, reader, text):
    record = add(arena, "r")
    killed = reader()
    killed.say(text(record.ticket))
    assert killed.hear()["intact"]
    killed.kill()
    with ShmRouteReader(record.ticket) as routes:
        assert is_intact(routes)


# -- the writer --------------------------------------------------------------------------------


def test_sealed_records_of_a_killed_writer_stay_readable(name, dead):
    for index, ticket in enumerate(dead["sealed"]):
        for source in (ticket, f"rid-{index}"):
            with ShmRouteReader(source, arena=name) as routes:
                assert is_intact(routes)


def test_an_unsealed_record_of_a_killed_writer_is_writer_died(name, dead):
    for source in (dead["unsealed"], "unsealed"):
        with pytest.raises(WriterDied, match="died before it sealed this record"):
            ShmRouteReader(source, arena=name, timeout=0)


def test_a_reader_that_waits_learns_of_the_writer_s_death(writer, reader):
    waiting = reader()
    waiting.say(writer.facts["unsealed"])
    writer.kill()
    assert waiting.hear() == {"intact": False, "error": "WriterDied"}


def test_a_live_writer_is_alive_and_a_killed_one_is_not(name, writer):
    (segment,) = list_segments(name)
    assert is_alive(segment)
    assert reap(name, force=True) == []
    writer.kill()
    assert not is_alive(segment)


def test_records_of_a_killed_writer_can_be_released(name, dead):
    assert release(dead["sealed"]) == 3
    with pytest.raises(RouteGone):
        ShmRouteReader(dead["sealed"][0])
    (outcome,) = reap(name)
    assert outcome.kept == ""


# -- the reaper --------------------------------------------------------------------------------


def test_unreleased_records_keep_a_dead_arena(name, dead, files):
    (outcome,) = reap(name)
    assert outcome.kept == "3 records are neither released nor expired"
    assert files()
    with ShmRouteReader(dead["sealed"][0]) as routes:
        assert is_intact(routes)


def test_force_removes_a_dead_arena_that_nobody_reads(name, dead, files):
    (outcome,) = reap(name, force=True)
    assert outcome.kept == ""
    assert outcome.freed_bytes >= 2 << 20
    assert files() == []
    with pytest.raises((ArenaNotFound, RouteGone)):
        ShmRouteReader(dead["sealed"][0])


def test_not_even_force_removes_an_arena_under_a_lease(name, dead, files):
    with ShmRouteReader(dead["sealed"][1]) as routes:
        (outcome,) = reap(name, force=True)
        assert outcome.kept == "a reader has records open"
        assert is_intact(routes)
    (outcome,) = reap(name, force=True)
    assert outcome.kept == ""
    assert files() == []


def test_a_leased_and_released_record_outlives_reaping(name, dead):
    with ShmRouteReader(dead["sealed"][1]) as routes:
        release(dead["sealed"])
        for _ in range(2):
            reap(name, force=True)
        assert is_intact(routes)


def test_a_reader_of_a_dead_arena_that_is_killed_does_not_keep_it(name, dead, reader, files):
    killed = reader()
    killed.say(dead["sealed"][0])
    assert killed.hear()["intact"]
    killed.kill()
    reap(name, force=True)
    assert files() == []


def test_an_expired_dead_arena_is_removed(actor, name, files):
    writer = actor("""
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16, retention=0.0)
        add(arena, "r")
        say()
        hear()
    """)
    writer.hear()
    writer.kill()
    reap(name)
    assert files() == []


def test_an_infinite_retention_keeps_a_dead_arena(actor, name):
    writer = actor("""
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16, retention=float("inf"))
        add(arena, "r")
        say()
        hear()
    """)
    writer.hear()
    writer.kill()
    (outcome,) = reap(name)
    assert outcome.kept


def test_a_new_arena_of_the_name_takes_back_the_dead_one_s_unused_space(name, dead, make_arena):
    segment = next(list_segments(name))
    status = os.stat(f"/dev/shm/{segment.data}")
    assert status.st_blocks * 512 >= 2 << 20
    make_arena()
    left = os.stat(f"/dev/shm/{segment.data}").st_blocks * 512
    assert left < 64 << 10
    for ticket in dead["sealed"]:
        with ShmRouteReader(ticket) as routes:
            assert is_intact(routes)


def test_taking_back_space_leaves_the_records_around_it_whole(actor, name, files):
    """Neither page bounds nor extents of neighbours are where a hole may end."""
    writer = actor("""
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=64)
        records = [add(arena, f"rid-{index}", tokens=450 + 7 * index) for index in range(40)]
        shmroute.release([record.ticket for record in records[::2]])
        say()
        hear()
    """)
    writer.hear()
    writer.kill()
    (outcome,) = reap(name)
    assert outcome.kept == "20 records are neither released nor expired"
    assert outcome.freed_bytes > (2 << 20) - 25 * (20 << 10)
    for index in range(1, 40, 2):
        with ShmRouteReader(f"rid-{index}", arena=name) as routes:
            assert is_intact(routes)


def test_a_new_arena_of_the_name_removes_a_dead_one_that_nobody_wants(dead, make_arena, files):
    release(dead["sealed"])
    arena = make_arena()
    assert {path.name.partition(".")[0] for path in files()} == {arena.segment.data}


def test_a_new_arena_of_another_name_leaves_the_dead_one_alone(dead, name, files):
    before = files()
    release(dead["sealed"])
    reap(f"{name}-other")
    assert files() == before


def test_the_newest_arena_of_a_name_is_searched_first(dead, make_arena):
    arena = make_arena()
    record = add(arena, "rid-0")
    with ShmRouteReader("rid-0", arena=arena.name) as routes:
        assert routes.ticket[:60] == record.ticket[:60]
        assert is_intact(routes)
        assert routes._arena.segment == arena.segment
    with ShmRouteReader("rid-1", arena=arena.name) as routes:
        assert routes._arena.segment != arena.segment


LIFE = """
    arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=300)
    tickets = [add(arena, f"rid-{index}").ticket for index in range(3)]
    arena.reserve("unsealed", tokens=20)
    if RELEASED:
        shmroute.release(tickets)
    die()
"""


@pytest.fixture
def used(files):
    """Bytes of shared memory that this test's arenas take."""
    return lambda: sum(path.stat().st_blocks * 512 for path in files())


def test_ten_writer_lives_leave_no_more_than_one(actor, files, used):
    left = []
    for _ in range(10):
        actor(LIFE, RELEASED=True).wait()
        left.append((len(files()), used()))
    assert left == [left[0]] * 10


def test_ten_writer_lives_with_unreleased_records_keep_little_more_than_these(actor, used):
    left = []
    for _ in range(10):
        actor(LIFE, RELEASED=False).wait()
        left.append(used())
    assert left[-1] - left[0] < 9 * (128 << 10)


# -- death while an arena is created -----------------------------------------------------------

STEPS = [
    ("segments", "create_object", 1),
    ("arena", "lock_range", 1),
    ("segments", "same_inode", 1),
    ("os", "posix_fallocate", 1),
    ("segments", "take_memory", 1),
    ("segments", "create_object", 2),
    ("segments", "take_memory", 2),
    ("segments", "create_object", 3),
    ("segments", "create_object", 4),
    ("os", "pwrite", 1),
    ("layout", "initialise", 1),
    ("arena", "RecordWriter", 1),
]


@pytest.fixture(params=STEPS, ids=lambda step: f"{step[0]}.{step[1]}-{step[2]}")
def killed_in_creation(request, actor):
    module, function, calls = request.param
    killed = actor(
        """
        import importlib
        module = os if MODULE == "os" else importlib.import_module("shmroute." + MODULE)
        die_after(module, FUNCTION, CALLS)
        Arena.create(NAME, LAYOUT, capacity="2MiB", slots=300)
        say(alive=True)
        """,
        MODULE=module,
        FUNCTION=function,
        CALLS=calls,
    )
    assert killed.wait() == -9
    return killed


def test_a_writer_killed_in_any_step_of_creation_leaves_nothing_after_the_reaper(
    killed_in_creation, name, files
):
    assert files()
    reap(name)
    assert files() == []


@pytest.mark.parametrize("killed_in_creation", STEPS[:-1], indirect=True, ids=str)
def test_half_an_arena_is_never_found(killed_in_creation, name):
    assert attach_all(name) == []
    with pytest.raises(ArenaNotFound):
        ShmRouteReader("r", arena=name, timeout=0)


def test_a_writer_killed_right_after_the_rename_leaves_a_whole_arena(actor, name, files):
    killed = actor("""
        die_after(os, "rename")
        Arena.create(NAME, LAYOUT, capacity="2MiB", slots=300)
    """)
    assert killed.wait() == -9
    with pytest.raises(RouteNotFound):
        ShmRouteReader("r", arena=name, timeout=0)
    reap(name)
    assert files() == []


@pytest.mark.parametrize("removals", [1, 2, 3, 4])
def test_a_reaper_killed_while_it_removes_leaves_what_the_next_one_finds(
    actor, dead, name, files, removals
):
    killed = actor(
        """
        from shmroute import segments
        die_after(segments, "unlink_if_present", CALLS)
        shmroute.reap(NAME, force=True)
        """,
        CALLS=removals,
    )
    killed.wait()
    reap(name, force=True)
    assert files() == []


def test_an_error_in_creation_leaves_nothing(actor, files):
    failing = actor("""
        from shmroute import layout
        def initialise(*_):
            raise RuntimeError("the disk of shared memory broke")
        layout.initialise = initialise
        try:
            Arena.create(NAME, LAYOUT, capacity="2MiB", slots=300)
        except RuntimeError as error:
            say(error=str(error))
    """)
    assert "broke" in failing.hear()["error"]
    assert files() == []


def test_creators_and_reapers_at_once_never_break_each_other(actor, name, files):
    creator = """
        for turn in range(20):
            with Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16) as arena:
                record = add(arena, f"r{turn}")
                with ShmRouteReader(record.ticket) as routes:
                    assert is_intact(routes)
                    routes.release()
        say(done=True)
    """
    reaper = """
        until = time.monotonic() + 3
        while time.monotonic() < until:
            shmroute.reap(NAME, force=True)
        say(done=True)
    """
    actors = [actor(code) for code in (creator, creator, reaper)]
    for one in actors:
        assert one.hear() == {"done": True}
    assert files() == []


# -- close -------------------------------------------------------------------------------------


def test_closing_an_arena_without_wanted_records_removes_it(make_arena, files):
    arena = make_arena()
    release(add(arena, "r").ticket)
    arena.close()
    assert files() == []


def test_closing_an_arena_keeps_unreleased_records(arena):
    record = add(arena, "r")
    arena.close()
    with ShmRouteReader(record.ticket) as routes:
        assert is_intact(routes)


def test_a_closed_arena_takes_no_record(arena):
    arena.close()
    with pytest.raises(ShmRouteError, match="closed"):
        arena.reserve("r", tokens=1)


def test_a_record_in_flight_when_its_arena_closes_is_never_sealed(arena):
    add(arena, "keeps the arena")
    record = arena.reserve("r", tokens=20)
    arena.close()
    with pytest.raises(ShmRouteError, match="its arena was closed before the seal"):
        record.seal()
    with pytest.raises(WriterDied):
        ShmRouteReader(record.ticket, timeout=0)


def test_an_infinite_retention_can_be_closed(make_arena):
    arena = make_arena(retention=float("inf"))
    record = add(arena, "r")
    arena.close()
    with ShmRouteReader(record.ticket) as routes:
        assert is_intact(routes)
