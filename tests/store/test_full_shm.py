"""No room: a /dev/shm that is full, also in the middle of a run, and limits of files and memory."""

from __future__ import annotations

import os
import re

import pytest
from actors import add

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# Names what an arena that cannot be made raised, and what is left of it.
FAILING = """
    import resource
    def creating(**options):
        before = len(os.listdir("/proc/self/fd"))
        try:
            Arena.create(NAME, LAYOUT, **{"slots": 16, **options})
        except ShmRouteError as error:
            say(error=type(error).__name__, message=str(error), number=getattr(error, "errno", 0),
                left=[name for name in os.listdir("/dev/shm") if NAME in name],
                descriptors=len(os.listdir("/proc/self/fd")) - before)
"""


def refused(said, error, message):
    assert said["error"] == error, said
    assert re.search(message, said["message"]), said
    assert said["left"] == []
    assert said["descriptors"] == 0


# -- when an arena is made ---------------------------------------------------------------------


def test_a_dev_shm_without_room_for_the_control_segment_is_arena_too_small(private_shm):
    said = private_shm(FAILING + '    creating(capacity="8MiB")').hear()
    refused(said, "ArenaTooSmall", r"0\.0 MiB can be had .*the size of /dev/shm")


@pytest.mark.parametrize("inodes", [2, 3, 4])
def test_a_dev_shm_without_room_for_another_file_is_arena_too_small(private_shm, inodes):
    """It lets so many files be, its own directory one of them; two lease files make it four."""
    started = private_shm(
        FAILING + '    creating(capacity="2MiB", slots=300)', f"size=8m,nr_inodes={inodes}"
    )
    refused(started.hear(), "ArenaTooSmall", r"no room for another file: .*nr_inodes")


def test_a_limit_of_file_sizes_is_arena_too_small_with_the_limit(actor):
    said = actor(
        FAILING
        + """
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    creating(capacity="2MiB")
    """
    ).hear()
    refused(said, "ArenaTooSmall", r"may have 1048576 bytes: raise the limit \(ulimit -f\)")


ADDRESS_SPACE = """
    def leave_address_space(spare):
        with open("/proc/self/statm") as sizes:
            pages = int(sizes.read().split()[0])
        most = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
"""


def test_a_writer_without_address_space_is_lease_unavailable_with_the_limit(actor):
    said = actor(
        FAILING
        + ADDRESS_SPACE
        + """
    leave_address_space(8 << 20)
    creating(capacity="64MiB")
    """
    ).hear()
    refused(said, "LeaseUnavailable", r"may map \d{8,} bytes\): raise the limit \(ulimit -v\)")


def test_a_reader_without_address_space_is_lease_unavailable_and_can_try_again(make_arena, actor):
    add(make_arena(capacity="64MiB"), "r")
    said = actor(
        "    import resource"
        + ADDRESS_SPACE
        + """
    leave_address_space(8 << 20)
    try:
        ShmRouteReader("r", arena=NAME)
    except LeaseUnavailable as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    say(error=said, intact=is_intact(ShmRouteReader("r", arena=NAME)))
    """
    ).hear()
    assert "raise the limit (ulimit -v)" in said["error"]
    assert said["intact"]


@root_only
def test_a_process_that_locks_its_memory_and_may_not_lock_an_arena_is_told_so(actor):
    """mmap then is EAGAIN, which of a lock would mean that somebody else has it."""
    said = actor(
        FAILING
        + """
    import ctypes
    libc, MCL_FUTURE = ctypes.CDLL(None), 2
    os.setgroups([]); os.setgid(65534); os.setuid(65534)  # root may lock all
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 << 20, 4 << 20))
    assert libc.mlockall(MCL_FUTURE) == 0
    creating(capacity="64MiB")
    """
    ).hear()
    refused(said, "LeaseUnavailable", r"may lock 4194304 bytes: raise the limit \(ulimit -l\)")


# -- in the middle of a run --------------------------------------------------------------------

FILL = """
    def fill():
        with open("/dev/shm/somebody-else-s", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as error:
                return error.errno
"""


def test_an_arena_goes_on_when_somebody_else_fills_dev_shm(private_shm):
    """Its memory is its own: neither it nor a reader that comes later takes any more."""
    run = private_shm(
        FILL
        + """
    arena = Arena.create(NAME, LAYOUT, capacity="4MiB", slots=64)
    number = fill()
    def intact(source):
        with ShmRouteReader(source, arena=NAME) as routes:
            return is_intact(routes)
    read = 0
    for index in range(200):
        record = add(arena, f"rid-{index}", tokens=900)
        read += intact(record.rid)
        shmroute.release(record.ticket)
    kept = []
    try:
        while True:
            kept.append(add(arena, f"kept-{len(kept)}", tokens=900).ticket)
    except ArenaFull:
        inline = arena.inline("inline", pattern("inline", 0, 900))
    say(number=number, read=read, kept=len(kept), inline=ShmRouteReader(inline).tokens,
        intact=sum(map(intact, kept)))
    shmroute.release(kept)
    arena.writer.reclaim()
    say(free=arena.writer._free_bytes() == arena.writer._allocator.total)
    try:
        Arena.create(NAME + "-2", LAYOUT, capacity="2MiB", slots=16)
    except ArenaTooSmall as error:
        say(error=str(error))
    arena.close()
    say(left=os.listdir("/dev/shm"))
    """
    )
    assert run.hear() == {"number": 28, "read": 200, "kept": 64, "inline": 900, "intact": 64}
    assert run.hear() == {"free": True}
    assert "0.0 MiB can be had" in run.hear()["error"]
    assert run.hear() == {"left": ["somebody-else-s"]}


def test_a_new_arena_has_what_a_dead_one_gives_back_when_dev_shm_is_full(private_shm):
    run = private_shm(
        FILL
        + """
    if (engine := os.fork()) == 0:
        arena = Arena.create(NAME, LAYOUT, capacity="4MiB", slots=16)
        add(arena, "of the dead")
        die()
    os.waitpid(engine, 0)
    number = fill()
    arena = Arena.create(NAME, LAYOUT, capacity="3MiB", slots=16)
    add(arena, "of the living")
    for rid in ("of the dead", "of the living"):
        with ShmRouteReader(rid, arena=NAME, timeout=0) as routes:
            assert is_intact(routes)
    say(number=number)
    """
    )
    assert run.hear() == {"number": 28}
