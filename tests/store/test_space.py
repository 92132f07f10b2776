"""Space: used again when released or expired, never under a lease, and counted."""

from __future__ import annotations

import time

import pytest
from actors import add, is_intact, pattern

from shmroute import (
    ArenaFull,
    ArenaNotFound,
    RouteFailed,
    RouteGone,
    RouteLayout,
    RouteNotFound,
    ShmRouteReader,
    release,
)
from shmroute.counters import read_counters
from shmroute.leases import SharedLeases

TOKENS = 5000  # of LAYOUT: 160 kB, so that a 2 MiB arena holds twelve


@pytest.fixture
def counters(arena):
    return lambda: read_counters(arena.memory.counters)


@pytest.fixture
def full(arena):
    """The tickets that fill the arena's heap."""
    tickets = []
    while True:
        try:
            tickets.append(add(arena, f"rid-{len(tickets)}", TOKENS).ticket)
        except ArenaFull:
            return tickets


# -- full --------------------------------------------------------------------------------------


def test_a_full_heap_is_arena_full_with_figures_and_remedy(arena, full):
    with pytest.raises(ArenaFull) as caught:
        arena.reserve("one more", tokens=TOKENS)
    message = str(caught.value)
    free, total = arena.writer._allocator.free_bytes, arena.writer._allocator.total
    assert f"{free} of {total} heap bytes are free" in message
    assert f"{16 - len(full)} of 16 slots" in message
    assert "release" in message


def test_no_free_slot_is_arena_full_with_figures(arena):
    for index in range(16):
        add(arena, f"rid-{index}", tokens=1)
    with pytest.raises(ArenaFull, match=r"has not a free slot: .* 0 of 16 slots"):
        arena.reserve("one more", tokens=1)


def test_a_full_arena_loses_no_space(arena, full):
    before = arena.writer._allocator.free_bytes
    for _ in range(5):
        with pytest.raises(ArenaFull):
            arena.reserve("one more", tokens=TOKENS)
    assert arena.writer._allocator.free_bytes == before


def test_a_record_larger_than_the_heap_is_arena_full(arena):
    with pytest.raises(ArenaFull):
        arena.reserve("r", tokens=1 << 20)


# -- release -----------------------------------------------------------------------------------


def test_released_space_is_used_again(arena, full):
    assert release(full) == len(full)
    for index in range(3 * len(full)):
        record = add(arena, f"again-{index}", TOKENS)
        assert release(record.ticket) == 1


def test_a_slot_gets_a_new_generation_every_time(arena):
    seen = set()
    for index in range(40):
        record = add(arena, "same", tokens=1)
        assert record.generation not in seen
        seen.add(record.generation)
        if index % 3:
            release(record.ticket)
        arena.writer.reclaim()


def test_a_record_under_a_lease_is_not_used_again_even_when_released(arena, full):
    with ShmRouteReader(full[0]) as routes:
        release(full)
        for index in range(2 * len(full)):
            release(add(arena, f"again-{index}", TOKENS).ticket)
        assert is_intact(routes)
    assert arena.writer.reclaim() >= 1


def test_a_released_record_is_route_gone_by_ticket_and_by_rid(arena):
    record = add(arena, "r")
    release(record.ticket)
    for source in (record.ticket, "r"):
        with pytest.raises(RouteGone, match="released or evicted"):
            ShmRouteReader(source, arena=arena.name)


def test_a_released_record_is_route_gone_after_its_slot_is_free(arena):
    record = add(arena, "r")
    release(record.ticket)
    arena.writer.reclaim()
    for source in (record.ticket, "r"):
        with pytest.raises(RouteGone):
            ShmRouteReader(source, arena=arena.name)


def test_a_released_record_is_route_gone_after_its_slot_holds_another(make_arena):
    arena = make_arena(slots=1)
    record = add(arena, "r")
    release(record.ticket)
    other = add(arena, "other")
    assert other.slot == record.slot
    with pytest.raises(RouteGone):
        ShmRouteReader(record.ticket)
    with pytest.raises(RouteNotFound):
        ShmRouteReader("r", arena=arena.name, timeout=0)


def test_an_evicted_record_is_route_gone_after_its_slot_holds_the_like(make_arena):
    """Nobody released it, and the slot's next record has its rid and its shape."""
    arena = make_arena(slots=1, retention=0.0)
    evicted, record = add(arena, "r"), add(arena, "r")
    assert record.slot == evicted.slot
    with pytest.raises(RouteGone):
        ShmRouteReader(evicted.ticket)
    with ShmRouteReader(record.ticket) as routes:
        assert is_intact(routes)


