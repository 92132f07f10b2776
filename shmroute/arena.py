"""Create and close an arena: the writer's side of its life.

Protocol
    One arena has one writer process for its life; a new writer makes a new arena.

    create    1 create the data segment under a temporary name (O_EXCL, mode 0600)
              2 take the life lock on it, then check that the name still is this file
              3 take all the memory              4 create the control segment
              5 create the lease files           6 write the header, its magic last
              7 rename it into place
    close     1 drop the leases                  2 drop the life lock
              3 reap: remove it unless somebody still needs it

Races, and where they are closed
    - A reader never sees half an arena: it has no findable name before step 7.
    - The reaper finds the temporary file between steps 1 and 2 and removes it: the
      creator notices in step 2 and begins again.
    - The creator dies anywhere before step 7: the temporary file has no life lock, so
      the reaper removes it with everything that belongs to it.
    - An exception of a signal's handler interrupts the creation: what was taken by then is in a
      ``_Claim``, by name, and no file of it is left; a descriptor at worst, which the call that
      made it was about to return.
    - The writer forks: the child closes its copies and can never write or outlive it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import time
import weakref
from types import TracebackType
from typing import Any

import numpy.typing as npt

from . import layout, reaper, segments
from .errors import ShmRouteError
from .leases import SLOTS_PER_FILE, ExclusiveLeases, lock_range
from .memory import ArenaMemory
from .population import Population
from .refusals import named
from .reservation import Reservation
from .segments import SegmentName
from .writer import RecordWriter

logger = logging.getLogger("shmroute")

DEFAULT_SLOTS = 16384
DEFAULT_RETENTION = 3600.0
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {unit + "i": 1024**power for power, unit in enumerate("kmgt", start=1)}


def parse_size(size: int | str) -> int:
    """Bytes of ``"8GiB"``, ``"512MB"``, ``"64k"`` or a plain number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", size.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"size {size!r}: use a number of bytes or a form like '8GiB', '512MB'")
    return int(float(match[1]) * _UNITS[match[2]])


