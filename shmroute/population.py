"""Enter a mapping's pages into this process's page tables before they are used.

Problem
    A page that is first touched while a record is written costs a fault, 10 to 70 ms for a record
    of 12.6 MB. All at once they take 0.15 to 1.6 s a GiB (tmpfs clears a page only now, and a
    virtual machine may have to be given it), for which an engine's start need not wait.

Approach
    The kernel is asked for it (``MADV_POPULATE_WRITE``, Linux 5.14) piece by piece, without the
    interpreter's lock. Pieces are small, since whoever changes this process's mappings meanwhile
    waits for the end of one. For an older kernel a byte of each page is read.

It only makes later uses faster: what goes wrong here is a warning.

Races, and where they are closed
    - the end of the mapping: it cannot end before this does, which holds a view of it.
    - ``stop`` while a piece is under way: it waits for that one.
    - a file that somebody shortens meanwhile: the kernel answers with an error, not with SIGBUS.
    - fork: a child has no such thread and waits for none.
    - the end of the interpreter: it stops what is under way, since a daemon thread that wants the
      interpreter's lock back then is ended inside of a call.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import functools
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

logger = logging.getLogger("shmroute")

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE
_PIECE_BYTES = 16 << 20


class Population:
    """The pages of one mapping. Any thread may call any method.

    Parameters
    ----------
    memory
        The mapping, writable, from the beginning of a page on. Its file has all its memory.
    what
        What lies there, for the log.
    """

    def __init__(self, memory: memoryview, what: str) -> None:
        self._bytes = np.frombuffer(memory, dtype=np.uint8)
        self._what = what
        self._asked = True
        self._pid = os.getpid()
        self._begun = self._stopped = False
        self._guard = threading.Lock()
        self._settled = threading.Event()
        self._afterwards: list[Callable[[], object]] = []

    def start(self) -> None:
        """Begin in a thread of its own and return at once."""
        if not self._begin():
            return
        thread = threading.Thread(target=self._settle, name="shmroute-populate", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the limit of threads
            self._warn(f"no thread for it: {error}")
            self._finish()

    def run(self) -> None:
        """The same on the calling thread."""
        if self._begin():
            self._settle()

    def then(self, action: Callable[[], object]) -> None:
        """Call this once all pages are entered, or cannot be, on the thread that does it; at once
        if it is so already. Not after ``stop``.
        """
        with self._guard:
            if not self._settled.is_set():
                self._afterwards.append(action)
                return
        if not self._stopped:
            action()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is under way any more; whether that is so."""
        if not self._begun or os.getpid() != self._pid:
            return True
        return self._settled.wait(timeout)

    def stop(self) -> None:
        """Leave the rest to the faults of later uses, after the piece that is under way."""
        self._stopped = True
        self.wait()

    # -- populating ------------------------------------------------------------------------

    def _begin(self) -> bool:
        with self._guard:
            if self._begun:
                return False
            self._begun = True
        _under_way.add(self)
        return True

    def _settle(self) -> None:
        try:
            for first in range(0, self._bytes.nbytes, _PIECE_BYTES):
                if self._stopped:
                    break
                self._enter(first, min(first + _PIECE_BYTES, self._bytes.nbytes))
        except OSError as error:
            self._warn(str(error))
        finally:
            self._finish()

    def _finish(self) -> None:
        with self._guard:
            self._settled.set()
            actions, self._afterwards = self._afterwards, []
        _under_way.discard(self)
        if not self._stopped:
            for action in actions:
                action()

    def _enter(self, first: int, end: int) -> None:
        while self._asked:
            code = _madvise()(self._bytes.ctypes.data + first, end - first, _POPULATE_WRITE)
            if not code:
                return
            number = ctypes.get_errno()
            self._asked = number != errno.EINVAL  # an older kernel
            if number not in (errno.EINVAL, errno.EINTR, errno.EAGAIN):
                raise OSError(number, f"MADV_POPULATE_WRITE: {os.strerror(number)}")
        self._bytes[first : end : mmap.PAGESIZE].max()

    def _warn(self, why: str) -> None:
        logger.warning(
            "%s: not all of its %d bytes are in the page tables (%s): each page that is left costs "
            "a fault when it is first used",
            self._what,
            self._bytes.nbytes,
            why,
        )


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


_under_way: weakref.WeakSet[Population] = weakref.WeakSet()


def _stop_at_exit() -> None:
    for population in list(_under_way):
        population.stop()


atexit.register(_stop_at_exit)
