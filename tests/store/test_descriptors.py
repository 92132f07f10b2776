"""Descriptors run out: a named error with limit and remedy; nothing is lost or left behind."""

from __future__ import annotations

import os

import pytest
from actors import add, is_intact
from faults import lease_files_open

from shmroute import LeaseUnavailable, RouteGone, ShmRouteReader, reap, release
from shmroute.attached import attach, attach_all

# Tries something with 0, 1, 2, ... descriptors left until it succeeds, and tells of each try.
COUNTING_UP = """
    import gc, logging
    from faults import descriptors_left, open_descriptors
    logging.disable()  # of what a new arena could not reap

    def try_with_ever_more(attempt, files=lambda: 0):
        tries = []
        while not tries or (tries[-1]["error"] and len(tries) < 16):
            before = open_descriptors()
            try:
                with descriptors_left(len(tries)):
                    attempt()
                error = message = ""
            except Exception as caught:
                error, message = type(caught).__name__, str(caught)
            gc.collect()
            left = open_descriptors() - before
            tries.append({"error": error, "message": message, "left": left, "files": files()})
        return tries
"""


def tries_that_failed(said):
    """All but the last, which had enough descriptors; each must have failed by name."""
    *failed, succeeded = said["tries"]
    assert succeeded["error"] == ""
    assert failed
    for one in failed:
        assert one["error"] == "LeaseUnavailable", one
        assert "no file descriptor left (this process may have 64)" in one["message"]
        assert "raise the limit (ulimit -n)" in one["message"]
        assert one["left"] == 0
    return failed


@pytest.fixture
def counting_up(actor):
    """Start an actor that has ``try_with_ever_more``."""

    def start(code, **facts):
        return actor(COUNTING_UP + code, **facts)

    return start


# -- creating ----------------------------------------------------------------------------------


def test_a_creation_that_lacks_descriptors_leaves_neither_files_nor_a_life_lock(counting_up):
    said = counting_up("""
    from shmroute.arena import _life_fds
    files = lambda: [name for name in os.listdir("/dev/shm") if NAME in name] + list(_life_fds)
    made = []
    def create():
        made.append(Arena.create(NAME, LAYOUT, capacity="2MiB", slots=600))
    tries = try_with_ever_more(create, files)
    made[0].close()
    say(tries=tries, after_close=files())
    """).hear()
    failed = tries_that_failed(said)
    assert len(failed) >= 4
    assert [one["files"] for one in failed] == [[]] * len(failed)
    assert said["after_close"] == []


def test_a_close_that_lacks_descriptors_says_so_and_leaves_the_rest_to_the_reaper(
    actor, name, files
):
    code = (
        COUNTING_UP
        + """
    arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16)
    shmroute.release(add(arena, "r").ticket)
    try:
        with descriptors_left(0):
            arena.close()
    except LeaseUnavailable as error:
        say(error=str(error))
    hear()
    """
    )
    closed = actor(code)
    assert "raise the limit (ulimit -n)" in closed.hear()["error"]
    (outcome,) = reap(name)  # while that process lives
    assert outcome.kept == ""
    assert files() == []


# -- writing -----------------------------------------------------------------------------------


def test_a_reserve_that_lacks_a_descriptor_loses_neither_space_nor_slot(counting_up):
    said = counting_up("""
    arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16)
    allocator = arena.writer._allocator
    tries = try_with_ever_more(lambda: arena.reserve("r", tokens=20).fail("no"),
                               lambda: allocator.total - arena.writer._free_bytes())
    say(tries=[{**one, "left": 0} for one in tries],  # the writer keeps the descriptor it got
        slots=len({add(arena, f"r{i}").slot for i in range(16)}))
    arena.close()
    """).hear()
    (failed,) = tries_that_failed(said)
    assert failed["files"] == 0
    assert said["slots"] == 16


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["ticket", "rid"])
def test_an_opening_that_lacks_descriptors_says_so_and_never_that_there_is_no_record(
    arena, counting_up, text, by
):
    record = add(arena, "r")
    said = counting_up(
        """
    def read():
        with ShmRouteReader(SOURCE, arena=NAME, timeout=0) as routes:
            assert is_intact(routes)
    tries = try_with_ever_more(read)
    tries[-1]["left"] = 0  # the mapping keeps two
    say(tries=tries)
    """,
        SOURCE=text(record.ticket) if by == "ticket" else "r",
    ).hear()
    assert len(tries_that_failed(said)) == 4  # list, data and its mapping, control and its mapping


def test_a_release_that_lacks_a_descriptor_releases_nothing_and_can_be_tried_again(
    arena, counting_up, text
):
    record = add(arena, "r")
    said = counting_up(
        "    say(tries=try_with_ever_more(lambda: shmroute.release(TICKET)))",
        TICKET=text(record.ticket),
    ).hear()
    said["tries"][-1]["left"] = 0
    assert tries_that_failed(said)
    assert arena.writer.reclaim() == 1