class Arena:
    """The writer's handle of one arena. Make it with ``Arena.create``.

    Attributes
    ----------
    segment
        Name of the data segment.
    memory, writer
        The mapped arena, and the owner of its slots and heap.
    population
        Of the mapping's pages, see ``in_background``.
    """

    def __init__(
        self,
        segment: SegmentName,
        memory: ArenaMemory,
        population: Population,
        writer: RecordWriter,
        life_fd: int,
    ) -> None:
        self.segment = segment
        self.memory = memory
        self.population = population
        self.writer = writer
        self._life_fd = life_fd
        self._owner_pid = os.getpid()
        _every_arena.add(self)

    @classmethod
    def create(
        cls,
        name: str,
        routes: layout.RouteLayout,
        *,
        capacity: int | str,
        slots: int = DEFAULT_SLOTS,
        retention: float = DEFAULT_RETENTION,
        keep_versions: int | None = None,
        checksum: bool = False,
        maintained: bool = False,
        in_background: bool = False,
        group: int | None = None,
    ) -> Arena:
        """Make a new arena and take all of its memory now.

        Dead predecessors of the same name give back what nobody needs first.

        Parameters
        ----------
        name
            Up to 40 letters, digits, ``_``, ``.``, ``-``. Several arenas may share a name
            (the data-parallel ranks of one engine); readers search all of them.
        routes
            What a row means.
        capacity
            Bytes of the data segment, tables included: ``"8GiB"`` or a number.
        slots
            Records that can be held at once.
        retention
            Seconds after which an unreleased record may be evicted if space is needed.
        keep_versions
            Weight epochs after which it may; None: no such limit.
        checksum
            Store a CRC-32 of the rows with each record (``routes.verify()`` checks it).
        maintained
            Some thread calls ``arena.writer.maintain()`` after sealing; ``reserve`` then does
            only a bounded part of the reclaiming.
        in_background
            Enter the pages into this process's page tables on a thread of its own, not before
            this returns: 0.2 to 2.6 s a GiB. Their memory is taken either way.
        group
            Group id that may read and release, too; None: only this user. Its members are
            trusted not to shorten the control segment, which would end the writer (SIGBUS).

        Raises
        ------
        ArenaTooSmall
            /dev/shm or a limit of memory or files cannot hold it: figures and remedy in the
            message.
        LeaseUnavailable
            No descriptor, mapping or lock could be had.
        ValueError
            A name, size or number of slots that cannot be.
        """
        segments.check_arena_name(name)
        size = checked_size(capacity, slots, routes.row_bytes)
        _reap_predecessors(name)
        claim = _Claim(slots)
        try:
            with named(f"arena {name} cannot be made"):
                memory = _make(claim, name, routes, size, retention, group)
                population = claim.population = Population(
                    memory.data, f"arena {memory.segment.base}"
                )
                if not in_background:
                    population.run()
                _publish(memory)
            writer = RecordWriter(
                memory,
                ExclusiveLeases(memory.segment.lease_file),
                retention=retention,
                keep_versions=keep_versions,
                checksum=checksum,
                maintained=maintained,
            )
            population.start()
            return cls(memory.segment, memory, population, writer, claim.life_fd)
        except BaseException:  # also of a signal's handler, wherever it comes
            claim.give_up()
            raise

    def reserve(
        self,
        rid: str,
        *,
        tokens: int,
        start: int = 0,
        prompt_tokens: int = 0,
        after: Reservation | None = None,
    ) -> Reservation:
        """Take a slot and an extent for one record, see ``RecordWriter.reserve``."""
        if self._life_fd < 0:
            raise ShmRouteError(
                f"arena {self.segment.data} is closed in this process"
                + ("" if os.getpid() == self._owner_pid else " (a fork of its writer)")
            )
        return self.writer.reserve(
            rid, tokens=tokens, start=start, prompt_tokens=prompt_tokens, after=after
        )

    def inline(self, rid: str, rows: npt.NDArray[Any], **fields: Any) -> bytes:
        """An envelope with the rows in it, see ``RecordWriter.inline``."""
        return self.writer.inline(rid, rows, **fields)

    @property
    def name(self) -> str:
        return self.segment.arena

    def close(self) -> None:
        """End the writing; records that nobody released or that are leased stay readable.

        It waits for calls under way, so not from a signal's handler, which may have come in the
        middle of one of its own thread: raise SystemExit there, and close where that arrives.
        """
        if self._life_fd < 0:
            return
        self.population.stop()
        self.writer.close()
        self._abandon()
        reaper.reap_segment(self.segment)

    def _abandon(self) -> None:
        """Close what makes this process the writer, without touching the arena."""
        self.writer.abandon()
        life_fd, self._life_fd = self._life_fd, -1
        _close_life(life_fd)

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _reap_predecessors(name: str) -> None:
    try:
        reaper.reap(name)
    except (OSError, ShmRouteError):
        # What a dead engine left must not keep a new one from starting.
        logger.exception("could not clean up after dead arenas named %s", name)


def checked_size(capacity: int | str, slots: int, row_bytes: int) -> int:
    """Bytes of the data segment of that capacity, which is rounded up to whole pages.

    Raises
    ------
    ValueError
        It is no size, there cannot be so many slots, or their tables and one row do not fit.
    """
    size = layout.align(parse_size(capacity), layout.PAGE)
    if not 1 <= slots <= layout.MAX_SLOTS:
        raise ValueError(f"slots is {slots}; 1 to {layout.MAX_SLOTS} are possible")
    least = layout.MIN_TABLE_BYTES + slots * layout.SLOT_BYTES
    least = layout.align(least, layout.PAGE) + layout.plan_extent(row_bytes, 64, 1).total_bytes
    if size < least:
        raise ValueError(
            f"a capacity of {size} bytes cannot hold the tables of {slots} slots and one row of "
            f"{row_bytes} bytes or more: at least {least} bytes are needed"
        )
    return size


class _Claim:
    """What a creation has taken so far.

    It is noted here before it is taken, or by the call that takes it, so that an exception
    between two statements leaves nothing behind, either.

    Attributes
    ----------
    segment
        Under its temporary name.
    life_fd
        The descriptor that has its life lock; -1: none.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.segment: SegmentName | None = None
        self.life_fd = -1
        self.population: Population | None = None
        self._pid = os.getpid()

    def give_up(self) -> None:
        """Leave nothing of it; in a fork it is the parent's."""
        if os.getpid() != self._pid:
            return
        if self.population is not None:
            self.population.stop()
        if self.segment is None:
            return
        published = self.life_fd >= 0 and segments.same_inode(self.life_fd, self.segment.base)
        if not published:
            _remove_unfinished(self.segment, self.slots)
        if self.life_fd >= 0:
            _life_fds.add(self.life_fd)
            _close_life(self.life_fd)
        if published:
            reaper.reap_segment(_whole(self.segment))


