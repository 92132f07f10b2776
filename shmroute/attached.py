"""The reader's end of an arena, one per process and segment.

``attach`` maps a segment once and keeps it while the segment is there. An arena that was
removed stays mapped while views need it and is forgotten by the next look at ``/dev/shm``.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from . import segments
from .errors import ArenaNotFound, LayoutMismatch
from .leases import SharedLeases
from .memory import ArenaMemory
from .reaper import is_alive
from .refusals import named
from .segments import SegmentName

if TYPE_CHECKING:
    from .pinned import PageLock

# A directory change within one tick of the file system's clock does not show in its mtime.
_MTIME_GRAIN_NS = 20_000_000


class AttachedArena:
    """A mapped arena and this process's leases on it."""

    def __init__(self, memory: ArenaMemory) -> None:
        self._page_lock: PageLock | None = None
        self.memory = memory
        self.leases = SharedLeases(memory.segment.lease_file)

    @property
    def segment(self) -> SegmentName:
        return self.memory.segment

    def slots_of(self, hash_value: int) -> list[int]:
        """Slots whose rid hash is this one: a hint, to be checked under a lease."""
        return np.flatnonzero(self.memory.hashes == np.uint64(hash_value)).tolist()

    def page_locked(self, device: int) -> bool:
        """Whether CUDA may read the heap by itself now; the first call has it page-locked.

        That takes its time (the more, the larger the arena) and happens in the background.
        Refused in the process of a writer that has locked its own mapping of the arena: CUDA
        may take one lock of the same memory per process, and this mapping is another. Needs
        torch.
        """
        if self._page_lock is None:
            self._begin_page_lock(device)
        return self._page_lock is not None and self._page_lock.ready

    @property
    def page_lock_refused(self) -> str | None:
        """Why the heap could not be page-locked; None while it is, may be, or was not asked for."""
        return None if self._page_lock is None else self._page_lock.refused

    def _begin_page_lock(self, device: int) -> None:
        from .pinned import PageLock

        if not is_alive(self.segment):
            return  # locking would fill the holes that its heap has, or is about to get
        memory = self.memory
        with _lock:
            if self._page_lock is None:
                self._page_lock = PageLock(
                    memory.heap_address,
                    memory.description.heap_bytes,
                    what=f"arena {self.segment.data}",
                    read_only=True,
                    device=device,
                )
        self._page_lock.start()

    def __del__(self) -> None:
        # Before the mapping goes, and after the last view: each keeps this object.
        lock = getattr(self, "_page_lock", None)
        if lock is not None:
            lock.close()


_lock = threading.Lock()
_attached: dict[str, AttachedArena] = {}
_listing: list[SegmentName] = []
_listed_at = -1  # mtime of the directory that ``_listing`` belongs to; -1: do not trust it


def attach(segment: SegmentName) -> AttachedArena:
    """Map a segment, or return this process's mapping of it.

    Raises
    ------
    ArenaNotFound
        It is not under this process's /dev/shm, or another user's and not shared with this one.
    LayoutMismatch
        It is not an arena that this version reads.
    LeaseUnavailable
        No descriptor or no mapping could be had.
    """
    found = _attached.get(segment.base)
    if found is not None:
        return found
    _segments()  # forgets what was removed, also where nobody ever searches
    try:
        if not _trusted(segment):
            raise PermissionError(errno.EACCES, "not shared with a group of this user's")
        with named(f"arena segment {segment.data}"):
            memory = ArenaMemory.open(segment)
    except FileNotFoundError as error:
        raise ArenaNotFound(
            f"arena segment {segment.data} is not under {segments.SHM_DIR}: it was removed "
            "(gc, or nobody needed it), or this container has a /dev/shm of its own (docker "
            "--ipc=host, or one shared emptyDir of medium Memory)"
        ) from error
    except PermissionError as error:
        raise ArenaNotFound(
            f"arena segment {segment.data} may not be opened by user {os.geteuid()}: read as user "
            f"{segment.uid}, or give the arena a group that both belong to"
        ) from error
    with _lock:
        return _attached.setdefault(segment.base, AttachedArena(memory))


def attach_all(arena: str | None) -> list[AttachedArena]:
    """Every whole arena of that name (None: any name) that this user may read, newest first.

    Segments that cannot be read (another version, another user's) are left out when
    searching by name; naming one by ticket raises.
    """
    found = []
    for segment in _segments():
        if arena in (None, segment.arena, segment.base):
            try:
                found.append(attach(segment))
            except (ArenaNotFound, LayoutMismatch):
                continue  # gone since the listing, or not ours to read
    found.sort(key=lambda attached: -attached.memory.description.created_ns)
    return found


def _trusted(segment: SegmentName) -> bool:
    """Whether to believe it: one's own, or shared with a group of one's own and nobody else.

    Anybody can put a file of any name under /dev/shm, and may shorten their own at any moment,
    which ends whoever has it mapped (SIGBUS). That a ticket names it is no reason: who forged
    the one may have made the other.
    """
    if segment.uid == os.geteuid():
        return True
    status = os.stat(segments.path_of(segment.data), follow_symlinks=False)
    return status.st_mode & 0o007 == 0 and status.st_gid in os.getgroups()


def _segments() -> list[SegmentName]:
    """The segments there are; read again only when the directory has changed."""
    global _listing, _listed_at
    changed = os.stat(segments.SHM_DIR).st_mtime_ns
    if changed == _listed_at:
        return _listing
    settled = time.time_ns() - changed > _MTIME_GRAIN_NS  # before the listing, not after
    listing = [segment for segment in segments.list_segments() if not segment.temporary]
    forgotten = []  # unlocking and unmapping them takes its time: not under the lock
    with _lock:
        present = {segment.base for segment in listing}
        for base in [base for base in _attached if base not in present]:
            forgotten.append(_attached.pop(base))
        _listing, _listed_at = listing, changed if settled else -1
    return listing


def _new_lock_in_child() -> None:
    # Another thread may have held it, and that thread is not in the child.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock_in_child)
