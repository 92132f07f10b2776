"""Clocks: steps of the wall clock matter to nothing, offsets of the other clocks to no reader.

What waits or expires goes by CLOCK_MONOTONIC, what is compared between processes by CLOCK_BOOTTIME.
The wall clock is only compared with the directory's time of change, to tell whether a list of it is
settled. It cannot be stepped for one process, so its steps are injected there.
"""

from __future__ import annotations

import subprocess
import time

import pytest
from actors import add, is_intact

from shmroute import ShmRouteReader, release

# The wall clock of an actor: ``step`` moves it, and with it the directory's time of change, as the
# kernel would have noted it; any other look at it fails.
WALL_CLOCK = """
    real, ahead = time.time_ns, 0
    def forbidden(*_):
        raise AssertionError("somebody looked at the wall clock")
    def by_number(original):
        return lambda clock: forbidden() if clock == time.CLOCK_REALTIME else original(clock)
    time.time = forbidden
    time.time_ns = lambda: real() + ahead
    time.clock_gettime, time.clock_gettime_ns = map(
        by_number, (time.clock_gettime, time.clock_gettime_ns))
    def step(seconds):
        global ahead
        ahead += int(seconds * 1e9)
    def note_change():
        os.utime("/dev/shm", ns=(time.time_ns(), time.time_ns()))
"""


def test_steps_of_the_wall_clock_hide_no_arena_and_no_removal(private_shm):
    said = private_shm(
        WALL_CLOCK
        + """
    def found(rid):
        try:
            with ShmRouteReader(rid, arena=NAME, timeout=0) as routes:
                return is_intact(routes)
        except (ArenaNotFound, RouteNotFound):
            return False
    outcomes = []
    for turn, seconds in enumerate((0, 3600, -7200, 1e8, -1e8, 0.001, -0.001, -1e8, 1e8)):
        before = [found(f"rid-{turn}") for _ in range(3)]  # settled, or not
        step(seconds)
        arena = Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16)
        record = add(arena, f"rid-{turn}")
        note_change()
        there = [found(f"rid-{turn}") for _ in range(3)]
        time.sleep(0.03)
        there.append(found(f"rid-{turn}"))
        shmroute.release(record.ticket)
        step(-seconds / 2)
        arena.close()
        note_change()
        outcomes.append([any(before), all(there), found(f"rid-{turn}")])
    say(outcomes=outcomes)
    """
    ).hear()
    assert said["outcomes"] == [[False, True, False]] * 9


def test_waiting_expiring_and_reaping_do_not_look_at_the_wall_clock(private_shm):
    said = private_shm(
        WALL_CLOCK
        + """
    arena = Arena.create(NAME, LAYOUT, capacity="1MiB", slots=2, retention=0.3)
    add(arena, "first")
    in_flight = arena.reserve("in flight", tokens=1)
    waited = []
    for seconds in (1e8, -1e8):
        step(seconds)
        begun = time.monotonic()
        try:
            ShmRouteReader(in_flight.ticket, timeout=0.05)
        except RouteTimeout:
            waited.append(time.monotonic() - begun)
    step(1e8)
    try:
        arena.reserve("too early", tokens=1)
    except ArenaFull:
        early = "full"
    step(-2e8)
    time.sleep(0.4)
    late = arena.reserve("late", tokens=1).slot
    kept = []
    for retention in (3600.0, 0.0):
        if (engine := os.fork()) == 0:
            add(Arena.create(NAME + "-dead", LAYOUT, capacity="1MiB", slots=16,
                             retention=retention), "r")
            die()
        os.waitpid(engine, 0)
        step(1e8)
        kept.append(sorted(outcome.kept for outcome in shmroute.reap(NAME + "-dead")))
    say(waited=waited, early=early, late=late, kept=kept)
    """
    ).hear()
    assert all(0.05 <= seconds < 2 for seconds in said["waited"])
    assert len(said["waited"]) == 2
    assert said["early"] == "full"
    assert said["late"] == 0
    young = "1 records are neither released nor expired"
    assert said["kept"] == [[young], ["", young]]


def test_the_newest_of_two_ranks_is_told_without_the_wall_clock(private_shm):
    said = private_shm(
        WALL_CLOCK
        + """
    ranks = [Arena.create(NAME, LAYOUT, capacity="1MiB", slots=16) for _ in range(2)]
    newest = []
    for turn in range(6):
        step(1e8 if turn % 3 else -3e8)
        record = add(ranks[turn % 2], "r", tokens=turn + 1)
        with ShmRouteReader("r", arena=NAME) as routes:
            newest.append(routes.tokens)
    say(newest=newest)
    """
    ).hear()
    assert said["newest"] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def elsewhen(actor):
    """Start an actor in a time namespace that is 11 days ahead of this one."""
    prefix = ("unshare", "--time", "--monotonic", "500000", "--boottime", "1000000", "--")
    allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"no time namespace here: {allowed.stderr.decode().strip()}")
    return lambda code, **facts: actor(code, prefix=prefix, **facts)


def test_a_reader_in_another_time_namespace_reads_waits_and_releases(arena, elsewhen, text):
    record, in_flight = add(arena, "r"), arena.reserve("in flight", tokens=1)
    reader = elsewhen(
        """
        begun = time.monotonic()
        try:
            ShmRouteReader(IN_FLIGHT, timeout=0.05)
        except RouteTimeout:
            waited = time.monotonic() - begun
        with ShmRouteReader("r", arena=NAME) as routes:
            say(waited=waited, ahead=time.clock_gettime(time.CLOCK_BOOTTIME) - BOOTTIME,
                intact=is_intact(routes))
            hear()
            routes.release()
        say()
        """,
        IN_FLIGHT=text(in_flight.ticket),
        BOOTTIME=time.clock_gettime(time.CLOCK_BOOTTIME),
    )
    said = reader.hear()
    assert 0.05 <= said["waited"] < 2
    assert said["ahead"] > 900_000
    assert said["intact"]
    assert arena.writer.reclaim() == 0
    reader.say()
    reader.hear()
    reader.wait()
    assert arena.writer.reclaim() == 1
    assert release(record.ticket) == 0


def test_records_of_a_writer_in_another_time_namespace_are_read_and_live_as_long(elsewhen, name):
    writer = elsewhen("""
        arena = Arena.create(NAME, LAYOUT, capacity="1MiB", slots=1, retention=3600.0)
        add(arena, "r")
        try:
            arena.reserve("one more", tokens=1)
        except ArenaFull:
            say(full=True)
        hear()
    """)
    assert writer.hear() == {"full": True}
    with ShmRouteReader("r", arena=name) as routes:
        assert is_intact(routes)
