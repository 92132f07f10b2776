"""Which rows of finished records go through GPU memory together, and the buffers for it.

A *run* is one contiguous stretch of the record heap that one copy fills: records that
finished in one step get adjacent extents, so most steps are one run. What lies between two
records' rows in a run (room for metadata) is copied with them and written later, by the
seal. A run fits a lane; a record longer than a lane goes in several runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from shmroute.counters import Counters

from .cuda_driver import Event
from .finished import Job

STAGING_BYTES = 64 << 20
LANES = 2
PIECES_MAX = 256
PIECE_FIELDS = 4
_HOST_BUFFERS_KEPT = 8


class Piece(NamedTuple):
    """Rows ``[first, first + rows)`` of one record, ``place`` bytes into their run.

    ``tag`` is where in the run's tags theirs begin; ``last`` says that the record ends here.
    """

    job: Job
    first: int
    rows: int
    place: int
    tag: int
    last: bool


@dataclass(slots=True)
class Run:
    """``nbytes`` of the heap from ``offset`` on, and the pieces of records in them."""

    offset: int
    nbytes: int = 0
    rows: int = 0
    pieces: list[Piece] = field(default_factory=list)


def plan_runs(
    jobs: Sequence[Job], row_bytes: int, lane_bytes: int, lane_rows: int
) -> Iterator[Run]:
    """Split jobs into runs of at most ``lane_bytes``, ``lane_rows`` and ``PIECES_MAX`` pieces.

    A record that lies right behind the run's last one goes into it, as much of it as fits.
    """
    run, behind = Run(0), -1
    for job in jobs:
        record, tokens = job.record, job.request.tokens
        at, first = record.offset, 0
        while first < tokens:
            place, room = at - run.offset, 0
            if at == behind and len(run.pieces) < PIECES_MAX:
                room = min((lane_bytes - place) // row_bytes, lane_rows - run.rows)
            if room <= 0:
                if run.pieces:
                    yield run
                run, place = Run(at), 0
                room = min(lane_bytes // row_bytes, lane_rows)
            rows = min(room, tokens - first)
            run.pieces.append(Piece(job, first, rows, place, run.rows, first + rows == tokens))
            run.nbytes = place + rows * row_bytes
            run.rows += rows
            first += rows
            at += rows * row_bytes
        behind = record.offset + record.plan.total_bytes
    if run.pieces:
        yield run


class Lane:
    """GPU memory for the rows of one run at a time.

    ``buffer`` is the last one's, whose copy ends its use.
    """

    def __init__(self, nbytes: int, word: torch.dtype, device: torch.device) -> None:
        self.words = torch.empty(nbytes // word.itemsize, dtype=word, device=device)
        self.words_address = self.words.data_ptr()  # what launches and copies go by
        self.buffer: HostBuffer | None = None


class HostBuffer:
    """Page-locked memory for one run, which the gather reads and writes where it lies: its pieces,
    and the tags of its rows.

    A copy would be one more call for each, and they are 2% of the bytes. ``copied`` is recorded
    when the run's rows and tags are there; ``arrived`` says that the sealer has seen it.
    """

    def __init__(self, rows: int) -> None:
        # Kept by their addresses, too, which launches go by.
        memory = torch.empty(PIECES_MAX * PIECE_FIELDS + rows, dtype=torch.int64).pin_memory()
        self.tensors = memory[: PIECES_MAX * PIECE_FIELDS], memory[PIECES_MAX * PIECE_FIELDS :]
        self.pieces_address, self.tags_address = (part.data_ptr() for part in self.tensors)
        pieces, self.tags = (part.numpy() for part in self.tensors)
        self.pieces = pieces.reshape(PIECES_MAX, PIECE_FIELDS)
        self.copied = Event(blocking=True)
        self.arrived = True


class HostBuffers:
    """Host buffers that are kept, since page-locking one costs a millisecond.

    Taken by the scheduler thread, given back by the sealer. Those made because none was free are
    counted in the scheduler thread's ``counters``.
    """

    def __init__(self, rows: int, counters: Counters) -> None:
        self._rows, self._counters = rows, counters
        self._free = deque(HostBuffer(rows) for _ in range(_HOST_BUFFERS_KEPT))

    def take(self) -> HostBuffer:
        try:
            return self._free.popleft()
        except IndexError:
            self._counters.add("host_buffers_added")
            return HostBuffer(self._rows)

    def give(self, buffer: HostBuffer) -> None:
        self._free.append(buffer)
