"""Faults that the kernel itself is made to show, for the process or the thread that asks for them.

Only numpy and shmroute may be imported here, see ``actors``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import resource
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shmroute import Arena
from shmroute.segments import SHM_DIR

# -- descriptors -------------------------------------------------------------------------------


@contextmanager
def descriptors_left(count: int, limit: int = 64) -> Iterator[None]:
    """Let this process have so many more descriptors and no more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    taken = []
    try:
        while (fd := _open_null()) is not None:
            taken.append(fd)
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _open_null() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return None


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) - 1


def lease_files_open(arena: Arena) -> int:
    """How many of the arena's this process has open, as reader and as writer."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    first = f"{SHM_DIR}/{arena.segment.base}.L"
    return sum(os.readlink(link).startswith(first) for link in links if link.is_symlink())


# -- system calls ------------------------------------------------------------------------------

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
# machine -> (its name for the filter, number of fcntl)
_MACHINES = {"x86_64": (0xC000003E, 72), "aarch64": (0xC00000B7, 25)}
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def with_locks_refused(code: int, function: Callable[[], Any]) -> Any:
    """Run the function in a thread for which the kernel refuses to lock and to unlock.

    A seccomp filter has every ``fcntl(F_OFD_SETLK)`` of that thread end with ``code``; other
    threads lock as ever.
    """
    results: list[Any] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            _refuse_locks(code)
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _refuse_locks(code: int) -> None:
    architecture, number = _MACHINES[platform.machine()]
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 0, 5, architecture),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_EQUAL, 0, 3, number),
        (_LOAD, 0, 0, _ARGUMENTS + 8),
        (_JUMP_EQUAL, 0, 1, fcntl.F_OFD_SETLK),
        (_RETURN, 0, 0, _ERRNO | code),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = _Program(len(steps), b"".join(struct.pack("HBBI", *step) for step in steps))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0)
    _prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program))


def _prctl(option: int, first: int, second: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