def test_a_released_record_has_not_the_failure_of_another_in_the_same_slot(make_arena):
    arena = make_arena(slots=1)
    arena.reserve("failing", tokens=1).fail("a CUDA error")
    record = add(arena, "r")
    release(record.ticket)
    arena.writer.reclaim()
    for source in (record.ticket, "r"):
        with pytest.raises(RouteGone):
            ShmRouteReader(source, arena=arena.name)


def test_release_is_idempotent(arena):
    record = add(arena, "r")
    assert [release(record.ticket) for _ in range(3)] == [1, 0, 0]
    assert arena.writer.reclaim() == 1
    assert release([record.ticket]) == 0


def test_releasing_twice_through_one_reader_is_fine(arena):
    with ShmRouteReader(add(arena, "r").ticket) as routes:
        routes.release()
        routes.release()
    assert arena.writer.reclaim() == 1


def test_release_works_from_another_process(arena, actor, text):
    records = [add(arena, f"rid-{index}") for index in range(3)]
    other = actor(
        "say(released=shmroute.release(TICKETS))",
        TICKETS=[text(record.ticket) for record in records],
    )
    assert other.hear() == {"released": 3}
    other.wait()
    assert arena.writer.reclaim() == 3


def test_release_takes_failed_inline_and_removed_ones_as_released(make_arena, arena):
    failed = arena.reserve("failed", tokens=1)
    failed.fail("no")
    inline = arena.inline("inline", failed.rows)
    other = make_arena()
    removed = add(other, "removed")
    with ShmRouteReader(removed.ticket) as routes:
        routes.release()
    del routes
    other.close()
    with pytest.raises((ArenaNotFound, RouteGone)):
        ShmRouteReader(removed.ticket)
    assert release([failed.ticket, inline, removed.ticket]) == 0


def test_a_late_release_of_an_earlier_life_does_not_touch_the_next(make_arena):
    arena = make_arena(slots=1)
    first = add(arena, "first")
    release(first.ticket)
    second = add(arena, "second")
    assert release(first.ticket) == 0
    assert arena.writer.reclaim() == 0
    with ShmRouteReader(second.ticket) as routes:
        assert is_intact(routes)


def test_released_records_behind_many_leased_ones_are_found(make_arena):
    arena = make_arena(slots=80)
    records = [add(arena, f"rid-{index}", tokens=1) for index in range(80)]
    held = [ShmRouteReader(record.ticket) for record in records[:70]]
    release([record.ticket for record in records])
    assert arena.reserve("one more", tokens=1).slot >= 70
    assert held


# -- eviction ----------------------------------------------------------------------------------


def test_expired_records_stay_while_there_is_room(make_arena):
    arena = make_arena(retention=0.0)
    records = [add(arena, f"rid-{index}", TOKENS) for index in range(6)]
    for record in records:
        with ShmRouteReader(record.ticket) as routes:
            assert is_intact(routes)


def test_expired_records_are_evicted_the_oldest_first_when_space_is_needed(make_arena):
    arena = make_arena(retention=0.0)
    records = [add(arena, f"rid-{index}", TOKENS) for index in range(16)]
    outcomes = []
    for record in records:
        try:
            ShmRouteReader(record.ticket).close()
            outcomes.append("here")
        except RouteGone:
            outcomes.append("gone")
    gone = outcomes.count("gone")
    assert 0 < gone < 16
    assert outcomes == ["gone"] * gone + ["here"] * (16 - gone)
    assert read_counters(arena.memory.counters)["evicted"] == gone


def test_an_unexpired_record_is_never_evicted(make_arena):
    arena = make_arena(retention=3600.0, slots=4)
    records = [add(arena, f"rid-{index}") for index in range(4)]
    with pytest.raises(ArenaFull):
        arena.reserve("one more", tokens=1)
    for record in records:
        with ShmRouteReader(record.ticket) as routes:
            assert is_intact(routes)


def test_an_expired_record_under_a_lease_is_not_evicted(make_arena):
    arena = make_arena(retention=0.0, slots=4)
    records = [add(arena, f"rid-{index}") for index in range(4)]
    with ShmRouteReader(records[0].ticket) as routes:
        for index in range(12):
            add(arena, f"more-{index}")
        assert is_intact(routes)
    assert release(records[0].ticket) == 1


def test_retention_is_in_seconds(make_arena):
    arena = make_arena(retention=0.3, slots=1)
    add(arena, "first")
    with pytest.raises(ArenaFull):
        arena.reserve("second", tokens=1)
    time.sleep(0.4)
    assert arena.reserve("second", tokens=1)


