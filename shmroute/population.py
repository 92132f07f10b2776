"""Enter a mapping's pages into this process's page tables before they are used.

Problem
    A page that is first touched while a record is written costs a fault, 10 to 70 ms for a record
    of 12.6 MB. All at once they take 0.2 to 2.6 s a GiB (tmpfs clears a page only now, and a
    virtual machine may have to be given it), for which an engine's start need not wait.

Approach
    The kernel is asked for it (``MADV_POPULATE_WRITE``, Linux 5.14) piece by piece, without the
    interpreter's lock. Pieces are small, since whoever changes this process's mappings meanwhile
    waits for the end of one. For an older kernel a byte of each page is read.

It only makes later uses faster: what goes wrong here is a warning.

Races, and where they are closed
    - the end of the mapping: it cannot end before this does, which holds a view of it.
    - ``stop`` while a piece is under way: it waits for that one. From a finaliser that the
      collector runs on the populating thread itself, it does not, and the rest is left.
    - a file that somebody shortens meanwhile: the kernel answers with an error, not with SIGBUS
      (an older one, which is not asked, with SIGBUS).
    - ``then`` while the last page is entered: whoever takes an action off the queue does it.
    - an exception of a signal's handler in ``start``: who waits asks for the thread, which then is
      there or not; and it is the thread that lets the end of the interpreter know of itself.
    - fork: a child has no such thread and waits for none.
    - the end of the interpreter: it stops what is under way, since a daemon thread that wants the
      interpreter's lock back then is ended inside of a call. A thread that begins after that enters
      nothing.
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
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

logger = logging.getLogger("shmroute")

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE
_PIECE_BYTES = 16 << 20
_SECONDS_AT_EXIT = 10.0


class Population:
    """The pages of one mapping, entered once, by ``start`` or by ``run``.

    ``then``, ``wait`` and ``stop`` are for any thread.

    Parameters
    ----------
    memory
        The mapping, writable, from the beginning of a page on. Its file has all its memory.
    what
        What lies there, for the log.
    """

    def __init__(self, memory: memoryview, what: str) -> None:
        self._bytes = np.frombuffer(memory, dtype=np.uint8)
        self._address = int(self._bytes.ctypes.data)
        self._what = what
        self._kernel_knows = True  # the request, as far as it is known
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._begun = self._stopped = self._done = False
        self._afterwards: deque[Callable[[], object]] = deque()

    def start(self) -> None:
        """Begin in a thread of its own and return at once; again does nothing."""
        if self._begun:
            return
        self._begun = True
        self._thread = thread = threading.Thread(
            target=self._populate, name="shmroute-populate", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the limit of threads
            if thread.is_alive():
                raise
            self._warn(f"no thread for it: {error}")
            self._finish()

    def run(self) -> None:
        """The same on the calling thread."""
        if not self._begun:
            self._begun = True
            self._populate()

    def then(self, action: Callable[[], object]) -> None:
        """Call this once all pages are entered, or cannot be, on the thread that does it; at once
        if it is so already. Not if ``stop`` comes before, and not in a fork.
        """
        self._afterwards.append(action)
        if self._done:
            self._go_on()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no page is being entered any more; whether that is so."""
        thread = self._thread
        if thread is None or os.getpid() != self._pid or not thread.is_alive():
            return True
        if thread is threading.current_thread():
            return False
        thread.join(timeout)
        return not thread.is_alive()

    def stop(self) -> None:
        """Leave the rest to the faults of later uses, after the piece that is under way."""
        self._stopped = True
        self.wait()

    # -- populating ------------------------------------------------------------------------

    def _populate(self) -> None:
        try:
            _under_way.add(self)
            if _ending:  # which may have looked for what is under way before that
                self._stopped = True
            for first in range(0, self._bytes.nbytes, _PIECE_BYTES):
                self._enter(first, min(first + _PIECE_BYTES, self._bytes.nbytes))
        except OSError as error:
            self._warn(str(error))
        finally:
            self._finish()

    def _finish(self) -> None:
        self._done = True
        _under_way.discard(self)
        self._go_on()

    def _go_on(self) -> None:
        while self._afterwards:
            try:
                action = self._afterwards.popleft()
            except IndexError:
                return  # another thread was faster
            if self._stopped or os.getpid() != self._pid:
                continue
            try:
                action()
            except Exception:
                logger.exception("%s: what was to follow its population failed", self._what)

    def _enter(self, first: int, end: int) -> None:
        while not self._stopped:
            if not self._kernel_knows:
                self._bytes[first : end : mmap.PAGESIZE].max()
                return
            if not _madvise()(self._address + first, end - first, _POPULATE_WRITE):
                return
            number = ctypes.get_errno()
            self._kernel_knows = number != errno.EINVAL  # an older one
            if number not in (errno.EINVAL, errno.EINTR):
                raise OSError(number, f"MADV_POPULATE_WRITE: {os.strerror(number)}")

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


# Weakly: who is interrupted in ``run`` leaves no memory behind.
_under_way: weakref.WeakSet[Population] = weakref.WeakSet()
_ending = False


def _stop_at_exit() -> None:
    global _ending
    _ending = True
    for population in list(_under_way):
        population._stopped = True
        population.wait(_SECONDS_AT_EXIT)


atexit.register(_stop_at_exit)
