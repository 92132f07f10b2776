"""The requests of one step reserve together: what they share, and where it ends."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

import shmroute
from shmroute import LeaseUnavailable, RouteLayout, ShmRouteReader
from shmroute.counters import read_counters
from shmroute.leases import ExclusiveLeases, SharedLeases
from shmroute.writer import RecordWriter

ROUTES = RouteLayout(16, 2, range(3))


class Asked(NamedTuple):
    """A record that somebody wants."""

    rid: str
    tokens: int
    start: int = 0
    prompt_tokens: int = 1


@pytest.fixture
def arena(arena_name: str) -> Iterator[shmroute.Arena]:
    with shmroute.Arena.create(arena_name, ROUTES, capacity="256KiB", slots=8) as made:
        yield made


@pytest.fixture
def writer(arena: shmroute.Arena) -> RecordWriter:
    return arena.writer


def in_use(writer: RecordWriter) -> tuple[int, int]:
    """Bytes and slots, by the counters and by what the allocator says."""
    counts = read_counters(writer.memory.counters)
    space = writer.space()
    assert counts["heap_bytes_in_use"] == space.total - space.free
    return counts["heap_bytes_in_use"], counts["slots_in_use"]


def test_records_lie_side_by_side_in_order_behind_the_one_before(writer: RecordWriter) -> None:
    before = writer.reserve("before", tokens=10)
    records = writer.reserve_together([Asked(f"{i}", 5 + i) for i in range(4)], after=before)
    ends = [record.offset + record.plan.total_bytes for record in (before, *records)]
    assert [record.offset for record in records] == ends[:-1]
    assert [record.rid for record in records] == ["0", "1", "2", "3"]
    assert in_use(writer) == (ends[-1] - before.offset, 5)


def test_each_is_a_record_like_any_other(arena: shmroute.Arena, writer: RecordWriter) -> None:
    asked = [Asked("a", 7, 2, 4), Asked("b", 3)]
    records = writer.reserve_together(asked)
    for value, record in enumerate(records):
        record.rows[...] = value
        record.seal()
    for value, (want, record) in enumerate(zip(asked, records, strict=True)):
        for source in (record.ticket, want.rid):
            with ShmRouteReader(source, arena=arena.name) as routes:
                assert (routes.rid, routes.start, routes.prompt_tokens) == (
                    want.rid,
                    want.start,
                    want.prompt_tokens,
                )
                np.testing.assert_array_equal(routes.numpy(), np.full((want.tokens, 3, 2), value))


def test_those_before_one_that_no_record_can_be_like_are_reserved(writer: RecordWriter) -> None:
    asked = [Asked("a", 5), Asked("\ud800", 5), Asked("b", 5)]
    assert [record.rid for record in writer.reserve_together(asked)] == ["a"]
    assert writer.reserve_together([Asked("nothing", 0)]) == []
    assert in_use(writer)[1] == 1


def test_those_before_the_last_slot_are_reserved_and_the_rest_of_the_space_is_given_back(
    writer: RecordWriter,
) -> None:
    records = writer.reserve_together([Asked(f"{i}", 5) for i in range(12)])
    assert len(records) == 8
    assert in_use(writer) == (sum(record.plan.total_bytes for record in records), 8)


def test_what_has_no_piece_for_all_of_it_takes_nothing(writer: RecordWriter) -> None:
    largest = writer.space().largest
    tokens = largest // ROUTES.row_bytes // 3
    assert writer.reserve_together([Asked(f"{i}", tokens) for i in range(4)]) == []
    assert in_use(writer) == (0, 0)


def leased(arena: shmroute.Arena) -> set[int]:
    """Slots whose lease no reader can get."""
    leases = SharedLeases(arena.segment.lease_file)
    slots = set(range(arena.memory.description.slots))
    had = {slot for slot in slots if leases.try_acquire(slot)}
    leases.drop(had)
    return slots - had


def test_each_has_its_slot_s_lease_also_over_the_end_of_a_lease_file(arena_name: str) -> None:
    with shmroute.Arena.create(arena_name, ROUTES, capacity="1MiB", slots=300) as arena:
        records = arena.writer.reserve_together([Asked(f"{i}", 5) for i in range(290)])
        assert [record.slot for record in records] == list(range(290))
        assert leased(arena) == set(range(290))
        for record in records[:100:2]:
            record.fail("by the test")
        assert leased(arena) == {record.slot for record in records if record.open}
        # Of what is free now no two slots are neighbours, but for the last ten.
        again = arena.writer.reserve_together([Asked(f"again {i}", 5) for i in range(40)])
        assert len({record.slot for record in again}) == 40
        assert leased(arena) == {record.slot for record in (*records, *again) if record.open}


def test_a_slot_that_a_late_reader_looks_at_is_left_out(
    arena: shmroute.Arena, writer: RecordWriter
) -> None:
    looking = SharedLeases(arena.segment.lease_file)
    assert looking.try_acquire(2)
    records = writer.reserve_together([Asked(f"{i}", 5) for i in range(5)])
    assert len(records) == 5
    assert 2 not in {record.slot for record in records}
    looking.drop([2])
    assert leased(arena) == {record.slot for record in records}


def test_neighbours_of_such_a_slot_are_still_taken_together(
    arena_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shmroute.Arena.create(arena_name, ROUTES, capacity="1MiB", slots=256) as arena:
        looking = SharedLeases(arena.segment.lease_file)
        assert looking.try_acquire(100)
        asked = []
        take = arena.writer._leases.try_acquire_run
        monkeypatch.setattr(
            arena.writer._leases,
            "try_acquire_run",
            lambda slot, count: asked.append((slot, count)) or take(slot, count),
        )
        records = arena.writer.reserve_together([Asked(f"{i}", 5) for i in range(200)])
        assert {record.slot for record in records} == set(range(201)) - {100}
        assert len(asked) < 40
        looking.drop([100])
        assert leased(arena) == {record.slot for record in records}


@pytest.mark.parametrize("what", ["slots", "records"])
def test_an_error_in_between_loses_neither_slots_nor_space(
    arena: shmroute.Arena, writer: RecordWriter, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    owner, name, granted = {
        "slots": (writer._leases, "try_acquire_run", 1),
        "records": (writer, "_begin", 2),
    }[what]
    ours, calls = getattr(owner, name), []

    def failing(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) > granted:
            raise OSError("as if it were")
        return int(ours(*arguments))

    writer._free_slots = deque([0, 1, 4, 5, 2, 3, 6, 7])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(OSError, match="as if it were"):
            writer.reserve_together([Asked(f"{i}", 5) for i in range(6)])
    begun = granted if what == "records" else 0
    assert len(leased(arena)) == begun
    assert len(set(writer._free_slots)) == len(writer._free_slots) == 8 - begun


def refusing_after(leases: ExclusiveLeases, granted: int, name: str) -> Callable[..., bool]:
    """A way of ``leases`` that the kernel refuses after so many times."""
    take, taken = getattr(leases, name), []

    def refusing(*slots: int) -> bool:
        if len(taken) == granted:
            raise LeaseUnavailable(errno.ENOLCK, "no lock now")
        taken.append(slots)
        return bool(take(*slots))

    return refusing


@pytest.mark.parametrize(
    ("way", "free", "granted", "slots"),
    [
        ("try_acquire", (0, 2, 4, 6, 1, 3, 5, 7), 2, [0, 2]),
        ("try_acquire_run", (0, 1, 6, 7, 3, 4), 1, [0, 1]),
        ("try_acquire_run", (0, 1, 2, 3), 0, []),
    ],
    ids=["alone", "the second run", "the first run"],
)
def test_a_lease_that_the_kernel_refuses_ends_it_and_nothing_is_lost(
    writer: RecordWriter,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    free: tuple[int, ...],
    granted: int,
    slots: list[int],
) -> None:
    whole = writer._free_slots.copy()
    writer._free_slots = deque(free)
    with monkeypatch.context() as patch:
        patch.setattr(writer._leases, way, refusing_after(writer._leases, granted, way))
        records = writer.reserve_together([Asked(f"{i}", 5) for i in range(4)])
    assert [record.slot for record in records] == slots
    writer._free_slots.extend(set(whole) - set(free))
    again = writer.reserve_together([Asked("again", 5)])
    used = sum(record.plan.total_bytes for record in (*records, *again))
    assert in_use(writer) == (used, len(slots) + 1)


def test_freed_records_are_taken_back_as_fast_as_they_are_reserved(writer: RecordWriter) -> None:
    for step in range(50):
        records = writer.reserve_together([Asked(f"{step}-{i}", 20) for i in range(8)])
        assert len(records) == 8
        for record in records:
            record.fail("by the test")


def test_after_the_arena_s_end_it_takes_nothing(arena_name: str) -> None:
    arena = shmroute.Arena.create(arena_name, ROUTES, capacity="256KiB", slots=8)
    arena.close()
    assert arena.writer.reserve_together([Asked("late", 5)]) == []
