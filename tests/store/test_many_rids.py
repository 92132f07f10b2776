"""100,000 records at once, of rids of up to 512 bytes: each is found, and no other for it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from faults import lease_files_open

from shmroute import Arena, RouteLayout, ShmRouteReader, reaper, release
from shmroute.attached import attach

COUNT, AGAIN = 100_000, 1_000
RID_BYTES = 512
NAME = f"t{os.getpid()}-many"
LAYOUT = RouteLayout(65536, 2, range(2), model="tests/store, many rids")


def rid_of(index):
    """No two alike; of 6 to 512 bytes, in one piece of every three not of ASCII alone."""
    length = 6 + index * (RID_BYTES - 6) // (COUNT - 1)
    filler = "ä" * ((length - 6) // 2) if index % 3 else "x" * (length - 6)
    return f"{filler}{index:06d}"


def rows_of(index, tokens):
    """The record's number, once a layer."""
    numbers = np.full((tokens, *LAYOUT.row_shape[:1]), index, dtype=np.uint32)
    return numbers.view(LAYOUT.dtype).reshape(tokens, *LAYOUT.row_shape)


def seal(arena, index, tokens):
    record = arena.reserve(rid_of(index), tokens=tokens)
    record.rows[...] = rows_of(index, tokens)
    record.seal()
    return record.ticket


def is_of(routes, index, tokens):
    read = routes.numpy().tobytes()
    return routes.rid == rid_of(index) and read == rows_of(index, tokens).tobytes()


@pytest.fixture(scope="module")
def arena():
    arena = Arena.create(NAME, LAYOUT, capacity="96MiB", slots=COUNT + AGAIN)
    yield arena
    reaper.remove_files(arena.segment)  # also where a failed test's traceback has readers
    arena.close()


@pytest.fixture(scope="module")
def tickets(arena):
    """Of records of one row each, by number."""
    return [seal(arena, index, tokens=1) for index in range(COUNT)]


def test_rids_are_of_up_to_512_bytes(tickets):
    assert {len(rid_of(index).encode()) for index in (0, COUNT - 1)} == {6, RID_BYTES}


def test_each_rid_has_a_name_of_its_own_in_the_table(arena, tickets):
    hashes = arena.memory.hashes
    assert len(set(hashes[hashes != 0].tolist())) == COUNT


def test_any_rid_finds_its_own_record(arena, tickets):
    for index in [*range(0, COUNT, 97), COUNT - 1]:
        with ShmRouteReader(rid_of(index), arena=NAME, timeout=0) as routes:
            assert is_of(routes, index, 1)


def test_of_equal_rids_the_newest_is_found_and_tickets_stay_exact(arena, tickets):
    again = range(0, COUNT, COUNT // AGAIN)
    newer = {index: seal(arena, index, tokens=2) for index in again}
    for index in again:
        for source, tokens in ((rid_of(index), 2), (newer[index], 2), (tickets[index], 1)):
            with ShmRouteReader(source, arena=NAME, timeout=0) as routes:
                assert is_of(routes, index, tokens)
    assert release(list(newer.values())) == AGAIN
    del routes
    assert arena.writer.reclaim() == AGAIN


def test_all_are_held_released_and_taken_back_at_once(arena, tickets):
    """The last test of this file, since nothing is left after it."""
    ShmRouteReader(tickets[0]).close()
    of_writer = lease_files_open(arena) - 1  # the reader's stays open
    held = [ShmRouteReader(ticket) for ticket in tickets]
    assert all(is_of(routes, index, 1) for index, routes in enumerate(held))
    assert lease_files_open(arena) == of_writer + -(-COUNT // 256)
    for routes in held:
        routes.release()
    assert arena.writer.reclaim() == 0
    del routes
    held.clear()
    assert lease_files_open(arena) == of_writer + 1
    assert attach(arena.segment).leases.held() == 0
    assert arena.writer.reclaim() == COUNT
    assert arena.writer._free_bytes() == arena.writer._allocator.total
