"""Locks that the kernel refuses (ENOLCK) or that somebody else has: nothing is lost or kept.

The kernel needs memory to lock and, within a range, to unlock. Its refusal is made by a seccomp
filter on one thread, see ``faults``; other threads go on as ever.
"""

from __future__ import annotations

import errno
import gc
import logging
import os

import pytest
from actors import LAYOUT, add, is_intact, pattern
from faults import open_descriptors, with_locks_refused

from shmroute import (
    Arena,
    LeaseUnavailable,
    RouteFailed,
    RouteTimeout,
    ShmRouteReader,
    reap,
    release,
)
from shmroute.arena import _life_fds
from shmroute.attached import attach
from shmroute.counters import read_counters


@pytest.fixture
def refused():
    """Run a function while its thread gets no lock (ENOLCK), and loses none."""
    try:
        with_locks_refused(errno.ENOLCK, lambda: None)
    except OSError as error:
        pytest.skip(f"no seccomp filter here: {error}")
    return lambda function: with_locks_refused(errno.ENOLCK, function)


@pytest.fixture
def says_so(refused):
    """The function must end in the named error with its remedy, and leave no descriptor."""

    def says_so(function):
        refusal = r"no memory for another lock: raise the memory"
        with pytest.raises(LeaseUnavailable, match=refusal):
            refused(function)  # which closes the lease file that a reader had kept open
        gc.collect()
        before = open_descriptors()
        with pytest.raises(LeaseUnavailable, match=refusal):
            refused(function)
        assert open_descriptors() == before

    return says_so


# -- taking a lease ----------------------------------------------------------------------------


def test_a_reserve_that_gets_no_lock_loses_neither_space_nor_slot(arena, says_so):
    add(arena, "r")  # its lease file is open now
    before = arena.writer._allocator.free_bytes
    says_so(lambda: arena.reserve("refused", tokens=20))
    assert arena.writer._allocator.free_bytes == before
    assert len({add(arena, f"rid-{index}").slot for index in range(15)}) == 15


def test_an_opening_that_gets_no_lock_keeps_none_and_can_be_tried_again(arena, says_so):
    record = add(arena, "r")
    ShmRouteReader(record.ticket).close()
    for source in (record.ticket, "r"):
        says_so(lambda source=source: ShmRouteReader(source, arena=arena.name, timeout=0))
    assert attach(arena.segment).leases.held() == 0
    with ShmRouteReader(record.ticket) as routes:
        assert is_intact(routes)


def test_a_release_that_gets_no_lock_releases_nothing(arena, says_so):
    record = add(arena, "r")
    ShmRouteReader(record.ticket).close()
    says_so(lambda: release(record.ticket))
    assert arena.writer.reclaim() == 0
    assert release(record.ticket) == 1


def test_a_creation_that_gets_no_life_lock_leaves_nothing(name, files, says_so):
    says_so(lambda: Arena.create(name, LAYOUT, capacity="2MiB", slots=16))
    assert files() == []
    assert not _life_fds


def test_a_reaper_that_gets_no_lock_leaves_the_arena_to_the_next(writer, name, files, says_so):
    writer.kill()
    says_so(lambda: reap(name, force=True))
    for ticket in writer.facts["sealed"]:
        with ShmRouteReader(ticket) as routes:
            assert is_intact(routes)
    del routes
    reap(name, force=True)
    assert files() == []


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES], ids=["EAGAIN", "EACCES"])
def test_a_lock_that_somebody_else_has_is_waited_for(arena, refused, code):
    record = add(arena, "r")
    with pytest.raises(RouteTimeout, match=r"still being written after 0.02 s"):
        with_locks_refused(code, lambda: ShmRouteReader(record.ticket, timeout=0.02))
    with ShmRouteReader(record.ticket) as routes:
        assert is_intact(routes)


# -- giving one back ---------------------------------------------------------------------------


@pytest.fixture
def half_sealed(arena, refused, caplog):
    """A record that is sealed, and whose lease the writer could not give back."""
    record = arena.reserve("r", tokens=20)
    record.rows[...] = pattern("r", record.generation, 20)
    with caplog.at_level(logging.ERROR, logger="shmroute"):
        refused(record.seal)
    assert f"the writer keeps its lease on slot {record.slot} for now" in caplog.text
    return record


def test_a_seal_that_cannot_unlock_is_made_up_for_by_the_next(arena, half_sealed):
    with pytest.raises(RouteTimeout):
        ShmRouteReader(half_sealed.ticket, timeout=0)
    add(arena, "another")
    with ShmRouteReader(half_sealed.ticket) as routes:
        assert is_intact(routes)
    counted = read_counters(arena.memory.counters)
    assert (counted["reserved"], counted["sealed"], counted["failed"]) == (2, 2, 0)


