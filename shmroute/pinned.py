"""Page-locking: let the copy engine of a GPU read and write a range of this process's memory.

Problem
    A copy between a GPU and ordinary memory goes through a buffer of the driver's (12 GB/s on
    an H100), and the caller waits for it. From page-locked memory it runs by itself, at the
    speed of PCIe (52 to 54 GB/s). torch's own page-locked allocator cannot lock a mapping that
    exists, and rounds what it allocates up to a power of two (20.4 GiB become 32).

States of a ``PageLock``, and who moves them::

    NEW --start/run--> LOCKING --granted--> LOCKED --close--> CLOSED
     |                    |
     |                    +----refused----> REFUSED   (one warning; copies stay pageable)
     +----------------------close---------------------> CLOSED

Races, and where they are closed
    - close while the driver is locking: it waits, since the range is unmapped next.
    - two closes: the second returns when the first has unregistered.
    - close out of a finaliser that the collector runs on the locking thread itself, which
      cannot wait for itself: the thread finds CLOSED and takes back what it got.
    - fork: the registration is the parent's. In a child nothing is ready, and closing does
      nothing.
    - a CUDA graph that another thread captures meanwhile: see ``relaxed_capture``.
    - the interpreter ends while the driver is locking: a daemon thread that wants the GIL back
      then is ended inside C++, which aborts the process; so the end waits for it, and after that
      none begins.
    - an exception of a signal's handler in ``start`` or ``run``: it is NEW again, a thread that was
      made all the same finds that, and what the driver may have granted is taken back.
"""

from __future__ import annotations

import atexit
import enum
import logging
import mmap
import os
import resource
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .cuda_runtime import clear_error, relaxed_capture

logger = logging.getLogger("shmroute")

_PORTABLE, _MAPPED, _READ_ONLY = 0x1, 0x2, 0x8  # cudaHostRegister...
_ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered
_SECONDS_AT_EXIT = 10.0


class _State(enum.Enum):
    NEW = enum.auto()
    LOCKING = enum.auto()
    LOCKED = enum.auto()
    REFUSED = enum.auto()
    CLOSED = enum.auto()


