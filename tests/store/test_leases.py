"""Leases that end together: each once, no neighbour's."""

from __future__ import annotations

import gc
import random
import threading

import pytest
from actors import add

from shmroute import IncompleteRoutes, ShmRouteReader
from shmroute import leases as leases_module
from shmroute.attached import attach
from shmroute.leases import ExclusiveLeases, HeldLeases, SharedLeases
from shmroute.opening import Opener
from shmroute.ticket import decode

SLOTS = 600  # three lease files


@pytest.fixture
def big(make_arena):
    return make_arena(slots=SLOTS)


@pytest.fixture
def leases(big):
    return SharedLeases(big.segment.lease_file)


@pytest.fixture
def taken_by_readers(big):
    """Slots that the writer could not have now."""

    def look():
        writer = ExclusiveLeases(big.segment.lease_file)
        busy = {slot for slot in range(SLOTS) if not writer.try_acquire(slot)}
        writer.close()
        return busy

    return look


def test_neighbours_end_together_and_nobody_else(leases, taken_by_readers):
    held = set(range(250, 262)) | {300, 301, 511, 512}
    for slot in held:
        assert leases.try_acquire(slot)
    ending = [261, 254, 255, 256, 257, 300, 511, 512]
    leases.drop(ending)
    assert taken_by_readers() == held - set(ending)
    assert leases.held() == len(held) - len(ending)
    leases.drop(held - set(ending))
    assert taken_by_readers() == set()


def test_a_slot_that_was_leased_twice_ends_with_the_second_drop(leases, taken_by_readers):
    for slot in (4, 5, 5, 6):
        assert leases.try_acquire(slot)
    leases.drop([4, 5, 6])
    assert taken_by_readers() == {5}
    leases.drop([5])
    assert taken_by_readers() == set()


def test_any_order_of_takes_and_drops_leaves_what_is_held(leases, taken_by_readers):
    choose = random.Random(7)
    held: dict[int, int] = {}
    for _ in range(40):
        for slot in choose.sample(range(240, 270), 12):
            assert leases.try_acquire(slot)
            held[slot] = held.get(slot, 0) + 1
        ending = choose.sample(sorted(held), min(len(held), 14))
        leases.drop(ending)
        for slot in ending:
            held[slot] -= 1
            if not held[slot]:
                del held[slot]
        assert taken_by_readers() == set(held)
    leases.drop([slot for slot, count in held.items() for _ in range(count)])
    assert taken_by_readers() == set()


def test_held_leases_end_with_their_owner(leases, taken_by_readers):
    held = HeldLeases(leases)
    assert all(held.try_acquire(slot) for slot in (1, 2, 3))
    held.drop_last()
    assert taken_by_readers() == {1, 2}
    del held
    assert taken_by_readers() == set()


def test_leases_end_that_are_collected_together_with_all_that_keeps_them(big, taken_by_readers):
    """The collector ends the members of a cycle in any order."""
    shared = SharedLeases(big.segment.lease_file)
    held = HeldLeases(shared)
    assert all(held.try_acquire(slot) for slot in (1, 2, 300))
    cycle = [shared, held]
    cycle.append(cycle)
    del shared, held, cycle
    gc.collect()
    assert taken_by_readers() == set()


def test_a_lock_that_was_taken_as_a_handler_raised_is_not_kept(
    leases, taken_by_readers, monkeypatch
):
    original = leases_module._set_lock

    def interrupted(fd, request):
        original(fd, request)
        raise KeyboardInterrupt

    monkeypatch.setattr(leases_module, "_set_lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        leases.try_acquire(5)
    monkeypatch.undo()
    assert leases.try_acquire(6)
    assert taken_by_readers() == {6}
    leases.drop([6])


def test_a_drop_does_not_wait_for_who_is_at_work_on_the_leases(leases, taken_by_readers):
    """It may come out of a finaliser on the very thread that is at work, which never would end."""
    assert leases.try_acquire(5)
    with leases._lock:
        dropping = threading.Thread(target=leases.drop, args=([5],))
        dropping.start()
        dropping.join(5)
        assert not dropping.is_alive()
        assert taken_by_readers() == {5}
    assert leases.try_acquire(6)  # whoever is at work next ends it, too
    assert taken_by_readers() == {6}
    leases.drop([6])
    assert taken_by_readers() == set()


def test_a_record_that_is_refused_leaves_those_opened_before_leased(arena):
    good = add(arena, "good")
    holes = add(arena, "holes", missing=[(2, 4)])
    opener = Opener(None, allow_missing=False)
    record = opener.open(decode(good.ticket), 0)
    with pytest.raises(IncompleteRoutes):
        opener.open(decode(holes.ticket), 0)
    leases = attach(arena.segment).leases
    assert leases.held() == 1
    opener.close()
    assert leases.held() == 1  # the record keeps it
    del record
    assert leases.held() == 0


def test_records_of_one_opener_end_with_the_last_of_them(arena):
    tickets = [add(arena, f"rid-{index}").ticket for index in range(3)]
    opener = Opener(None, allow_missing=False)
    records = [opener.open(decode(ticket), 0) for ticket in tickets]
    opener.close()
    with ShmRouteReader(tickets[1]):
        last = records.pop()
        del records
        leases = attach(arena.segment).leases
        assert leases.held() == 3
        del last
        assert leases.held() == 1  # the reader's own
