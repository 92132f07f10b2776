"""Ways of a record's rows from one process to others of the node: what each of them must offer.

Every way has two ends. The producer's end, a `Way`, runs on the thread that is timed: it is given
the record where the GPU's gather leaves it, uint8 ``[tokens, 48, 8]`` in one piece, and gives a
locator for each reader. A reader's end, an `Opener`, makes an ndarray of its locator and holds it
until it is told to drop it. Here are the ways through a segment of shared memory;
`transport_files` has those through files in ``/dev/shm``, `transport_responses` those that carry
rows in an engine's response, `transport_ray`, `transport_mooncake` and `transport_nixl` those of
Ray's object store, Mooncake Store and NIXL.

``copied`` and ``copied_each`` say how often the record's bytes are written on the way, once and
for every reader, counted from what each library does; an int32 of a uint8 id counts four.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker, shared_memory
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from route_chains import LAYERS, TOP_K, RouteTables, new_rid
from store import RecordRing, capacity_for, scratch_arena

import shmroute
from shmroute import inspection

TORCH_FILES = "/dev/shm/torch_"
RECORDS_FIT = 4  # into the arena, of the largest

Array = npt.NDArray[Any]
Locator = TypeVar("Locator")


@dataclass(frozen=True, slots=True)
class Record:
    """A request's rows as two engines hold them when it ends.

    Attributes
    ----------
    rows
        uint8 ``[tokens, LAYERS, TOP_K]``, contiguous, as a gather on the GPU leaves them.
    tables, locations
        The same engine's int32 table in host memory and the request's rows in it.
    """

    rows: Array
    tables: RouteTables
    locations: Any


class Way(ABC, Generic[Locator]):
    """The producer's end."""

    name: ClassVar[str]
    copied: ClassVar[Mapping[str, float]]
    copied_each: ClassVar[Mapping[str, float]] = {}
    #: Laps until it has the memory that it goes on with.
    warm_ups: ClassVar[int] = 1
    #: Whether the rows are those of ``Record.locations``, int32.
    native: ClassVar[bool] = False
    #: Whether a locator can be read by the reader it was meant for only, and once.
    gone_when_read: ClassVar[bool] = False

    @abstractmethod
    def publish(self, record: Record, readers: int) -> Sequence[Locator]:
        """Make the record available: all that the calling thread has to do for it."""

    @abstractmethod
    def retire(self) -> None:
        """The last record is not needed any more."""

    def drain(self) -> None:
        """Give back the space of all records."""
        self.retire()

    def renew(self) -> None:
        """Begin with an empty store, where it never gets smaller."""

    @abstractmethod
    def shared_bytes(self) -> int:
        """Bytes that records take outside of any process's own memory."""

    def pids(self) -> list[int]:
        """Processes of its own that take part."""
        return []

    def trim(self) -> None:
        """Have its processes give back to the system what they have freed."""

    def close(self) -> None:
        """Leave nothing behind."""
        self.drain()


class Opener(ABC, Generic[Locator]):
    """A reader's end; it holds one record at most."""

    @abstractmethod
    def open(self, locator: Locator) -> Array: ...

    def drop(self) -> None:
        """Let go of what was opened; its array is gone already."""

    def trim(self) -> None:
        """Give back what is kept from record to record."""


# -- shmroute ------------------------------------------------------------------------------------


class ArenaWay(Way[bytes]):
    """shmroute: reserve, copy, seal, ticket."""

    name = "arena"
    copied: ClassVar = {"into the record": 1}

    def __init__(self, largest: int) -> None:
        capacity = capacity_for([largest] * RECORDS_FIT, 64)
        self._scope = contextlib.ExitStack()
        self._arena = self._scope.enter_context(scratch_arena(capacity, 64))
        self._ring = RecordRing(self._arena, 0)
        self._last: list[bytes] = []

    def publish(self, record: Record, readers: int) -> Sequence[bytes]:
        with self._arena.reserve(new_rid(), tokens=len(record.rows)) as slot:
            np.copyto(slot.rows, record.rows)
        self._last.append(slot.ticket)
        return [slot.ticket] * readers

    def retire(self) -> None:
        while self._last:
            self._ring.add(self._last.pop())

    def drain(self) -> None:
        self.retire()
        self._ring.release_all()

    def shared_bytes(self) -> int:
        report = inspection.inspect(self._arena.segment)
        if report is None or report.use is None:
            raise RuntimeError("the arena is gone")
        return report.use.sealed_bytes

    def close(self) -> None:
        self._scope.close()


class ArenaOpener(Opener[bytes]):
    """``ShmRouteReader``; the view keeps the record's lease until it is dropped."""

    def open(self, locator: bytes) -> Array:
        with shmroute.ShmRouteReader(locator) as routes:
            return routes.numpy()


# -- Python's and torch's shared memory ----------------------------------------------------------


class SharedMemoryWay(Way[str]):
    """``multiprocessing.shared_memory``: a block for each record, whose name is the locator."""

    name = "multiprocessing.shared_memory"
    copied: ClassVar = {"into the block": 1}

    def __init__(self) -> None:
        self._blocks: list[shared_memory.SharedMemory] = []

    def publish(self, record: Record, readers: int) -> Sequence[str]:
        block = shared_memory.SharedMemory(create=True, size=record.rows.nbytes)
        self._blocks.append(block)
        np.copyto(np.ndarray(record.rows.shape, np.uint8, buffer=block.buf), record.rows)
        return [block.name] * readers

    def retire(self) -> None:
        while self._blocks:
            block = self._blocks.pop()
            block.close()
            try:
                block.unlink()
            except FileNotFoundError:
                # A killed reader's resource tracker was faster; ours must not try, too.
                resource_tracker.unregister(f"/{block.name}", "shared_memory")

    def shared_bytes(self) -> int:
        return sum(block.size for block in self._blocks)


class SharedMemoryOpener(Opener[str]):
    """Attaches by name."""

    def open(self, locator: str) -> Array:
        self._block = shared_memory.SharedMemory(locator)
        assert self._block.buf is not None
        return np.frombuffer(self._block.buf, np.uint8).reshape(-1, LAYERS, TOP_K)

    def drop(self) -> None:
        self._block.close()


class TorchWay(Way[bytes]):
    """``torch.multiprocessing``: a tensor that is pickled moves into shared memory.

    The default strategy, which passes file descriptors; each reader gets a pickle of its own.
    """

    name = "torch.multiprocessing"
    gone_when_read = True
    copied: ClassVar = {"into shared memory": 1}

    def __init__(self) -> None:
        import torch
        import torch.multiprocessing  # its reductions

        self._torch = torch
        self._tensors: list[Any] = []

    def publish(self, record: Record, readers: int) -> Sequence[bytes]:
        tensor = self._torch.from_numpy(record.rows)
        self._tensors.append(tensor)
        return [bytes(ForkingPickler.dumps(tensor)) for _ in range(readers)]

    def retire(self) -> None:
        self._tensors.clear()

    def shared_bytes(self) -> int:
        files = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        held = {
            file.stat().st_ino: file.stat().st_size
            for file in files
            if file.is_symlink() and os.readlink(file).startswith(TORCH_FILES)
        }
        return sum(held.values())


class TorchOpener(Opener[bytes]):
    """Unpickles: the descriptor comes from a thread of the producer."""

    def __init__(self) -> None:
        import torch.multiprocessing  # noqa: F401 (its reductions)

    def open(self, locator: bytes) -> Array:
        rows: Array = pickle.loads(locator).numpy()
        return rows
