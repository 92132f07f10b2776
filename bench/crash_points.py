"""Kill points: where in the protocol a process of the crash campaign dies.

Problem
    A process must die between any two steps of the protocol, by a real SIGKILL, and the
    product must not know of it.

Approach
    A point is named after the step in the docstrings of ``writer``, ``arena``, ``reaper`` and
    ``opening``, and is a call: ``before`` or ``after`` the n-th call of a function, counted
    only inside ``within`` where several steps share that function. ``arm`` wraps the function
    in this process. State words, names and acknowledgements are stored without a call, so
    arming a ``STORE`` or ``LOAD`` point puts probes over these columns.

A function that is gone makes ``arm`` fail, and with it a test: a point never fades silently.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shmroute.memory import ArenaMemory
from shmroute.writer import RecordWriter

Role = Literal["writer", "reader", "reaper"]
When = Literal["before", "after"]

STORE_WORD, STORE_NAME = "crash_points:store_word", "crash_points:store_name"
STORE_RELEASE, LOAD_WORD = "crash_points:store_release", "crash_points:load_word"
_PROBES = (STORE_WORD, STORE_NAME, STORE_RELEASE, LOAD_WORD)


@dataclass(frozen=True, slots=True)
class Point:
    """One place to die.

    Attributes
    ----------
    step
        Operation and number of the step, as in the protocol.
    target
        ``module:function`` or ``module:Class.method`` whose call is counted.
    within
        Functions that must be running for a call to count.
    most
        The call to die at is drawn from 1 to this.
    alone
        Only reached while nobody reads.
    """

    role: Role
    step: str
    when: When
    target: str
    within: tuple[str, ...] = ()
    most: int = 20
    alone: bool = False

    @property
    def operation(self) -> str:
        return self.step.partition(" ")[0]

    @property
    def name(self) -> str:
        called = self.target.rpartition(":")[2].rpartition(".")[2]
        return f"{self.role}, {self.step}, {self.when} {called}"


def _around(role: Role, step: str, target: str, *within: str, **options: Any) -> list[Point]:
    return [
        Point(role, step, "before", target, within, **options),
        Point(role, step, "after", target, within, **options),
    ]


def _after(role: Role, step: str, target: str, *within: str, **options: Any) -> list[Point]:
    return [Point(role, step, "after", target, within, **options)]


_WRITER = "shmroute.writer:RecordWriter"
_TRY, _UNLOCK = (f"shmroute.leases:ExclusiveLeases.{name}" for name in ("try_acquire", "release"))
_RESERVE, _SEAL, _FAIL = f"{_WRITER}.reserve", f"{_WRITER}.seal", f"{_WRITER}._fail_alone"
_RECYCLE, _EVICT, _GIVE = f"{_WRITER}._recycle", f"{_WRITER}.evict_expired", f"{_WRITER}._give_back"

_RECORDS = [
    *_around("writer", "reserve 1 lease", _TRY, f"{_WRITER}._free_slot"),
    *_around("writer", "reserve 2 extent", "shmroute.extents:ExtentAllocator.allocate"),
    *_around("writer", "reserve 3 rid's hash", STORE_NAME, f"{_WRITER}._take_name"),
    *_around("writer", "reserve 4 odd word", STORE_WORD, _RESERVE),
    *_around("writer", "reserve 5 ticket", "shmroute.ticket:ArenaTickets.encode"),
    *_around("writer", "write rows", "crash_writer:copy_half", most=30),
    *_around("writer", "seal 1 begin", "shmroute.reservation:Reservation.seal"),
    *_after("writer", "seal 2 metadata", "shmroute.metadata:Metadata.pack", _SEAL),
    *_around("writer", "seal 2 slot row", "shmroute.layout:write_record", _SEAL),
    *_around("writer", "seal 3 even word", STORE_WORD, _SEAL),
    *_around("writer", "seal 4 lease", _UNLOCK, _SEAL),
    *_around("writer", "fail 1 failure", "shmroute.layout:write_failure", most=5),
    *_around("writer", "fail 2 zero word", STORE_WORD, _FAIL, most=5),
    *_around("writer", "fail 2 lease", _UNLOCK, _FAIL, most=5),
    *_after("writer", "fail 3 give back", _GIVE, _FAIL, most=5),
]
_RECLAIM = [
    *_after("writer", "reclaim 1 find", f"{_WRITER}._released"),
    *_around("writer", "reclaim 2 lease", _TRY, _RECYCLE, most=10),
    *_around("writer", "reclaim 4 zero word", STORE_WORD, _RECYCLE, most=10),
    *_around("writer", "reclaim 4 lease", _UNLOCK, _RECYCLE, _GIVE, most=10),
    *_after("writer", "reclaim 5 give back", _GIVE, _RECYCLE, most=10),
    *_around("writer", "reclaim 5 extent", "shmroute.extents:ExtentAllocator.free", most=10),
    *_after("writer", "evict 1 find", f"{_WRITER}._oldest_expired", _EVICT, most=5),
    *_around("writer", "evict 2 lease", _TRY, _EVICT, most=5),
    *_after("writer", "evict 3 look again", f"{_WRITER}._expired", _RECYCLE, most=5),
    *_around("writer", "evict 4 zero word", STORE_WORD, _EVICT, most=5),
    *_around("writer", "evict 4 lease", _UNLOCK, _EVICT, _GIVE, most=5),
]
_CREATE = [
    *_after("writer", "create 1 object", "posix_ipc:SharedMemory", most=3),
    *_after("writer", "create 1, 4, 5 files", "shmroute.segments:create_object", most=3),
    *_around("writer", "create 2 life lock", "shmroute.arena:lock_range", most=1),
    *_after(
        "writer",
        "create 2 name",
        "shmroute.segments:same_inode",
        "shmroute.arena:_claim_name",
        most=1,
    ),
    *_around("writer", "create 3 memory", "os:posix_fallocate", most=2),
    *_around("writer", "create 6 header", "os:pwrite", "shmroute.layout:initialise", most=2),
    *_after("writer", "create 6 map", "mmap:mmap", "shmroute.arena:_fill", most=2),
    *_around("writer", "create 7 rename", "os:rename", most=1),
    *_around("writer", "close 1 leases", f"{_WRITER}.close", most=1),
    *_around("writer", "close 2 life lock", "shmroute.arena:_close_life", most=1),
    *_around(
        "writer",
        "close 3 reap",
        "shmroute.reaper:reap_segment",
        "shmroute.arena:Arena.close",
        most=1,
    ),
]

_REAP, _LEASE_ALL = "shmroute.reaper:_reap_locked", "shmroute.reaper:_lease_everything"
_REAP_POINTS = [
    *_around(
        "reaper",
        "reap 1 life lock",
        "shmroute.reaper:lock_range",
        "shmroute.reaper:reap_segment",
        most=1,
    ),
    *_after("reaper", "reap 2 name", "shmroute.segments:same_inode", most=1),
    *_around("reaper", "reap 3 leases", "shmroute.reaper:lock_range", _LEASE_ALL, most=1),
    *_after("reaper", "reap 4 unreleased", "shmroute.reaper:_unreleased", most=1),
    *_around(
        "reaper", "reap 5b zero word", STORE_WORD, "shmroute.reaper:_recycle_released", most=2
    ),
    *_around("reaper", "reap 5b lease", _UNLOCK, "shmroute.reaper:_recycle_released", most=2),
    *_around(
        "reaper", "reap 5b punch", "shmroute.reaper:_punch", "shmroute.reaper:_punch_unused", most=2
    ),
    *_around("reaper", "reap 5a zero words", STORE_WORD, _REAP, most=1, alone=True),
    *_around("reaper", "reap 5a punch", "shmroute.reaper:_punch", _REAP, most=1, alone=True),
    *_around("reaper", "reap 5a files", "shmroute.segments:unlink_if_present", most=3, alone=True),
]

_SHARED = "shmroute.leases:SharedLeases"
_OPEN, _SLOT = "shmroute.memory:ArenaMemory.open", "shmroute.opening:Opener._try_slot"
_READ = [
    *_after("reader", "attach list", "shmroute.attached:_segments", most=2),
    *_after("reader", "attach open", "shmroute.segments:open_object", _OPEN, most=2),
    *_around("reader", "attach map", "mmap:mmap", _OPEN, most=2),
    *_after("reader", "attach whole", _OPEN, most=1),
    *_around("reader", "open 1 find", "shmroute.opening:candidates"),
    *_around(
        "reader",
        "lease 2 file",
        "shmroute.leases:open_lease_file",
        f"{_SHARED}._lock_slot",
        most=1,  # it stays open
    ),
    *_around("reader", "lease 2 lock", "shmroute.leases:_set_lock", f"{_SHARED}._lock_slot"),
    *_around("reader", "lease 2 count", f"{_SHARED}.try_acquire"),
    *_around("reader", "open 3 word", LOAD_WORD, _SLOT),
    *_around("reader", "open 4 bounds", "shmroute.opening:_check_bounds"),
    *_after("reader", "open 5 metadata", "shmroute.opening:_checked_metadata"),
    *_after("reader", "open 6 views", "shmroute.opening:LeasedRows"),
    *_around("reader", "hold rows", "crash_reader:look", most=40),
    *_around("reader", "release store", STORE_RELEASE, most=10),
    *_around("reader", "drop lease", f"{_SHARED}.drop"),
    *_around("reader", "drop unlock", f"{_SHARED}._unlock"),
    *_around("reader", "drop rest", f"{_SHARED}._rest"),
]

POINTS: tuple[Point, ...] = (*_RECORDS, *_RECLAIM, *_CREATE, *_REAP_POINTS, *_READ)


# -- arming ------------------------------------------------------------------------------------


def arm(point: Point, call: int, reached: Callable[[], None]) -> None:
    """Have ``reached`` called at the ``call``-th time that this process comes to the point."""
    if point.target in _PROBES:
        _put_probes()
    running: dict[str, int] = {}
    for outer in point.within:
        _wrap(outer, functools.partial(_counting, running, outer))
    seen = 0

    def pass_by() -> None:
        nonlocal seen
        if all(running.get(outer) for outer in point.within):
            seen += 1
            if seen == call:
                reached()

    _wrap(point.target, functools.partial(_passing, pass_by, point.when))


def _counting(
    running: dict[str, int], name: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        running[name] = running.get(name, 0) + 1
        try:
            return function(*arguments, **options)
        finally:
            running[name] -= 1

    return call


def _passing(
    pass_by: Callable[[], None], when: When, function: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if when == "before":
            pass_by()
        result = function(*arguments, **options)
        if when == "after":
            pass_by()
        return result

    return call


def _wrap(target: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = vars(owner)[name]
    if isinstance(original, classmethod):
        setattr(owner, name, classmethod(wrapper(original.__func__)))
    else:
        setattr(owner, name, wrapper(original))


# -- probes ------------------------------------------------------------------------------------


def store_word(column: Any, place: Any, value: Any) -> None:
    column[place] = value


def store_name(column: Any, place: Any, value: Any) -> None:
    column[place] = value


def store_release(column: Any, place: Any, value: Any) -> None:
    column[place] = value


def load_word(column: Any, place: Any) -> Any:
    return column[place]


class _WriterColumn:
    """The writer's view of a column, whose stores are calls."""

    def __init__(self, column: Any, store: str) -> None:
        self._column = column
        self._store = store

    def __getitem__(self, place: Any) -> Any:
        return self._column[place]

    def __setitem__(self, place: Any, value: Any) -> None:
        globals()[self._store](self._column, place, value)  # by name: it may be wrapped