def _make(
    claim: _Claim,
    name: str,
    routes: layout.RouteLayout,
    size: int,
    retention: float,
    group: int | None,
) -> ArenaMemory:
    """Steps 1 to 6 of creation."""
    segment = _claim_name(claim, name, 0o600 if group is None else 0o640, group)
    description = _describe(segment, routes, size, claim.slots, retention)
    return _fill(segment, claim.life_fd, description, group)


def _remove_unfinished(segment: SegmentName, slots: int) -> None:
    """By name: a list of the directory takes a descriptor, which may be what is lacking."""
    for index in range(_lease_files(slots)):
        segments.unlink_if_present(segment.lease_file(index))
    segments.unlink_if_present(segment.control)
    segments.unlink_if_present(segment.data)


def _lease_files(slots: int) -> int:
    return (slots + SLOTS_PER_FILE - 1) // SLOTS_PER_FILE


def _claim_name(claim: _Claim, name: str, mode: int, group: int | None) -> SegmentName:
    while True:
        segment = SegmentName(os.geteuid(), name, secrets.token_bytes(8), temporary=True)
        claim.segment = segment
        try:
            claim.life_fd = fd = segments.create_object(segment.data, mode, group)
        except ShmRouteError:
            claim.segment = None  # somebody else's
            raise
        _life_fds.add(fd)
        if lock_range(fd, fcntl.F_WRLCK, 0, 1) and segments.same_inode(fd, segment.data):
            return segment
        try:  # the reaper was faster than the lock and has removed the file
            _close_life(fd)
        finally:
            claim.life_fd = -1


def _describe(
    segment: SegmentName, routes: layout.RouteLayout, size: int, slots: int, retention: float
) -> layout.ArenaDescription:
    pid = os.getpid()
    return layout.ArenaDescription(
        arena_id=segment.arena_id,
        routes=routes,
        slots=slots,
        capacity=size,
        retention=retention,
        created_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        writer=layout.Writer(
            pid, segments.process_start_time(pid), segments.boot_id(), segments.host_name()
        ),
    )


def _fill(
    segment: SegmentName, fd: int, description: layout.ArenaDescription, group: int | None
) -> ArenaMemory:
    """Steps 3 to 6."""
    segments.take_memory(fd, description.capacity, segment.arena)
    shared_mode = 0o600 if group is None else 0o660
    with os.fdopen(segments.create_object(segment.control, shared_mode, group), "rb", 0) as control:
        segments.take_memory(control.fileno(), description.control_bytes, segment.arena)
        for index in range(_lease_files(description.slots)):
            # A shared lock needs no more than the right to read.
            name, mode = segment.lease_file(index), 0o600 if group is None else 0o640
            os.close(segments.create_object(name, mode, group))
        layout.initialise(fd, description)
        # Not through ``fd``: a mapping keeps a duplicate of its descriptor, and with it the
        # life lock would outlast ``close``.
        return ArenaMemory.open(segment, writable=True)


def _publish(memory: ArenaMemory) -> None:
    """Step 7."""
    segment = memory.segment
    try:
        os.rename(segments.path_of(segment.data), segments.path_of(segment.base))
    except (PermissionError, IsADirectoryError) as error:
        raise ShmRouteError(segments.taken(segment.base)) from error
    memory.segment = _whole(segment)


def _whole(segment: SegmentName) -> SegmentName:
    return SegmentName(segment.uid, segment.arena, segment.arena_id)


# Every life lock of this process, also of arenas being made or forgotten by their makers.
_life_fds: set[int] = set()


def _close_life(fd: int) -> None:
    """Again does nothing: a traceback may keep an arena whose creation has closed it already."""
    if fd in _life_fds:
        _life_fds.discard(fd)
        os.close(fd)


_every_arena: weakref.WeakSet[Arena] = weakref.WeakSet()


def _abandon_in_child() -> None:
    for arena in list(_every_arena):
        if arena._life_fd >= 0:
            arena._abandon()
    for fd in list(_life_fds):
        _close_life(fd)


os.register_at_fork(after_in_child=_abandon_in_child)