def test_a_seal_that_cannot_unlock_is_made_up_for_by_maintain(arena, half_sealed):
    arena.writer.maintain()
    with ShmRouteReader(half_sealed.ticket) as routes:
        assert is_intact(routes)


def test_a_seal_that_cannot_unlock_is_made_up_for_by_the_end_of_its_arena(arena, half_sealed):
    arena.close()
    with ShmRouteReader(half_sealed.ticket) as routes:
        assert is_intact(routes)


def test_a_record_whose_lease_was_not_given_back_is_not_taken_back_meanwhile(make_arena, refused):
    """Its own process's lock would not stop the writer, and the late unlock would hit the next."""
    arena = make_arena(slots=1, retention=0.0)
    record = arena.reserve("r", tokens=20)
    refused(record.seal)
    assert arena.writer.evict_expired() == 0
    arena.writer.maintain()  # unlocks it, and evicts it, since no slot is free
    assert add(arena, "next").slot == record.slot


def test_a_failed_record_that_cannot_be_unlocked_gives_its_slot_and_space_back(make_arena, refused):
    arena = make_arena(slots=1)
    record = arena.reserve("r", tokens=20)
    refused(lambda: record.fail("a CUDA error"))
    following = add(arena, "next")
    with ShmRouteReader(following.ticket) as routes:
        assert is_intact(routes)
    with pytest.raises(RouteFailed, match="a CUDA error"):
        ShmRouteReader(record.ticket)


def test_a_released_record_that_cannot_be_unlocked_gives_its_slot_and_space_back(
    make_arena, refused, monkeypatch
):
    arena = make_arena(slots=1)
    release(add(arena, "r").ticket)
    original = arena.writer._leases.release
    monkeypatch.setattr(
        arena.writer._leases, "release", lambda slot: refused(lambda: original(slot))
    )
    assert arena.writer.reclaim() == 1
    monkeypatch.undo()
    with ShmRouteReader(add(arena, "next").ticket) as routes:
        assert is_intact(routes)


@pytest.fixture
def held(make_arena):
    """Eight released records of one lease file, open here, and the arena's only slots."""
    arena = make_arena(slots=8)
    records = [add(arena, f"rid-{index}") for index in range(8)]
    open_now = [ShmRouteReader(record.ticket) for record in records]
    release([record.ticket for record in records])
    return arena, open_now


def test_a_reader_that_cannot_unlock_keeps_the_lease_and_gives_it_back_with_the_next(held, refused):
    arena, readers = held
    refused(lambda: [readers.pop(index).close() for index in (6, 3, 1)])
    leases = attach(arena.segment).leases
    assert leases.held() == 8
    assert arena.writer.reclaim() == 0
    readers.pop().close()
    assert leases.held() == 4
    assert arena.writer.reclaim() == 4
    for routes in readers:
        assert is_intact(routes)


def test_a_lease_that_could_not_be_given_back_can_be_shared_again(held, refused):
    arena, readers = held
    ticket = add_after_release(arena, readers)
    first = ShmRouteReader(ticket)
    refused(first.close)
    with ShmRouteReader(ticket) as again:
        assert is_intact(again)
        readers.pop().close()
        release(ticket)
        assert arena.writer.reclaim() == 1
        assert is_intact(again)
    del again
    assert arena.writer.reclaim() == 1


def add_after_release(arena, readers):
    """Seal a record in the slot of a reader that lets go."""
    readers.pop().close()
    assert arena.writer.reclaim() == 1
    return add(arena, "shared").ticket


@pytest.mark.parametrize("slots", [range(8), (1, 4, 6)], ids=["neighbours", "apart"])
def test_the_last_leases_of_a_file_need_no_unlock(held, refused, slots):
    arena, readers = held
    readers[:] = [readers[slot] for slot in slots]
    refused(lambda: [readers.pop().close() for _ in slots])
    assert attach(arena.segment).leases.held() == 0
    assert arena.writer.reclaim() == 8


def test_a_fork_whose_locks_are_refused_leaves_its_parent_s_alone(arena, refused, caplog):
    record = add(arena, "r")
    routes = ShmRouteReader(record.ticket)
    release(record.ticket)
    before = open_descriptors()

    def fork():
        if (child := os.fork()) == 0:
            routes.close()
            gc.collect()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert refused(fork) == 0
    assert "safe only while the parent holds them" in caplog.text
    assert open_descriptors() == before
    assert arena.writer.reclaim() == 0
    assert is_intact(routes)
    routes.close()
    assert arena.writer.reclaim() == 1
