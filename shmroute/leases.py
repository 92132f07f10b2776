"""Leases that the kernel owns: one byte-range lock a slot.

Problem
    The writer may reuse a slot only while nobody reads it, and a reader that is killed at
    any instruction must not keep it for ever. So a lease is no number in memory but an
    open-file-description (OFD) lock, which the kernel drops with the last descriptor.

Protocol
    Slot ``s`` is byte ``s % 256`` of lease file ``s // 256``. The writer holds it exclusively
    from before the odd state word until after the even one; a reader holds it shared
    from before it looks at the word until its last view is gone. Nobody ever waits for it.
    Unlocking and locking also order the memory accesses on both sides: both go through the
    kernel's lock on the inode.

    256 slots a file, because the kernel keeps the locks of an inode in a list: with n
    non-adjacent locks an operation takes 1.4 us at n = 16, 2.2 us at 128, 114 us at 8,192.

Traps, and where they are closed
    - Two leases on one description collapse into one lock: ``SharedLeases`` counts them.
    - fork() shares the description, so a child's unlock would drop the parent's lease, and
      a parent's unlock the child's: ``SharedLeases`` opens a second description with the
      same locks before the fork and the child adopts it.
    - A forked child of the writer would keep the writer's locks after its death: the
      child closes ``ExclusiveLeases`` (closing, unlike unlocking, takes nothing from the
      parent, which still has the description open).
    - A view can be collected at any moment, also inside these very methods:
      ``SharedLeases.drop`` only queues when the lock is taken.
    - The kernel needs memory to unlock, too, and may have none (ENOLCK). Then the lease is kept
      and unlocked later: by the next of this process's leases that ends, or by the writer's
      next seal. Closing a descriptor needs none.
    - A reader keeps one lease file open that it has no lease in (``_Resting``), since opening it
      takes longer than the two calls of a lease. It locks nothing there, a child does not get it,
      and that its arena is gone is found by the file's links.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from .errors import LeaseUnavailable
from .refusals import raise_named
from .segments import open_object

logger = logging.getLogger("shmroute")

SLOTS_PER_FILE = 256

# struct flock: l_type, l_whence, l_start, l_len, l_pid (must be 0 for OFD locks).
_FLOCK = struct.Struct("hhqqi4x")
_BUSY = (errno.EAGAIN, errno.EACCES)


def _request(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def lock_range(fd: int, kind: int, start: int, length: int) -> bool:
    """Lock or unlock bytes of an open file description; False when somebody else has them.

    ``kind`` is ``fcntl.F_RDLCK``, ``F_WRLCK`` or ``F_UNLCK``. Never blocks.
    """
    return _set_lock(fd, _request(kind, start, length))


def _set_lock(fd: int, request: bytes) -> bool:
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise_named(error, "the lock of a lease")
            raise LeaseUnavailable(
                error.errno, f"the kernel refused a lock ({os.strerror(error.errno or 0)})"
            ) from error
        return True


def is_locked(fd: int, kind: int, start: int, length: int) -> bool:
    """Whether a lock of ``kind`` would collide with another description's (takes none)."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(kind, start, length))
    locked: bool = _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK
    return locked


def _requests(kind: int) -> tuple[bytes, ...]:
    """The request for each slot of a file, packed once: a fifth of what a lease costs."""
    return tuple(_request(kind, byte, 1) for byte in range(SLOTS_PER_FILE))


_EXCLUSIVE, _SHARED, _UNLOCK = map(_requests, (fcntl.F_WRLCK, fcntl.F_RDLCK, fcntl.F_UNLCK))


def open_lease_file(name: str, *, writable: bool) -> int:
    """Open one lease file; running out of descriptors is an error of its own."""
    try:
        return open_object(name, writable=writable)
    except OSError as error:
        raise_named(error, f"lease file {name}")
        raise


class ExclusiveLeases:
    """The writer's end. Descriptors stay open for the arena's life: 16,384 slots are 64.

    Keeping them open needs no lock between the thread that reserves and the one that seals.
    """

    def __init__(self, file_name: Callable[[int], str]) -> None:
        self._file_name = file_name
        self._fds: dict[int, int] = {}

    def try_acquire(self, slot: int) -> bool:
        """Take the slot's exclusive lease; False while a reader has it."""
        index, byte = divmod(slot, SLOTS_PER_FILE)
        return _set_lock(self._fd(index), _EXCLUSIVE[byte])

    def try_acquire_run(self, slot: int, count: int) -> bool:
        """Take those of ``count`` neighbours from ``slot`` on, which are in one file, in one call;
        False, and none is taken, while a reader has any of them.
        """
        index, byte = divmod(slot, SLOTS_PER_FILE)
        return lock_range(self._fd(index), fcntl.F_WRLCK, byte, count)

    def _fd(self, index: int) -> int:
        fd = self._fds.get(index)
        if fd is None:
            fd = self._fds[index] = open_lease_file(self._file_name(index), writable=True)
        return fd

    def release(self, slot: int) -> bool:
        """Give the slot's lease back; False when the kernel cannot, and it is still held."""
        index, byte = divmod(slot, SLOTS_PER_FILE)
        try:
            return _set_lock(self._fds[index], _UNLOCK[byte])
        except LeaseUnavailable as error:
            logger.error("the writer keeps its lease on slot %d for now: %s", slot, str(error))
            return False

    def close(self) -> None:
        """Close every descriptor; the kernel drops the leases unless a parent shares them."""
        while self._fds:
            os.close(self._fds.popitem()[1])