def test_keep_versions_lets_old_weights_be_evicted(make_arena):
    arena = make_arena(keep_versions=2, slots=2)
    arena.writer.weight_epoch = 1
    old = add(arena, "old")
    arena.writer.weight_epoch = 2
    kept = add(arena, "kept", versions=[(0, 1, "one"), (5, 2, "two")])
    with pytest.raises(ArenaFull):
        arena.reserve("r", tokens=1)
    arena.writer.weight_epoch = 3
    add(arena, "new")
    with pytest.raises(RouteGone):
        ShmRouteReader(old.ticket)
    with ShmRouteReader(kept.ticket) as routes:
        assert is_intact(routes)


def test_eviction_goes_on_until_one_piece_is_large_enough(make_arena):
    arena = make_arena(retention=0.0, slots=200)
    size = arena.writer._allocator.total
    small = RouteLayout(256, 8, range(4)).row_bytes
    tokens = size // 40 // small
    records = []
    while True:
        record = arena.reserve(f"rid-{len(records)}", tokens=tokens)
        record.rows[...] = 0
        if arena.writer._allocator.largest < record.plan.total_bytes:
            record.fail("the last one stays free")
            break
        records.append(record)
    # Sealed so that the oldest ones lie apart from each other.
    for record in records[::2] + records[1::2]:
        record.seal()
    assert arena.reserve("large", tokens=3 * tokens)


def test_a_slot_that_lacks_costs_one_expired_record_however_large_the_new_one(make_arena):
    arena = make_arena(retention=0.0, slots=16)
    for index in range(16):
        add(arena, f"rid-{index}", tokens=1)
    add(arena, "large", TOKENS)
    assert read_counters(arena.memory.counters)["evicted"] == 1


@pytest.mark.parametrize("maintained", [False, True])
def test_a_slot_that_lacks_costs_the_oldest_expired_record_not_the_smallest(make_arena, maintained):
    arena = make_arena(retention=0.0, slots=2, maintained=maintained)
    oldest, smaller = add(arena, "oldest", tokens=40), add(arena, "smaller", tokens=1)
    add(arena, "new", tokens=1)
    with pytest.raises(RouteGone):
        ShmRouteReader(oldest.ticket)
    with ShmRouteReader(smaller.ticket) as routes:
        assert is_intact(routes)


@pytest.fixture
def maintained(make_arena):
    """A full arena beside whose reserving thread another maintains, and its expired records: each
    second of the heap is among the older ones, which are more than are evicted at once.
    """
    arena = make_arena(retention=0.0, slots=1024, maintained=True)
    size = arena.writer._allocator.total // 800
    tokens = size // arena.memory.description.routes.row_bytes * 7 // 8
    records = []
    while arena.writer._allocator.largest >= size:
        records.append(arena.reserve(f"rid-{len(records)}", tokens=tokens))
    for record in records[::2] + records[1::2]:
        record.rows[...] = pattern(record.rid, record.generation, tokens)
        record.seal()
    return arena, records


def test_a_maintained_writer_evicts_neighbours_and_no_more_than_make_room(maintained):
    """Evicted are few at once: the oldest would lie apart from each other."""
    arena, records = maintained
    size = records[0].plan.total_bytes
    assert arena.reserve("large", tokens=5 * records[0].tokens).plan.total_bytes > 4 * size
    assert read_counters(arena.memory.counters)["evicted"] <= 6


def test_a_maintained_writer_finds_room_beside_what_is_leased(maintained):
    arena, records = maintained
    held = [ShmRouteReader(record.ticket) for record in records[4:300:5]]
    assert arena.reserve("large", tokens=3 * records[0].tokens)
    assert all(map(is_intact, held))


def test_a_maintained_writer_evicts_what_little_makes_no_room_for_now(maintained):
    """The rest is for later requests, so as not to keep the reserving thread."""
    arena, records = maintained
    with pytest.raises(ArenaFull):
        arena.reserve("huge", tokens=500 * records[0].tokens)
    assert 0 < read_counters(arena.memory.counters)["evicted"] <= 64


def test_maintain_keeps_an_eighth_free_of_expired_records(make_arena):
    arena = make_arena(retention=0.0)
    for index in range(12):
        add(arena, f"rid-{index}", TOKENS)
    arena.writer.maintain()
    arena.writer._take_back()
    assert arena.writer._allocator.free_bytes * 8 >= arena.writer._allocator.total


# -- counters ----------------------------------------------------------------------------------