class _SharedColumn(np.ndarray[Any, Any]):
    """A column of ``ArenaMemory`` whose stores and loads are calls."""

    store = ""

    def __getitem__(self, place: Any) -> Any:
        return load_word(self.view(np.ndarray), place)

    def __setitem__(self, place: Any, value: Any) -> None:
        globals()[self.store](self.view(np.ndarray), place, value)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        # What is computed from a column is no column.
        plain = [one.view(np.ndarray) if isinstance(one, _SharedColumn) else one for one in inputs]
        return getattr(ufunc, method)(*plain, **options)


class _Words(_SharedColumn):
    store = "store_word"


class _Acknowledgements(_SharedColumn):
    store = "store_release"


def _put_probes() -> None:
    def memory_with_probes(initialise: Callable[..., None]) -> Callable[..., None]:
        def call(memory: Any, *arguments: Any, **options: Any) -> None:
            initialise(memory, *arguments, **options)
            memory.words = memory.words.view(_Words)
            memory.acknowledgements = memory.acknowledgements.view(_Acknowledgements)

        return call

    def writer_with_probes(initialise: Callable[..., None]) -> Callable[..., None]:
        def call(writer: Any, *arguments: Any, **options: Any) -> None:
            initialise(writer, *arguments, **options)
            writer._words = _WriterColumn(writer._words, "store_word")
            writer._hashes = _WriterColumn(writer._hashes, "store_name")

        return call

    _wrap(f"{ArenaMemory.__module__}:ArenaMemory.__init__", memory_with_probes)
    _wrap(f"{RecordWriter.__module__}:RecordWriter.__init__", writer_with_probes)
