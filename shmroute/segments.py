"""Names, files and memory of the segments under ``/dev/shm``.

Problem
    An arena is several POSIX shared-memory objects. They must be found by name, belong to
    one user, be taken whole (a tmpfs page that cannot be had later is a SIGBUS), and be
    removed without ever removing somebody else's file of the same name.

Names::

    shmroute-<uid>-<arena name>-<16 hex>         data: the anchor, created first, removed last
    shmroute-<uid>-<arena name>-<16 hex>.tmp     data before it is whole
    shmroute-<uid>-<arena name>-<16 hex>.ctl     control (acknowledgements)
    shmroute-<uid>-<arena name>-<16 hex>.L000    leases of slots 0 to 255, and so on

Since the data segment is the anchor, whoever finds it finds the rest: a process killed
anywhere between creation and removal leaves nothing that the reaper cannot name.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import posix_ipc

from .errors import ArenaTooSmall, LayoutMismatch, ShmRouteError
from .refusals import named

logger = logging.getLogger("shmroute")

SHM_DIR = "/dev/shm"
NAME_BYTES_MAX = 40
_ARENA_NAME = re.compile(r"[A-Za-z0-9_.]([A-Za-z0-9_.-]{0,38}[A-Za-z0-9_.])?")
_SEGMENT = re.compile(
    r"shmroute-(?P<uid>\d{1,10})-(?P<name>[A-Za-z0-9_.-]{1,40})-(?P<id>[0-9a-f]{16})(?P<tmp>\.tmp)?"
)
# Taken in pieces, between which signals are heard.
_FALLOCATE_PIECE = 64 << 20


@dataclass(frozen=True, slots=True)
class SegmentName:
    """The parsed name of a data segment."""

    uid: int
    arena: str
    arena_id: bytes
    temporary: bool = False

    @property
    def base(self) -> str:
        """The final name of the data segment."""
        return f"shmroute-{self.uid}-{self.arena}-{self.arena_id.hex()}"

    @property
    def data(self) -> str:
        """The name under which the data segment lies now."""
        return self.base + (".tmp" if self.temporary else "")

    @property
    def control(self) -> str:
        return self.base + ".ctl"

    def lease_file(self, index: int) -> str:
        return f"{self.base}.L{index:03d}"


def check_arena_name(name: str) -> str:
    """Return ``name`` if it can name an arena, else raise ValueError."""
    if not _ARENA_NAME.fullmatch(name):
        raise ValueError(
            f"arena name {name!r}: use 1 to {NAME_BYTES_MAX} letters, digits, '_', '.', '-', "
            "not beginning or ending with '-'"
        )
    return name


def parse_segment(name: str) -> SegmentName | None:
    """Parse a file name; None when it names no data segment of an arena."""
    match = _SEGMENT.fullmatch(name)
    if match is None:
        return None
    segment = SegmentName(
        int(match["uid"]), match["name"], bytes.fromhex(match["id"]), match["tmp"] is not None
    )
    return segment if segment.data == name else None  # not 007, nor digits of other scripts


def list_segments(arena: str | None = None) -> Iterator[SegmentName]:
    """Data segments under ``/dev/shm``, whole or temporary, of ``arena`` or of any name."""
    with named(f"the list of {SHM_DIR}"), os.scandir(SHM_DIR) as entries:
        for entry in entries:
            segment = parse_segment(entry.name)
            if segment is not None and arena in (None, segment.arena):
                yield segment


def path_of(name: str) -> str:
    return f"{SHM_DIR}/{name}"


def create_object(name: str, mode: int, group: int | None) -> int:
    """Create a new shared-memory object and return its descriptor (O_EXCL, close-on-exec).

    The mode is set on the descriptor, so that no umask widens or narrows it.

    Raises
    ------
    ShmRouteError
        Something has that name already, or nothing may be made there.
    """
    shared = None
    try:
        shared = _new_object(name)
        if group is not None:
            os.fchown(shared.fd, -1, group)
        os.fchmod(shared.fd, mode)
        os.set_inheritable(shared.fd, False)
        return int(shared.fd)
    except BaseException:
        if shared is not None:
            shared.close_fd()
            unlink_if_present(name)
        raise


def _new_object(name: str) -> Any:
    try:
        return posix_ipc.SharedMemory("/" + name, flags=posix_ipc.O_CREX, mode=0o600)
    except posix_ipc.ExistentialError as error:
        raise ShmRouteError(taken(name)) from error
    except posix_ipc.PermissionsError as error:
        raise ShmRouteError(
            f"user {os.geteuid()} may make no file in {SHM_DIR}: give it mode 1777, or mount a "
            "tmpfs there that this user may write (docker --tmpfs, an emptyDir of medium Memory)"
        ) from error
    except OSError as error:
        if error.errno is None:  # posix_ipc says in words that descriptors have run out
            code = errno.EMFILE if "process" in str(error) else errno.ENFILE
            raise OSError(code, os.strerror(code)) from error
        raise


def open_object(name: str, *, writable: bool) -> int:
    """Open an existing object; neither a symlink nor anything but a regular file is followed.

    Raises
    ------
    FileNotFoundError
        It does not exist.
    LayoutMismatch
        It is not a regular file, not owned by the user whose id is in its name, or open to
        everybody's writing.
    """
    fd = -1
    try:
        fd = _open(name, os.O_RDWR if writable else os.O_RDONLY)
        _check_owner(os.fstat(fd), name)
        return fd
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise


def _open(name: str, access: int) -> int:
    try:
        return os.open(path_of(name), access | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise LayoutMismatch(f"{path_of(name)} is not a shared-memory object") from error
        raise


def _owner_in(name: str) -> int:
    return int(name.split("-", 2)[1])


def _check_owner(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise LayoutMismatch(f"{path_of(name)} is not a regular file")
    owner = _owner_in(name)
    if status.st_uid != owner:
        raise LayoutMismatch(
            f"{path_of(name)} belongs to user {status.st_uid}, its name says {owner}: "
            "it was not made by shmroute"
        )
    if status.st_mode & stat.S_IWOTH:
        raise LayoutMismatch(
            f"{path_of(name)} may be written by everybody (mode {stat.S_IMODE(status.st_mode):o}): "
            "what it says may be anybody's. Let its owner take that right away (chmod o-w)"
        )


def taken(name: str) -> str:
    """Say that a name of a new arena is somebody's already."""
    try:
        owner = f"user {os.stat(path_of(name), follow_symlinks=False).st_uid}"
    except FileNotFoundError:
        owner = "somebody, who has removed it again"
    return (
        f"{path_of(name)} was made by {owner} while this arena was: its names have a random part, "
        "so that is no accident. Find out who, or start again: the next arena has other names"
    )