def test_reserved_is_sealed_and_failed(arena, counters):
    for index in range(5):
        add(arena, f"rid-{index}", missing=[(0, 2)] if index == 4 else [])
    arena.reserve("bad", tokens=3).fail("no")
    counted = counters()
    assert counted["reserved"] == counted["sealed"] + counted["failed"] == 6
    assert (counted["sealed"], counted["failed"], counted["incomplete"]) == (5, 1, 1)
    assert (counted["rows_sealed"], counted["rows_missing"]) == (100, 2)


def test_a_reserve_that_is_refused_is_not_counted(arena, full, counters):
    assert counters()["reserved"] == counters()["sealed"] == len(full)


def test_released_and_evicted_are_counted_apart(make_arena):
    arena = make_arena(retention=0.0, slots=2)
    release(add(arena, "released").ticket)
    add(arena, "evicted")
    add(arena, "x")
    add(arena, "y")
    counted = read_counters(arena.memory.counters)
    assert (counted["released"], counted["evicted"]) == (1, 1)


# -- failed ------------------------------------------------------------------------------------


def test_a_failed_record_is_route_failed_with_its_reason(arena):
    record = arena.reserve("r", tokens=5)
    record.fail("a CUDA error")
    for source in (record.ticket, "r"):
        with pytest.raises(RouteFailed, match="gave this record up: a CUDA error"):
            ShmRouteReader(source, arena=arena.name)


def test_a_failed_record_is_route_failed_after_its_slot_was_used_again(make_arena):
    arena = make_arena(slots=1)
    record = arena.reserve("r", tokens=5)
    record.fail("a CUDA error")
    for index in range(3):
        release(add(arena, f"other-{index}").ticket)
    with pytest.raises(RouteFailed, match="a CUDA error"):
        ShmRouteReader(record.ticket)


def test_several_failures_in_a_row_are_each_route_failed(arena):
    records = []
    for index in range(8):
        records.append(arena.reserve(f"rid-{index}", tokens=5))
        records[-1].fail(f"error {index}")
    for index, record in enumerate(records):
        with pytest.raises(RouteFailed, match=f"error {index}"):
            ShmRouteReader(record.ticket)


def test_a_failed_record_s_space_is_used_again(arena):
    for index in range(100):
        arena.reserve(f"rid-{index}", tokens=TOKENS).fail("no")


# -- what is free and not taken back yet -------------------------------------------------------


@pytest.fixture
def freed(make_arena):
    """An arena of 64 slots, all of them freed at once since its last reserve."""
    arena = make_arena(slots=64, retention=0.0)
    release([add(arena, f"rid-{index}", tokens=500).ticket for index in range(64)])
    assert arena.writer.reclaim() == 64
    return arena


def test_one_reserve_takes_back_a_few_freed_records_only(freed):
    freed.reserve("r", tokens=1)
    assert len(freed.writer._freed) == 64 - 8


def test_a_few_freed_records_wait_until_they_are_several_or_needed(make_arena):
    arena = make_arena()
    for freed in range(1, 8):
        arena.reserve(f"rid-{freed}", tokens=1).fail("its space comes free")
        assert len(arena.writer._freed) == freed
    arena.reserve("eighth", tokens=1).fail("its space comes free")
    assert len(arena.writer._freed) == 8
    arena.reserve("behind them", tokens=1)
    assert not arena.writer._freed


def test_a_reserve_takes_back_all_that_it_needs(freed):
    size = freed.writer._allocator.total
    rows = size // freed.memory.description.routes.row_bytes
    assert freed.reserve("large", tokens=rows * 9 // 10)


def test_what_is_not_taken_back_yet_counts_as_free(freed):
    record = freed.reserve("r", tokens=1)
    counted = read_counters(freed.memory.counters)
    assert counted["slots_in_use"] == 1
    assert counted["heap_bytes_in_use"] == record.plan.total_bytes


def test_maintain_evicts_nothing_for_space_that_only_waits_to_be_taken_back(make_arena):
    arena = make_arena(retention=0.0)
    tickets = [add(arena, f"rid-{index}", TOKENS).ticket for index in range(12)]
    release(tickets[:6])
    arena.writer.maintain()
    assert read_counters(arena.memory.counters)["evicted"] == 0
    for ticket in tickets[6:]:
        with ShmRouteReader(ticket) as routes:
            assert is_intact(routes)


def test_slots_that_late_readers_look_at_do_not_hide_those_behind_them(freed):
    looking = SharedLeases(freed.segment.lease_file)
    busy = [slot for slot, _, _ in list(freed.writer._freed)[:20]]
    for slot in busy:
        assert looking.try_acquire(slot)
    assert freed.reserve("r", tokens=1).slot not in busy
    for slot in busy:
        looking.drop([slot])
