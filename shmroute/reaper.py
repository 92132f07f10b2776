"""Clean up after dead writers.

An engine usually ends by SIGKILL of its process tree, so its writer cleans up nothing. Who
comes later does it: a new arena of the same name (``reap``), the engine's parent process,
or a person (``shmroute gc``).

Protocol, for each data segment
    1 take its life lock without waiting (taken: its writer lives, leave it alone)
    2 check that the name still is the file that was locked
    3 take every lease exclusively (one range lock a file); a reader that has one keeps the
      arena
    4 unreleased, unexpired records keep it, too, unless ``force``
    5a nothing keeps it: store 0 in every word, punch the whole heap out, remove the files,
       the data segment last
    5b something does: recycle what is released and not leased, punch out what no record uses

Races, and where they are closed
    - Creation: the creator locks first and then checks its name, the reaper the other way
      about, so one of them notices (steps 1, 2; ``arena`` step 2).
    - Two reapers: the life lock admits one.
    - A reader between opening a lease file and locking it: after step 5a it finds the word 0,
      so it reads nothing out of the punched heap.
    - Killed in between: the data segment goes last, so the next reaper finds the rest.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from . import layout, segments
from .errors import LayoutMismatch
from .leases import SLOTS_PER_FILE, ExclusiveLeases, is_locked, lock_range, open_lease_file
from .memory import ArenaMemory, Words
from .metadata import merge_ranges
from .refusals import named
from .segments import SegmentName

logger = logging.getLogger("shmroute")

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass(frozen=True, slots=True)
class Reaped:
    """What came of one segment. ``kept`` says why it stayed; empty: it was removed."""

    segment: SegmentName
    kept: str
    freed_bytes: int


def reap(arena: str | None = None, *, force: bool = False) -> list[Reaped]:
    """Reap every dead arena of this user (of one name, or of any).

    Parameters
    ----------
    force
        Remove unreleased records, too, as long as nobody has them open.
    """
    outcomes = []
    for segment in segments.list_segments(arena):
        if segment.uid == os.geteuid():
            outcome = reap_segment(segment, force=force)
            if outcome is not None:
                outcomes.append(outcome)
    return outcomes


def reap_segment(segment: SegmentName, *, force: bool = False) -> Reaped | None:
    """Reap one segment; None when it is gone already or its writer lives.

    Raises
    ------
    LeaseUnavailable
        No descriptor, mapping or lock could be had; the segment is as it was, or empty.
    """
    with named(f"{segment.data} cannot be reaped"):
        return _reap_unless_alive(segment, force=force)


def _reap_unless_alive(segment: SegmentName, *, force: bool) -> Reaped | None:
    try:
        fd = segments.open_object(segment.data, writable=True)
    except FileNotFoundError:
        return None
    except (LayoutMismatch, PermissionError) as error:
        logger.warning("left alone: %s", error)  # somebody else's, whatever its name says
        return None
    try:
        if not lock_range(fd, fcntl.F_WRLCK, 0, 1) or not segments.same_inode(fd, segment.data):
            return None
        return _reap_locked(segment, fd, force=force)
    except (LayoutMismatch, PermissionError) as error:
        return Reaped(segment, f"one of its files is not as it was made: {error}", 0)
    finally:
        os.close(fd)


def is_alive(segment: SegmentName) -> bool:
    """Whether the writer of this arena lives: it holds the life lock. False when it is gone."""
    with named(f"the life of {segment.data}"):
        try:
            fd = segments.open_object(segment.data, writable=False)
        except FileNotFoundError:
            return False
        try:
            return is_locked(fd, fcntl.F_RDLCK, 0, 1)
        finally:
            os.close(fd)


def remove_files(segment: SegmentName) -> None:
    """Remove an arena's files, the data segment last; the caller holds its life lock."""
    lease_file = re.compile(re.escape(segment.base) + r"\.L[0-9]{3,}")
    leases = filter(lease_file.fullmatch, os.listdir(segments.SHM_DIR))
    for name in (*leases, segment.control, segment.data):
        segments.unlink_if_present(name)


def _reap_locked(segment: SegmentName, fd: int, *, force: bool) -> Reaped:
    size = os.fstat(fd).st_blocks * 512
    if segment.temporary:
        remove_files(segment)
        return Reaped(segment, "", size)
    try:
        memory = ArenaMemory.open(segment, writable=True)
    except FileNotFoundError:
        # A reaper was killed while it removed the arena: finish.
        remove_files(segment)
        return Reaped(segment, "", size)
    except LayoutMismatch as error:
        # Of another release, whose readers may still want it, or damaged. Only its names go,
        # so that whoever has it mapped keeps what is mapped.
        if not force:
            return Reaped(segment, f"this release cannot read it: {error}", 0)
        remove_files(segment)
        return Reaped(segment, "", size)
    with ExitStack() as held:
        kept = "" if _lease_everything(memory, held) else "a reader has records open"
        kept = kept or ("" if force else _unreleased(memory))
        if not kept:
            memory.words[:] = 0
            _punch(fd, memory.description.heap_offset, memory.description.heap_bytes)
            remove_files(segment)
            return Reaped(segment, "", size)
    _recycle_released(memory)
    return Reaped(segment, kept, _punch_unused(memory, fd))


def _lease_everything(memory: ArenaMemory, held: ExitStack) -> bool:
    """Take every lease until ``held`` is closed; False when a reader has one."""
    for index in range(-(-memory.description.slots // SLOTS_PER_FILE)):
        try:
            fd = open_lease_file(memory.segment.lease_file(index), writable=True)
        except FileNotFoundError:
            continue  # a reaper was killed while it removed them
        held.callback(os.close, fd)
        if not lock_range(fd, fcntl.F_WRLCK, 0, SLOTS_PER_FILE):
            return False
    return True


def _sealed(memory: ArenaMemory) -> Words:
    return (memory.words != 0) & (memory.words & 1 == 0)


def _unreleased(memory: ArenaMemory) -> str:
    """Why unreleased records keep the arena, or nothing."""
    wanted = np.flatnonzero(_sealed(memory) & (memory.words != memory.acknowledgements))
    # In floats, since a retention may be infinite.
    oldest = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - memory.description.retention * 1e9
    young = sum(memory.row(int(slot)).sealed_ns >= oldest for slot in wanted)
    return f"{young} records are neither released nor expired" if young else ""


def _recycle_released(memory: ArenaMemory) -> None:
    leases = ExclusiveLeases(memory.segment.lease_file)
    try:
        released = _sealed(memory) & (memory.words == memory.acknowledgements)
        for slot in map(int, np.flatnonzero(released)):
            if leases.try_acquire(slot):
                memory.words[slot] = 0
                leases.release(slot)
    finally:
        leases.close()


def _punch_unused(memory: ArenaMemory, fd: int) -> int:
    """Give the memory of every page that no sealed record touches back; returns bytes."""
    before = os.fstat(fd).st_blocks
    heap, end = memory.description.heap_offset, memory.description.heap_bytes
    rows = [memory.row(int(slot)) for slot in np.flatnonzero(_sealed(memory))]
    used = merge_ranges((row.extent_offset, row.extent_offset + row.extent_bytes) for row in rows)
    position = 0
    for first, last in (*used, (end, end)):
        start, stop = layout.align(position, layout.PAGE), min(first, end) & -layout.PAGE
        if stop > start:
            _punch(fd, heap + start, stop - start)
        position = last
    return (before - os.fstat(fd).st_blocks) * 512


def _punch(fd: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length):
        error = ctypes.get_errno()
        raise OSError(error, f"cannot punch out {length} bytes: {os.strerror(error)}")
