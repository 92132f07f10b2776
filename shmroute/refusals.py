"""What the kernel refuses a process at one of its limits, by name and with the remedy.

Problem
    A process that has run out of file descriptors, address space, locks or files gets a bare
    ``OSError`` out of whichever call came next. Which limit it was, how high it is and how to
    raise it is what its user needs to know.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ArenaTooSmall, LeaseUnavailable, ShmRouteError


@contextmanager
def named(what: str) -> Iterator[None]:
    """Raise what the kernel refused inside under its name; other errors pass as they are.

    Raises
    ------
    LeaseUnavailable
        No descriptor, mapping or lock could be had.
    ArenaTooSmall
        A file could not be made, or not as large as it must be.
    """
    try:
        yield
    except ShmRouteError:
        raise
    except OSError as error:
        raise_named(error, what)
        raise


def raise_named(error: OSError, what: str) -> None:
    """Raise a refusal under its name; return if it is none."""
    if error.errno in _OF_A_LEASE:
        raise LeaseUnavailable(error.errno, f"{what}: {_told(_OF_A_LEASE, error)}") from error
    if error.errno in _OF_A_FILE:
        raise ArenaTooSmall(error.errno, f"{what}: {_told(_OF_A_FILE, error)}") from error


# errno -> the limit that was met, if it has a figure, and what to say.
_Told = dict[int | None, tuple[int | None, str]]
_OF_A_LEASE: _Told = {
    errno.EMFILE: (
        resource.RLIMIT_NOFILE,
        "no file descriptor left (this process may have {limit}): raise the limit (ulimit -n), or "
        "release records sooner (one descriptor serves 256 slots)",
    ),
    errno.ENFILE: (
        None,
        "no file descriptor left on this machine: raise fs.file-max (sysctl), or end what has "
        "so many open",
    ),
    errno.ENOLCK: (
        None,
        "the kernel has no memory for another lock: raise the memory limit of the control group "
        "(docker --memory), or end what fills it",
    ),
    errno.ENOMEM: (
        resource.RLIMIT_AS,
        "no address space or memory to map it (this process may map {limit} bytes): raise the "
        "limit (ulimit -v), vm.max_map_count (sysctl) or the memory limit",
    ),
    # Of a mapping only: of a lock it says that somebody else has it, which is no refusal.
    errno.EAGAIN: (
        resource.RLIMIT_MEMLOCK,
        "this process locks all its memory and may lock {limit} bytes: raise the limit "
        "(ulimit -l), or do without mlockall",
    ),
}
_OF_A_FILE: _Told = {
    errno.ENOSPC: (
        None,
        "/dev/shm has no room for another file: remove what is not needed (df -i /dev/shm, "
        "shmroute gc), or mount -o remount,nr_inodes=... /dev/shm",
    ),
    errno.EFBIG: (
        resource.RLIMIT_FSIZE,
        "a file of this process may have {limit} bytes: raise the limit (ulimit -f), or take a "
        "smaller capacity (--shmroute-capacity)",
    ),
}


def _told(texts: _Told, error: OSError) -> str:
    limit, text = texts[error.errno]
    if limit is None:
        return text
    most = resource.getrlimit(limit)[0]
    return text.format(limit="any number of" if most == resource.RLIM_INFINITY else most)
