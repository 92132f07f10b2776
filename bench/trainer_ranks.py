"""Ranks of a trainer as processes of their own, and their two ways to a batch's routes.

Every rank stands for one GPU of a node. The ranks of a round begin at the same time, and where
memory is asked for each is measured while all hold what they hold most of.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from piped_processes import CONTEXT, PipedProcesses
from route_chains import LAYERS, SGLANG, TOP_K

import shmroute
from shmroute import kept_memory

Way = Literal[
    "native",
    "native, one by one",
    "native, kept memory",
    "as stored",
    "int32",
    "as stored, share",
    "as stored, kept memory",
    "int32, kept memory",
]

ARENA_FILES = b"/dev/shm/shmroute-"
STAGE = slice(12, 24)  # the second of four pipeline stages
SHARE = shmroute.Partition(cp_rank=1, cp_size=2, sp_rank=0, sp_size=2, batch_multiple=256)
_SECONDS = 300.0
_LIBC = ctypes.CDLL(None)

AtMost = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the same records lie for both ways: tickets, and files of base64 of int32.

    ``tokens``: rows of each record, all alike; needed for the ways with kept memory.
    """

    tickets: list[bytes]
    texts: list[Path]
    tokens: int = 0

    def of_first(self, count: int) -> Batch:
        """Those records alone."""
        return Batch(self.tickets[:count], self.texts[:count], self.tokens)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a process.

    Attributes
    ----------
    private, proportional
        Its own, and with its part of what it shares with others; arenas left out.
    arena
        Its part of the pages of arenas that it has mapped, the writer being another that has.
    """

    private: int
    proportional: int
    arena: int

    def beyond(self, before: Memory) -> Memory:
        """What it has more than before; of arenas all, since what it reads again is mapped."""
        return Memory(
            self.private - before.private, self.proportional - before.proportional, self.arena
        )

    @property
    def pss(self) -> int:
        """With its part of all that it shares, arenas included."""
        return self.proportional + self.arena


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rank took: seconds, and the bytes that it had grown by.

    Attributes
    ----------
    grown, held
        At its most memory, and when it has the packed batch and nothing else.
    """

    seconds: float
    grown: Memory
    held: Memory


# -- the ways ------------------------------------------------------------------------------------


def native(batch: Batch, at_most: AtMost) -> torch.Tensor:
    """As trainers do it: the samples arrive, all of them decoded; then the batch is packed."""
    decoded = [_decoded(text) for text in batch.texts]
    parts = [_padded(rows[:, STAGE]) for rows in decoded]
    packed = torch.cat(parts)
    at_most()
    return packed


def native_one_by_one(batch: Batch, at_most: AtMost) -> torch.Tensor:
    """The least memory that the format allows: a sample's other layers are dropped at once."""
    parts = [_padded(_decoded(text)[:, STAGE]) for text in batch.texts]
    packed = torch.cat(parts)
    at_most()
    return packed


def native_kept(batch: Batch, at_most: AtMost) -> torch.Tensor:
    """The same, into the tensor of the batch before."""
    packed = _kept("native, kept memory", batch, torch.int32)
    at = 0
    for text in batch.texts:
        rows = _decoded(text)[:, STAGE]
        packed.numpy()[at : at + len(rows)] = rows
        packed[at + len(rows)] = torch.arange(TOP_K, dtype=torch.int32)
        at += len(rows) + 1
    at_most()
    return packed