def test_a_reader_that_lacks_a_descriptor_for_the_lease_can_try_again(arena, actor, text):
    code = (
        COUNTING_UP
        + """
    from shmroute.attached import attach_all
    attach_all(NAME)
    try:
        with descriptors_left(0):
            ShmRouteReader(TICKET)
    except LeaseUnavailable as error:
        said = str(error)
    say(error=said, intact=is_intact(ShmRouteReader(TICKET)))
    """
    )
    said = actor(code, TICKET=text(add(arena, "r").ticket)).hear()
    assert "raise the limit (ulimit -n)" in said["error"]
    assert said["intact"]


def test_views_without_descriptors_are_read_and_given_back(arena, actor, text):
    records = [add(arena, f"rid-{index}") for index in range(2)]
    reader = actor(
        COUNTING_UP
        + """
    held = [ShmRouteReader(ticket) for ticket in TICKETS]
    with descriptors_left(0):
        intact = all(map(is_intact, held))
        for routes in held:
            routes.release()
        del routes
        held.clear()
    say(intact=intact)
    hear()
    """,
        TICKETS=[text(record.ticket) for record in records],
    )
    assert reader.hear()["intact"]
    assert arena.writer.reclaim() == 2


def test_lease_files_are_closed_when_idle_but_for_the_last(make_arena):
    arena = make_arena(slots=1024)
    records = [add(arena, f"rid-{index}", tokens=1) for index in range(1024)]
    of_writer = lease_files_open(arena)
    held = [ShmRouteReader(record.ticket) for record in records]
    assert lease_files_open(arena) == of_writer + 4
    held.clear()
    assert lease_files_open(arena) == of_writer + 1


def test_the_lease_file_that_stays_open_makes_room_for_another(make_arena, actor, text):
    arena = make_arena(slots=512)
    records = [add(arena, f"rid-{index}", tokens=1) for index in range(300)]
    reader = actor(
        COUNTING_UP
        + """
    ShmRouteReader(TICKETS[0]).close()
    with descriptors_left(0):
        for ticket in 2 * TICKETS:
            ShmRouteReader(ticket).close()
    say(done=1)
    """,
        TICKETS=[text(records[index].ticket) for index in (0, -1)],
    )
    assert {records[index].slot // 256 for index in (0, -1)} == {0, 1}
    assert reader.hear() == {"done": 1}


def test_the_lease_file_that_stays_open_is_closed_with_its_arena(arena):
    ShmRouteReader(add(arena, "r").ticket).close()
    arena.close()
    assert lease_files_open(arena) == 1
    reap(arena.name, force=True)
    assert attach_all(arena.name) == []  # which forgets it
    assert lease_files_open(arena) == 0


def test_the_lease_file_that_stays_open_is_not_a_child_s(arena):
    ShmRouteReader(add(arena, "r").ticket).close()
    assert lease_files_open(arena) == 2
    if (child := os.fork()) == 0:
        os._exit(lease_files_open(arena))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_record_of_a_removed_arena_is_gone_also_where_its_lease_file_stayed_open(arena):
    record = add(arena, "r")
    ShmRouteReader(record.ticket).close()
    arena.close()
    reap(arena.name, force=True)
    with pytest.raises(RouteGone, match=r"its arena .* is gone"):
        ShmRouteReader(record.ticket)


# -- reaping -----------------------------------------------------------------------------------


def test_a_reaper_that_lacks_descriptors_says_so_and_the_next_one_removes_all(
    writer, counting_up, files
):
    writer.kill()
    said = counting_up("    say(tries=try_with_ever_more(lambda: shmroute.reap(NAME, force=True)))")
    assert tries_that_failed(said.hear())
    assert files() == []


def test_a_reaper_that_lacks_descriptors_leaves_a_dead_arena_s_records_readable(
    writer, counting_up, name
):
    writer.kill()
    reaper = counting_up("""
    try:
        with descriptors_left(3):
            shmroute.reap(NAME)
    except LeaseUnavailable as error:
        say(error=str(error))
    """)
    assert "cannot be reaped" in reaper.hear()["error"]
    for ticket in writer.facts["sealed"]:
        with ShmRouteReader(ticket) as routes:
            assert is_intact(routes)


# -- the error ---------------------------------------------------------------------------------


def test_what_the_kernel_refused_is_an_os_error_with_its_number(arena, actor, text):
    record = add(arena, "r")
    reader = actor(
        COUNTING_UP
        + """
    try:
        with descriptors_left(0):
            ShmRouteReader(TICKET)
    except OSError as error:
        say(error=type(error).__name__, number=error.errno)
    """,
        TICKET=text(record.ticket),
    )
    assert reader.hear() == {"error": LeaseUnavailable.__name__, "number": 24}
    with ShmRouteReader(record.ticket):
        assert attach(arena.segment).leases.held() == 1
    assert release(record.ticket) == 1