class PageLock:
    """One range of memory, page-locked for every CUDA device in one registration.

    In one, since a copy that spans two registrations fails. Any thread may call any method.
    Whoever owns the mapping calls ``close`` before it is unmapped. A process registers the same
    memory once, through whichever of its mappings; other processes do so for themselves.

    Parameters
    ----------
    address, size
        The range; it is widened to whole pages, which a mapping always consists of.
    what
        What lies there, for the log.
    read_only
        The range is mapped ``PROT_READ``. Not every driver registers such memory.
    device
        The CUDA device whose context registers it; None: the one that is current at
        ``start`` or ``run``.
    locked
        Called once it is locked, by the thread that did it; ``close`` waits for its end.
    """

    def __init__(
        self,
        address: int,
        size: int,
        *,
        what: str,
        read_only: bool = False,
        device: int | None = None,
        locked: Callable[[], object] = lambda: None,
    ) -> None:
        if address <= 0 or size <= 0:
            raise ValueError(f"{size} bytes at {address:#x} cannot be page-locked")
        self._address = address & -mmap.PAGESIZE
        self._size = (address + size - self._address + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
        self._what = what
        self._read_only = read_only
        self._device = device
        self._locked = locked
        self._pid = os.getpid()
        self._state = _State.NEW
        self._refused: str | None = None
        # Reentrant: the collector may run an owner's finaliser, and so ``close``, anywhere.
        self._guard = threading.RLock()
        self._settled = threading.Event()
        self._locking_thread: int | None = None
        self._asked = False  # the driver, which has not refused

    def start(self) -> None:
        """Begin in a thread of its own and return at once; again does nothing."""
        try:
            if self._begin():
                self._start_thread()
        except BaseException:
            self._take_back()
            raise

    def run(self) -> bool:
        """The same on the calling thread; True when the range is locked now."""
        try:
            if self._begin():
                self._settle()
        except BaseException:
            self._take_back()
            raise
        return self.wait()

    @property
    def ready(self) -> bool:
        """Whether the range is locked now."""
        return self._state is _State.LOCKED and os.getpid() == self._pid

    @property
    def refused(self) -> str | None:
        """Why it could not be locked."""
        return self._refused

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a lock that was begun is granted, refused or closed; whether it is locked."""
        if self._state is not _State.NEW and os.getpid() == self._pid:
            self._settled.wait(timeout)
        return self.ready

    def close(self) -> None:
        """Unlock the range, after waiting for a locking under way. Again does nothing."""
        if os.getpid() != self._pid or sys.is_finalizing():
            return  # the parent's; or the process ends, and the kernel unlocks
        with self._guard:
            if self._locking_thread == threading.get_ident():
                self._state = _State.CLOSED
                return
        while not self._close_what_is_settled():
            self._settled.wait()

    def _close_what_is_settled(self) -> bool:
        with self._guard:
            if self._state is _State.LOCKING and self._locking_thread is not None:
                return False
            before, self._state = self._state, _State.CLOSED
            _under_way.discard(self)
            if before is _State.LOCKED:
                self._unregister()
        self._settled.set()
        return True

    # -- locking ---------------------------------------------------------------------------

    def _begin(self) -> bool:
        with self._guard:
            if self._state is not _State.NEW:
                return False
            if self._device is None:
                # Not ``current_device()`` by itself, which would set CUDA up and take seconds.
                initialised = torch.cuda.is_initialized()
                self._device = torch.cuda.current_device() if initialised else 0
            self._pid = os.getpid()
            self._settled.clear()
            self._state = _State.LOCKING
            _under_way.add(self)
            if not _ending:
                return True
            # The interpreter's end may have looked for what is under way before that.
            _under_way.discard(self)
            self._state = _State.CLOSED
            self._settled.set()
            return False

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._settle, name="shmroute-page-lock", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the limit of threads
            if thread.is_alive():
                raise
            self._finish(f"no thread for it: {error}")

    def _take_back(self) -> None:
        """Be NEW again, without what may have been granted, unless another thread is at it."""
        with self._guard:
            at_it = self._locking_thread
            if self._state is not _State.LOCKING or at_it not in (None, threading.get_ident()):
                return
            if self._asked:
                self._unregister()
            self._asked, self._locking_thread = False, None
            self._state = _State.NEW
            _under_way.discard(self)
            self._settled.set()

    def _settle(self) -> None:
        with self._guard:
            if self._state is not _State.LOCKING or self._locking_thread is not None:
                return  # taken back, closed, or another's
            self._locking_thread = threading.get_ident()
        try:
            refused = self._register()
        except Exception as error:  # no driver, no device, a fork: torch has many types for it
            refused = f"{type(error).__name__}: {error}"
        self._finish(refused)

    def _finish(self, refused: str | None) -> None:
        try:
            with self._guard:
                self._locking_thread = None
                if self._state is not _State.CLOSED:
                    self._refused = refused
                    self._state = _State.LOCKED if refused is None else _State.REFUSED
                elif refused is None:
                    self._unregister()
                if self._state is _State.LOCKED:
                    self._locked()
        finally:
            _under_way.discard(self)
            self._settled.set()
        if self._state is _State.REFUSED:
            logger.warning("%s", self._explanation())

    def _register(self) -> str | None:
        """Register the range; None, or what the driver said against it."""
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self._device), relaxed_capture():
            said = []
            for flags in self._flags():
                if self._state is _State.CLOSED:
                    return "closed before it was locked"
                self._asked = True
                code = runtime.cudaHostRegister(self._address, self._size, flags)
                if code == runtime.cudaError.success:
                    return None
                self._asked = False
                clear_error()
                said.append(f"cudaHostRegister with flags {flags:#x}: {_name(code)}")
                if int(code) == _ALREADY_REGISTERED:
                    return f"already page-locked by this process: {said[-1]}"
        return "; ".join(said)

    def _flags(self) -> tuple[int, ...]:
        flags = _PORTABLE | _MAPPED
        # A driver that walks the host's page tables (GH200) takes read-only memory without the
        # flag and refuses the flag; every other needs it.
        return (flags | _READ_ONLY, flags) if self._read_only else (flags,)

    def _unregister(self) -> None:
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self._device), relaxed_capture():
            code = runtime.cudaHostUnregister(self._address)
            if code != runtime.cudaError.success:
                clear_error()
                logger.error("%s: cudaHostUnregister: %s", self._what, _name(code))

    def _explanation(self) -> str:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
        driver = ", or a driver that registers read-only mappings" if self._read_only else ""
        remedy = (
            f"Limit of locked memory: {allowed}. Remedy: raise it (ulimit -l unlimited, docker run "
            f"--ulimit memlock=-1){driver}"
        )
        if self._refused is not None and self._refused.startswith("already"):
            remedy = (
                "Whoever locked it, perhaps through another mapping of the same memory, keeps "
                "the lock. Remedy: read in another process than the engine's"
            )
        return (
            f"{self._what}: its {self._size} bytes could not be page-locked "
            f"({self._refused}); copies to and from a GPU go at pageable speed. {remedy}"
        )


def _name(code: Any) -> str:
    return f"{torch.cuda.cudart().cudaGetErrorString(code)} ({int(code)})"


_under_way: weakref.WeakSet[PageLock] = weakref.WeakSet()


_ending = False


def _wait_at_exit() -> None:
    global _ending
    _ending = True
    for lock in list(_under_way):
        lock.wait(_SECONDS_AT_EXIT)


atexit.register(_wait_at_exit)


def pinned_tensor(
    nbytes: int, *, what: str = "host memory", device: int | None = None
) -> torch.Tensor:
    """Page-locked host memory of exactly this size, zeroed.

    The tensor's storage owns mapping and lock: both go with the last view of it, the lock
    first. Where locking is refused (a warning says so) the memory is pageable, and
    ``is_pinned()`` of the tensor is False.

    Parameters
    ----------
    nbytes
        Size, at least 1.
    what
        What it is for, for the log.
    device
        See ``PageLock``.

    Returns
    -------
    torch.Tensor
        ``uint8 [nbytes]``.
    """
    return torch.from_numpy(np.asarray(_LockedMemory(nbytes, what, device)))


class _LockedMemory:
    """Owner of an anonymous mapping and of its lock, for NumPy's array interface."""

    def __init__(self, nbytes: int, what: str, device: int | None) -> None:
        if nbytes < 1:
            raise ValueError(f"{nbytes} bytes of host memory")
        # Shared, so that a fork neither copies the locked pages nor moves ours elsewhere.
        self._mapping = mmap.mmap(-1, nbytes)
        address = np.frombuffer(self._mapping, dtype=np.uint8).ctypes.data
        self._lock = PageLock(address, nbytes, what=what, device=device)
        self._lock.run()
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }

    def __del__(self) -> None:
        lock = getattr(self, "_lock", None)
        if lock is not None:
            lock.close()