def _kept(way: Way, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """What the process keeps from batch to batch; a sequence's last token has a row, too."""
    return _memory_of_a_stage(way, len(batch.tickets) * (batch.tokens + 1), dtype)


@functools.cache
def _memory_of_a_stage(_way: Way, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((rows, len(range(LAYERS)[STAGE]), TOP_K), dtype=dtype)


def _decoded(text: Path) -> Any:
    """The rows; the text is read where the kernel holds it, and no memory of the rank."""
    with (
        text.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        decoded = SGLANG.decode(mapped)  # type: ignore[arg-type]
    return np.frombuffer(decoded, np.int32).reshape(-1, LAYERS, TOP_K)


def _padded(rows: Any) -> torch.Tensor:
    """The rows of a sequence's tokens, the last one's as padding."""
    padded = torch.empty((len(rows) + 1, *rows.shape[1:]), dtype=torch.int32)
    padded.numpy()[:-1] = rows
    padded[-1] = torch.arange(TOP_K, dtype=torch.int32)
    return padded


def from_arena(
    batch: Batch,
    at_most: AtMost,
    dtype: torch.dtype | None = None,
    tokens: shmroute.Partition | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``read_batch``."""
    packed = shmroute.read_batch(
        batch.tickets, layers=STAGE, tokens=tokens, pad="distinct", dtype=dtype, out=out
    )
    at_most()
    return packed.rows


_WAYS: dict[Way, Callable[[Batch, AtMost], torch.Tensor]] = {
    "native": native,
    "native, one by one": native_one_by_one,
    "native, kept memory": native_kept,
    "as stored": from_arena,
    "int32": lambda batch, at_most: from_arena(batch, at_most, torch.int32),
    "as stored, share": lambda batch, at_most: from_arena(batch, at_most, None, SHARE),
    "as stored, kept memory": lambda batch, at_most: from_arena(
        batch, at_most, out=_kept("as stored, kept memory", batch, torch.uint8)
    ),
    "int32, kept memory": lambda batch, at_most: from_arena(
        batch, at_most, out=_kept("int32, kept memory", batch, torch.int32)
    ),
}


def check_equal(batch: Batch) -> None:
    """Both ways must give the same rows."""
    few = batch.of_first(3)
    expected = native(few, lambda: None)
    for way in _WAYS.keys() - {"native", "as stored, share"}:
        if not torch.equal(_WAYS[way](few, lambda: None).int(), expected):
            raise AssertionError(f"the rows {way} are others than those of the native decode")


# -- the processes -------------------------------------------------------------------------------


class Ranks:
    """So many processes that read the batch at the same time, as often as they are asked to."""

    def __init__(self, count: int, batch: Batch) -> None:
        # Kept: its semaphores lose their names with it, and children may not have opened them yet.
        self._together = CONTEXT.Barrier(count)
        self._children = PipedProcesses(count, _serve, self._together, batch, seconds=_SECONDS)

    def read(self, way: Way, *, afresh: bool) -> list[Reading]:
        """Have every rank read the batch once.

        ``afresh``: after it has given back to the system what it has freed, so that what it grows
        by is what it takes. Else it may take that again, as a process does that reads batch after
        batch.
        """
        self._children.send((way, afresh))
        return self._children.answers()

    def close(self) -> None:
        """End the processes."""
        self._children.close()


def _serve(parent: Connection, together: Barrier, batch: Batch) -> None:
    torch.set_num_threads(1)  # as torchrun has it
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent was killed
        while True:
            way, afresh = parent.recv()
            parent.send(_read(way, together, batch, afresh))


def _read(way: Way, together: Barrier, batch: Batch, afresh: bool) -> Reading:
    def give_back() -> None:
        if afresh:
            kept_memory.forget()
            _LIBC.malloc_trim(0)

    give_back()
    before = _memory()
    most = before
    spent = 0.0

    def at_most() -> None:
        nonlocal most, spent
        reached = time.perf_counter()
        together.wait(_SECONDS)
        most = _memory()
        together.wait(_SECONDS)
        spent = time.perf_counter() - reached

    together.wait(_SECONDS)
    began = time.perf_counter()
    packed = _WAYS[way](batch, at_most)
    seconds = time.perf_counter() - began - spent
    give_back()
    together.wait(_SECONDS)
    held = _memory()
    together.wait(_SECONDS)
    del packed
    return Reading(seconds, most.beyond(before), held.beyond(before))


def _memory() -> Memory:
    private = proportional = arena = 0
    in_arena = False
    # Line by line: all of them at once take 2 MiB, which would be in what is read next.
    with open("/proc/self/smaps", "rb") as mappings:
        for line in mappings:
            name, value = line.split(maxsplit=2)[:2]
            if not name.endswith(b":"):  # a mapping: its addresses come first, its file last
                in_arena = ARENA_FILES in line
            elif name == b"Pss:" and in_arena:
                arena += int(value) * 1024
            elif name == b"Pss:":
                proportional += int(value) * 1024
            elif name.startswith(b"Private_") and not in_arena:
                private += int(value) * 1024
    return Memory(private, proportional, arena)
