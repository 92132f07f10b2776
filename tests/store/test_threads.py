"""Threads: leases are counted right however opens, closes and finalisers interleave."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import pytest
from actors import add, is_intact, pattern

from shmroute import ArenaFull, ShmRouteReader, release
from shmroute.attached import attach
from shmroute.counters import read_counters
from shmroute.leases import ExclusiveLeases


@pytest.fixture
def switching():
    """Let threads switch as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def together(switching):
    """Run functions in threads for a second; an exception in one is the test's."""

    def together(*functions):
        until, failures = time.monotonic() + 1.0, []

        def run(function):
            try:
                while time.monotonic() < until and not failures:
                    function()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(function,)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    return together


@pytest.fixture
def leases(arena):
    """This process's leases on the arena."""
    return lambda: attach(arena.segment).leases


def test_threads_that_share_a_slot_share_its_lease(arena, together, leases):
    record = add(arena, "r")

    def open_and_close():
        with ShmRouteReader(record.ticket) as routes:
            assert is_intact(routes)

    together(*[open_and_close] * 6)
    assert leases().held() == 0
    release(record.ticket)
    assert arena.writer.reclaim() == 1


def test_views_that_are_collected_during_opens_drop_their_lease_once(arena, together, leases):
    record = add(arena, "r")

    def drop_in_a_cycle():
        cycle = [ShmRouteReader(record.ticket).numpy()]
        cycle.append(cycle)

    before = gc.get_threshold()
    gc.set_threshold(5)
    try:
        together(*[drop_in_a_cycle] * 4)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert leases().held() == 0
    release(record.ticket)
    assert arena.writer.reclaim() == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forks_amid_opens_and_closes_give_each_child_leases_of_its_own(arena, together, leases):
    """Whatever the other threads were in the middle of."""
    records = [add(arena, f"rid-{index}") for index in range(3)]
    kept = ShmRouteReader(records[0].ticket)

    def open_and_close():
        for record in records:
            with ShmRouteReader(record.ticket) as routes:
                assert is_intact(routes)

    def read_in_child():
        with ShmRouteReader(records[1].ticket) as routes:
            return is_intact(routes) and is_intact(kept)

    def fork():
        if (child := os.fork()) == 0:
            signal.alarm(20)
            status = 1
            try:
                status = not read_in_child()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    together(*[open_and_close] * 3, fork)
    release([record.ticket for record in records])
    assert arena.writer.reclaim() == 2
    assert is_intact(kept)
    kept.close()
    assert leases().held() == 0
    assert arena.writer.reclaim() == 1


def test_reserving_sealing_reclaiming_and_reading_at_once_lose_nothing(make_arena, together):
    arena = make_arena(slots=32)
    tickets, turn = [], iter(range(1 << 30))

    def write():
        try:
            record = add(arena, f"rid-{next(turn)}", tokens=10)
        except ArenaFull:
            return
        tickets.append(record.ticket)

    def fail():
        try:
            arena.reserve(f"failed-{next(turn)}", tokens=10).fail("no")
        except ArenaFull:
            return

    def read():
        if tickets:
            ticket = tickets.pop()
            with ShmRouteReader(ticket) as routes:
                assert is_intact(routes)
                routes.release()

    together(write, write, fail, read, read, arena.writer.maintain)
    for ticket in tickets:
        release(ticket)
    arena.writer.reclaim()
    arena.writer._take_back()
    assert arena.writer._allocator.free_bytes == arena.writer._allocator.total
    assert sorted(arena.writer._free_slots) == list(range(32))
    counted = read_counters(arena.memory.counters)
    assert counted["reserved"] == counted["sealed"] + counted["failed"] > 50


@pytest.fixture
def replaced_after_the_scan(monkeypatch):
    """Have a record come where the next scan found another; the list that it is put into."""

    def replaced_after_the_scan(arena):
        original, new = arena.writer._recycle_all, []

        def late(*arguments, **options):
            monkeypatch.undo()
            new.append(add(arena, "new"))
            return original(*arguments, **options)

        monkeypatch.setattr(arena.writer, "_recycle_all", late)
        return new

    return replaced_after_the_scan


def test_an_eviction_never_takes_a_record_that_came_after_its_scan(
    make_arena, replaced_after_the_scan
):
    """Two threads reclaim at once: what one scanned the other may have replaced."""
    arena = make_arena(slots=1, retention=0.05)
    add(arena, "old")
    time.sleep(0.1)
    new = replaced_after_the_scan(arena)
    assert arena.writer.evict_expired() == 0
    with ShmRouteReader(new[0].ticket) as routes:
        assert is_intact(routes)


def test_a_reclaim_never_takes_a_record_that_came_after_its_scan(
    make_arena, replaced_after_the_scan
):
    arena = make_arena(slots=1)
    release(add(arena, "old").ticket)
    new = replaced_after_the_scan(arena)
    assert arena.writer.reclaim() == 0
    with ShmRouteReader(new[0].ticket) as routes:
        assert is_intact(routes)


def test_reclaiming_during_a_seal_takes_other_records_and_leaves_that_one(make_arena, monkeypatch):
    """The writer's own lock does not stop it between the even word and the end of the lease."""
    arena = make_arena(retention=0.0)
    released, record = add(arena, "released"), arena.reserve("r", tokens=20)
    record.rows[...] = pattern("r", record.generation, 20)
    release(released.ticket)
    writer, original, recycled = arena.writer, ExclusiveLeases.release, []

    def unlock(self, slot):
        monkeypatch.undo()
        assert arena.memory.words[slot] == record.generation
        recycled.extend([writer.reclaim(), writer.evict_expired()])
        return original(self, slot)

    monkeypatch.setattr(ExclusiveLeases, "release", unlock)
    record.seal()
    assert recycled == [1, 0]
    with ShmRouteReader(record.ticket) as routes:
        assert is_intact(routes)


def test_closing_waits_for_the_seal_that_is_under_way(make_arena, switching):
    for _ in range(10):
        arena = make_arena()
        records = [arena.reserve(f"r{index}", tokens=1) for index in range(16)]
        outcomes = []

        def seal(records=records, outcomes=outcomes):
            for record in records:
                try:
                    record.rows[...] = 1
                    record.seal()
                    outcomes.append("sealed")
                except Exception as error:
                    outcomes.append(str(error))

        thread = threading.Thread(target=seal)
        thread.start()
        arena.close()
        thread.join()
        assert {outcome for outcome in outcomes if "closed before the seal" not in outcome} <= {
            "sealed"
        }