def same_inode(fd: int, name: str) -> bool:
    """Whether ``name`` still names the file that ``fd`` is open on."""
    try:
        there = os.stat(path_of(name), follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


def unlink_if_present(name: str) -> None:
    """Unlink a file of an arena; somebody else having done it already is fine.

    What another user put under such a name is left to them: they would have to be asked, and
    the arena's own files must go all the same.
    """
    path = path_of(name)
    try:
        status = os.stat(path, follow_symlinks=False)
        if status.st_uid != _owner_in(name) or stat.S_ISDIR(status.st_mode):
            logger.warning("left alone: %s, made by user %d", path, status.st_uid)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return


def take_memory(fd: int, size: int, name: str) -> None:
    """Give the object ``size`` bytes of memory now, or raise ArenaTooSmall.

    Memory that is only promised (ftruncate) would turn a full /dev/shm or a memory limit
    into a SIGBUS or an OOM kill long after the start.
    """
    check_memory(size, name)
    offset = 0
    while offset < size:
        piece = min(_FALLOCATE_PIECE, size - offset)
        try:
            with _signals_held():
                os.posix_fallocate(fd, offset, piece)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            available, limit = memory_available()
            raise ArenaTooSmall(_too_small(size, available + offset, limit, name)) from error
        offset += piece


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep signals from this thread.

    Before Linux 6.18 tmpfs undoes a call that a signal interrupts, and Python makes it again:
    under a profiler's timer that is shorter than a call takes (8 to 30 ms) this would never end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:  # not below the next line, out of which a handler may still raise
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_memory(size: int, name: str) -> None:
    """Raise ArenaTooSmall unless an arena of ``size`` bytes would fit now; takes nothing."""
    available, limit = memory_available()
    if size > available:
        raise ArenaTooSmall(_too_small(size, available, limit, name))


def memory_available() -> tuple[int, str]:
    """Bytes that an arena could take now, and what limits them."""
    return min(memory_limits(), key=lambda limit: limit[0])


def memory_limits() -> list[tuple[int, str]]:
    """Every limit on an arena's size: bytes left under it, and what it is."""
    limits = [(_tmpfs_free(), f"the size of {SHM_DIR}"), (_machine_free(), "the machine's memory")]
    limits += [(free, f"the memory limit of control group {group}") for free, group in _cgroups()]
    return limits


def _too_small(size: int, available: int, limit: str, name: str) -> str:
    mib = 1 << 20
    return (
        f"arena {name} needs {size / mib:.1f} MiB of shared memory, {available / mib:.1f} MiB can "
        f"be had (limited by {limit}). Remedy: a larger {SHM_DIR} (docker --shm-size, --ipc=host; "
        f"mount -o remount,size=... {SHM_DIR}), a higher memory limit, or a smaller "
        "capacity (--shmroute-capacity)"
    )


def _tmpfs_free() -> int:
    status = os.statvfs(SHM_DIR)
    # A tmpfs mounted with size=0 has no limit of its own and reports no blocks.
    return status.f_bavail * status.f_frsize if status.f_blocks else 1 << 62


def _machine_free() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _cgroups() -> Iterator[tuple[int, str]]:
    """Free bytes of this process's control group (version 2) and each of its ancestors."""
    try:
        own = Path("/proc/self/cgroup").read_text()
    except FileNotFoundError:
        return
    for line in own.splitlines():
        if not line.startswith("0::"):
            continue
        group = Path(line[3:])
        for part in (group, *group.parents):
            free = _cgroup_free(Path("/sys/fs/cgroup") / str(part).lstrip("/"))
            if free is not None:
                yield free, str(part)


def _cgroup_free(directory: Path) -> int | None:
    try:
        limit = (directory / "memory.max").read_text().strip()
        used = int((directory / "memory.current").read_text())
        statistics = (directory / "memory.stat").read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    if limit == "max":
        return None
    # Page cache that the kernel drops on demand is not memory in use.
    cached = [int(row.split()[1]) for row in statistics.splitlines() if "inactive_file " in row]
    return max(0, int(limit) - used + sum(cached))


@cache
def boot_id() -> str:
    """This boot of this node's kernel; the same in every container on it."""
    with named("the boot id"):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@cache
def host_name() -> str:
    return socket.gethostname()


def process_start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot (field 22 of its stat)."""
    content = Path(f"/proc/{pid}/stat").read_text()
    return int(content.rpartition(")")[2].split()[19])