class _Resting:
    """A lease file that is open and has no lease of ours; closed with its only owner.

    Of its own, since what is collected together ends in any order: a lease may still be given
    back through its ``SharedLeases`` behind that.
    """

    __slots__ = ("fd", "index")

    def __init__(self, index: int, fd: int) -> None:
        self.index, self.fd = index, fd

    def wake(self) -> int | None:
        """The descriptor, which is the caller's from now on; None if the file was removed."""
        if self.fd < 0 or not os.fstat(self.fd).st_nlink:
            return None
        return self._given_up()

    def _given_up(self) -> int:
        fd, self.fd = getattr(self, "fd", -1), -1
        return fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        fd = self._given_up()
        if fd >= 0:
            close(fd)


class SharedLeases:
    """The readers' end in one process: counted per slot, thread-safe, fork-safe."""

    def __init__(self, file_name: Callable[[int], str]) -> None:
        self._file_name = file_name
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}
        self._fds: dict[int, int] = {}
        self._held_in: dict[int, int] = {}  # lease file -> slots of it that are held
        self._resting: _Resting | None = None
        self._dropped: deque[int] = deque()
        self._before_fork: dict[int, int] = {}
        self._lost: dict[int, int] = {}  # in a child: leases that only the parent has
        with _one_fork:  # not while a fork has listed who must be told of it
            _every_shared.add(self)

    def try_acquire(self, slot: int) -> bool:
        """Take or share the slot's lease; False while the writer has it.

        Raises
        ------
        FileNotFoundError
            The arena has been removed.
        LeaseUnavailable
            No descriptor or lock could be had.
        """
        try:
            with self._lock:
                count = self._counts.get(slot, 0)
                if count == 0 and not self._lock_slot(slot):
                    return False
                self._counts[slot] = count + 1
                return True
        finally:
            if self._dropped:
                self._drain()

    def drop(self, slots: Iterable[int]) -> None:
        """Give leases back, one for each slot named. Safe in a finaliser, whatever this thread
        is doing.

        Of a batch together: neighbours are one call of the kernel's, and each call lets another
        thread have the interpreter, which costs the two of them far more than the call.
        """
        self._dropped.extend(slots)
        self._drain()

    def held(self) -> int:
        """Slots that this process holds leases on."""
        return len(self._counts)

    def _lock_slot(self, slot: int) -> bool:
        index, byte = divmod(slot, SLOTS_PER_FILE)
        fd = self._fd(index)
        try:
            taken = _set_lock(fd, _SHARED[byte])
            self._held_in[index] += taken
        except BaseException:  # it may have been taken all the same: closing ends it
            if not self._held_in[index]:
                self._close(index)
            raise
        if not self._held_in[index]:
            self._rest(index)
        return taken

    def _fd(self, index: int) -> int:
        fd = self._fds.get(index)
        if fd is None:
            resting, self._resting = self._resting, None
            if resting is not None and resting.index == index:
                fd = resting.wake()
            del resting  # closed before another is opened: there may be no descriptor left
            if fd is None:
                fd = open_lease_file(self._file_name(index), writable=False)
            self._held_in[index] = 0
            self._fds[index] = fd
        return fd

    def _rest(self, index: int) -> None:
        """Keep a file open in which there is no lease, instead of the one before."""
        self._resting = _Resting(index, self._fds.pop(index))
        del self._held_in[index]

    def _drain(self) -> None:
        # Not ``acquire(blocking=False)``: an exception out of a signal handler could arrive
        # between it and a ``try``, and the lock would stay taken for ever. Whoever holds the
        # lock now, this very thread included, drains when done.
        while self._dropped and not self._lock.locked():
            with self._lock:
                ended = []
                while self._dropped:
                    slot = self._dropped.popleft()
                    if self._was_last(slot):
                        ended.append(slot)
                ranges = [*_ranges(sorted(ended))]
                try:
                    while ranges:
                        self._unlock(*ranges[-1])
                        ranges.pop()
                except LeaseUnavailable as error:
                    self._keep(ranges, error)
                    return

    def _was_last(self, slot: int) -> bool:
        """Give back one lease; whether nobody else here has another on the slot."""
        if self._lost.get(slot):
            self._lost[slot] -= 1
            return False
        self._counts[slot] -= 1
        if self._counts[slot]:
            return False
        del self._counts[slot]
        return True

    def _unlock(self, index: int, byte: int, length: int) -> None:
        lock_range(self._fds[index], fcntl.F_UNLCK, byte, length)
        self._held_in[index] -= length
        if not self._held_in[index]:
            self._rest(index)

    def _keep(self, ranges: list[tuple[int, int, int]], error: LeaseUnavailable) -> None:
        """Hold what cannot be unlocked now, to be dropped again by the next ``_drain``."""
        ending: dict[int, list[int]] = {}
        for index, byte, length in ranges:
            first = index * SLOTS_PER_FILE + byte
            ending.setdefault(index, []).extend(range(first, first + length))
        for index, slots in ending.items():
            if self._held_in[index] == len(slots):
                self._close(index)
                continue
            # As text: an error that a log keeps has frames, and with them their callers' views.
            logger.error("%d leases are kept for now: %s", len(slots), str(error))
            self._counts.update(dict.fromkeys(slots, 1))
            self._dropped.extend(slots)

    def _close(self, index: int) -> None:
        os.close(self._fds.pop(index))
        del self._held_in[index]

    # fork: the lock is held from ``before`` to both ``after``, so that the copy is consistent.

    def before_fork(self) -> None:
        self._lock.acquire()
        for index in self._fds:
            try:
                self._before_fork[index] = self._duplicate(index)
            except (OSError, LeaseUnavailable) as error:
                logger.error(
                    "fork without a lease of its own for the child (%s): its views of slots "
                    "%d to %d are safe only while the parent holds them",
                    str(error),
                    index * SLOTS_PER_FILE,
                    (index + 1) * SLOTS_PER_FILE - 1,
                )

    def _duplicate(self, index: int) -> int:
        fd = open_lease_file(self._file_name(index), writable=False)
        try:
            for slot in self._counts:
                if slot // SLOTS_PER_FILE == index:
                    lock_range(fd, fcntl.F_RDLCK, slot % SLOTS_PER_FILE, 1)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def after_fork_in_parent(self) -> None:
        # Closing does not unlock: the child has the same description open.
        while self._before_fork:
            os.close(self._before_fork.popitem()[1])
        self._lock.release()
        self._drain()

    def after_fork_in_child(self) -> None:
        # A new lock: nobody may have told us of the fork, see ``_after_fork_in_child``.
        self._lock = threading.Lock()
        # The inherited descriptions are the parent's: closed, never unlocked.
        self._resting = None
        for fd in self._fds.values():
            os.close(fd)
        self._fds, self._before_fork = self._before_fork, {}
        for slot in [slot for slot in self._counts if slot // SLOTS_PER_FILE not in self._fds]:
            self._lost[slot] = self._counts.pop(slot)
        self._held_in = {index: self._held_in[index] for index in self._fds}
        self._drain()


def _ranges(slots: list[int]) -> Iterator[tuple[int, int, int]]:
    """``(file, first byte, length)`` of ascending slots; neighbours of one file are one range."""
    first = 0
    for end, slot in enumerate(slots, 1):
        if end == len(slots) or slots[end] != slot + 1 or slots[end] % SLOTS_PER_FILE == 0:
            yield *divmod(slots[first], SLOTS_PER_FILE), end - first
            first = end


class HeldLeases:
    """Leases of this process that end together, with this object: their only owner.

    An exception out of a signal handler can arrive between any two steps of an opening. Then
    a lease may live as long as the process; it is never dropped twice, which would take
    another view's.
    """

    __slots__ = ("_leases", "_slots")

    def __init__(self, leases: SharedLeases) -> None:
        self._slots: list[int] = []
        self._leases = leases

    def try_acquire(self, slot: int) -> bool:
        """See ``SharedLeases.try_acquire``; at most once a slot."""
        taken = self._leases.try_acquire(slot)
        if taken:
            self._slots.append(slot)
        return taken

    def drop_last(self) -> None:
        """Give the one that was taken last back now."""
        self._leases.drop([self._slots.pop()])

    def __del__(self) -> None:
        slots, self._slots = self._slots, []
        if slots:
            self._leases.drop(slots)


_every_shared: weakref.WeakSet[SharedLeases] = weakref.WeakSet()
_forking: list[SharedLeases] = []
_one_fork = threading.Lock()  # two threads may fork at once


def _before_fork() -> None:
    _one_fork.acquire()
    _forking[:] = list(_every_shared)
    for leases in _forking:
        leases.before_fork()


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop().after_fork_in_parent()
    _one_fork.release()


def _after_fork_in_child() -> None:
    # All there are: an exception of a signal's handler, which Python swallows in ``_before_fork``,
    # may have kept some from being told. Their views here are safe while the parent has them.
    global _one_fork
    _forking.clear()
    for leases in list(_every_shared):
        leases.after_fork_in_child()
    _one_fork = threading.Lock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
