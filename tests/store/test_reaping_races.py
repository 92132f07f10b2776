"""Reapers against creators, readers and each other, each race at its worst moment."""

from __future__ import annotations

import os

import pytest
from actors import add, is_intact

from shmroute import RouteGone, ShmRouteReader, leases, reap, reaper, segments


@pytest.fixture
def dead(writer):
    """The segment of a killed writer, and the ticket of a record in it."""
    writer.kill()
    return segments.parse_segment(writer.facts["segment"]), writer.facts["sealed"][0]


def test_a_file_that_took_the_name_of_the_locked_one_is_left_alone(dead, files, monkeypatch):
    """Another reaper may have removed the segment between its opening and its lock."""
    segment, _ticket = dead
    original = reaper.lock_range
    (path,) = [path for path in files() if path.name == segment.data]

    def late(*arguments):
        monkeypatch.undo()
        path.unlink()
        path.write_bytes(b"somebody else's")
        return original(*arguments)

    monkeypatch.setattr(reaper, "lock_range", late)
    assert reaper.reap_segment(segment, force=True) is None
    assert path.read_bytes() == b"somebody else's"
    reaper.remove_files(segment)


def test_a_creator_whose_new_file_was_reaped_begins_again(make_arena, name, monkeypatch):
    """The reaper finds the temporary file before the creator has locked it."""
    original, created = segments.create_object, []

    def reaped(*arguments):
        fd = original(*arguments)
        created.append(arguments[0])
        if len(created) == 1:
            (outcome,) = reap(name)
            assert outcome.kept == ""
        return fd

    monkeypatch.setattr(segments, "create_object", reaped)
    arena = make_arena()
    assert created[0] != created[1] == arena.segment.base + ".tmp"
    with ShmRouteReader(add(arena, "r").ticket) as routes:
        assert is_intact(routes)


def test_a_reader_that_had_the_lease_file_open_reads_nothing_of_a_removed_arena(dead, monkeypatch):
    """Its lease comes too late to keep the arena, whose heap is punched out."""
    segment, ticket = dead
    ShmRouteReader(ticket).close()  # mapped from now on
    original = leases.SharedLeases._fd

    def late(shared, index):
        fd = original(shared, index)
        monkeypatch.undo()
        assert reaper.reap_segment(segment, force=True).kept == ""
        return fd

    monkeypatch.setattr(leases.SharedLeases, "_fd", late)
    with pytest.raises(RouteGone):
        ShmRouteReader(ticket)


def test_two_reapers_at_once_are_one(dead, files):
    """The life lock admits one; the other leaves everything to it."""
    segment, _ticket = dead
    fd = segments.open_object(segment.data, writable=True)
    try:
        assert reaper.lock_range(fd, reaper.fcntl.F_WRLCK, 0, 1)
        before = files()
        assert reaper.reap_segment(segment, force=True) is None
        assert files() == before
    finally:
        os.close(fd)
