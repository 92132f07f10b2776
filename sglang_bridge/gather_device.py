"""Gathering on a CUDA engine: three streams, and nothing that the scheduler thread waits for.

Flow, with what orders each step::

    gather stream   snapshot of a request's KV locations   after the writes of req_to_token
                                                           that were asked for before it
                    schedule stream waits for the snapshot (SGLang rewrites the row next)
                    rows and tags into a lane of staging   after the lane's last copy
                    the next forward's scatter waits for this (``fence``)
    copy stream     lane -> page-locked arena, tags -> host buffer      after the gather
    sealer thread   waits for the copy's event, then reads the tags

Two streams, so that the next gather, and through it the next forward, never queues behind
PCIe, unless the lanes are full. The forward that wrote the rows is over when its result is
processed (the scheduler waited for it), so the gather need not wait for it.

The snapshot and the schedule stream
    Under SGLang's overlap the schedule stream is held back behind the forward that was
    launched meanwhile, for a prefill behind the whole of it. A snapshot there would wait for
    it. What it must come after are the earlier writes to ``req_to_token``, and those the
    launched forward came after as well: so it waits for that forward's beginning. Where no
    forward was launched meanwhile, nothing holds the schedule stream back and it waits for
    that.

Until the arena is page-locked (``pinned``), and where that is refused, an asynchronous copy
would make its caller wait: the sealer copies then, out of memory of the run's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shmroute import Arena
from shmroute.counters import Counters
from shmroute.pinned import PageLock

from .finished import Finished, Gathered, Job
from .kernels import gather
from .staging import LANES, STAGING_BYTES, HostBuffer, HostBuffers, Lane, Run, plan_runs
from .table import RouteTable

logger = logging.getLogger("shmroute")


class DeviceGatherer:
    """See ``finished.Gatherer``."""

    def __init__(
        self,
        table: RouteTable,
        arena: Arena,
        counters: Counters,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self._table = table
        table.fence = self.fence
        self._counters = counters
        self._device = table.device
        routes = table.routes
        self._row_bytes = routes.row_bytes
        self._lane_bytes = max(staging_bytes // LANES, routes.row_bytes)
        self._lane_rows = self._lane_bytes // routes.row_bytes
        self._heap = torch.frombuffer(arena.memory.heap, dtype=torch.uint8)
        self.page_lock = PageLock(
            arena.memory.heap_address,
            arena.memory.description.heap_bytes,
            what=f"arena {arena.segment.data}",
            device=self._device.index,
        )
        self._gather = torch.cuda.Stream(self._device)
        self._copy = torch.cuda.Stream(self._device)
        self._lanes: list[Lane] = []
        self._next_lane = 0
        self._buffers = HostBuffers(self._lane_rows)
        self._hand_over: Callable[[Gathered | None], None] = lambda _: None
        self._gathered: torch.cuda.Event | None = None
        self._begun, self._processed = 0, 0
        self._begin: torch.cuda.Event | None = None
        self._ordered = False

    def start(self, hand_over: Callable[[Gathered | None], None]) -> None:
        self._hand_over = hand_over
        self._make_lanes()
        self.page_lock.start()

    def _make_lanes(self) -> None:
        with torch.cuda.stream(self._gather):  # the stream whose later allocations may reuse it
            self._lanes = [self._new_lane(self._lane_bytes, self._lane_rows) for _ in range(LANES)]

    def _new_lane(self, nbytes: int, rows: int) -> Lane:
        return Lane(nbytes, rows, self._table.words.dtype, self._device)

    # -- the order of the schedule stream ----------------------------------------------------

    def forward_begins(self) -> int:
        """On the forward's stream, before the model; returns the forward's number."""
        self._begin = torch.cuda.Event()
        self._begin.record()
        self._begun += 1
        return self._begun

    def result_processed(self, forward: int) -> None:
        """The scheduler thread has waited for this forward's end."""
        self._processed = forward
        self._ordered = False

    def _come_after_writes(self) -> None:
        """Order the gather stream behind the writes of ``req_to_token`` asked for so far."""
        if self._begun > self._processed and self._begin is not None:
            self._gather.wait_event(self._begin)
        else:
            self._gather.wait_stream(torch.cuda.current_stream())
        self._ordered = True

    def snapshot(self, req_to_token: torch.Tensor, slot: int, start: int, end: int) -> torch.Tensor:
        if not self._ordered:
            self._come_after_writes()
        schedule = torch.cuda.current_stream()
        with torch.cuda.stream(self._gather):
            locations = req_to_token[slot, start:end].to(torch.int32, copy=True)
            taken = torch.cuda.Event()
            taken.record()
        schedule.wait_event(taken)
        return locations

    # -- scheduler thread --------------------------------------------------------------------

    def submit(self, jobs: list[Job]) -> None:
        planned = plan_runs(jobs, self._row_bytes, self._lane_bytes, self._lane_rows)
        for run in planned:
            try:
                work = self._launch(run)
            except Exception as error:
                # Told to the sealer: one thread fails records and counts them.
                logger.exception("shmroute: the rows of finished requests could not be gathered")
                work = _Run(self, run, None, None)
                work.fail(error)
            self._hand_over(work)
        self._counters.set("host_buffers_added", self._buffers.added)
        self._counters.set("page_locked_bytes", self._heap.nbytes if self.page_lock.ready else 0)

    def _launch(self, run: Run) -> _Run:
        pageable = not self.page_lock.ready
        buffer = self._buffers.take()
        with torch.cuda.stream(self._gather):
            lane = self._new_lane(run.nbytes, run.rows) if pageable else self._take_lane()
            if lane.copied is not None:
                self._gather.wait_event(lane.copied)
            self._gather_run(run, lane, buffer)
            gathered = torch.cuda.Event()
            gathered.record()
        self._gathered = gathered
        work = _Run(self, run, lane, buffer)
        with torch.cuda.stream(self._copy):
            self._copy.wait_event(gathered)
            if not pageable:
                self.copy_rows(run, lane)
            buffer.tags[: run.rows].copy_(lane.tags[: run.rows], non_blocking=True)
            # Blocking: the sealer sleeps instead of spinning on the interpreter's core.
            work.copied = torch.cuda.Event(blocking=True)
            work.copied.record()
        lane.copied = work.copied
        work.pageable = pageable
        self._counters.add("pageable_copies", pageable)
        return work

    def _take_lane(self) -> Lane:
        lane = self._lanes[self._next_lane]
        self._next_lane = (self._next_lane + 1) % LANES
        return lane

    def _gather_run(self, run: Run, lane: Lane, buffer: HostBuffer) -> None:
        table, word = self._table, self._table.word_bytes
        count = len(run.pieces)
        buffer.piece_array[:count] = [
            (
                piece.job.request.locations.data_ptr() + 4 * piece.first,
                piece.rows,
                piece.place // word,
                piece.tag,
            )
            for piece in run.pieces
        ]
        pieces = lane.pieces[:count]
        pieces.copy_(buffer.pieces[:count], non_blocking=True)
        longest = max(piece.rows for piece in run.pieces)
        gather(pieces, longest, table.words, table.tags, lane.words, lane.tags)

    def copy_rows(self, run: Run, lane: Lane) -> None:
        """Copy a gathered run into the arena, on the calling thread's stream."""
        target = self._heap[run.offset : run.offset + run.nbytes]
        target.copy_(lane.rows[: run.nbytes], non_blocking=True)

    def gather_now(self, request: Finished) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        table = self._table
        rows = np.empty((request.tokens, *table.routes.row_shape), dtype=table.routes.dtype)
        with torch.cuda.stream(self._gather):
            tags = table.gather(request.locations, table.as_storage(rows))
            return rows, tags.cpu().numpy()

    def fence(self) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            torch.cuda.current_stream().wait_event(gathered)

    # -- sealer thread -----------------------------------------------------------------------

    def copy_pageable(self, run: Run, lane: Lane) -> None:
        """Copy a run whose target is not page-locked: this waits for the whole of it."""
        with torch.cuda.stream(self._copy):
            self.copy_rows(run, lane)
            self._copy.synchronize()

    def give(self, buffer: HostBuffer) -> None:
        self._buffers.give(buffer)

    # -- the end, and pauses -----------------------------------------------------------------

    def give_back(self) -> None:
        """Free the staging and the table's device memory; the engine is idle and may wait."""
        self._gather.synchronize()
        self._copy.synchronize()
        self._lanes = []
        self._table.give_back()
        torch.cuda.empty_cache()

    def take_again(self) -> None:
        """Take both again; the table's rows are invalid until forwards fill them."""
        self._table.take_again()
        self._make_lanes()

    def stop(self) -> None:
        self._hand_over(None)
        self._gather.synchronize()
        self._copy.synchronize()
        self.page_lock.close()


class _Run:
    """A run on its way: ``finished.Gathered``."""

    def __init__(
        self, owner: DeviceGatherer, run: Run, lane: Lane | None, buffer: HostBuffer | None
    ) -> None:
        self.jobs = [piece.job for piece in run.pieces if piece.last]
        self.copied: torch.cuda.Event | None = None
        self.pageable = False
        self._owner, self._run, self._lane, self._buffer = owner, run, lane, buffer

    def wait(self) -> None:
        if self.copied is None or self._buffer is None:
            return  # it failed, and its jobs say why
        try:
            self.copied.synchronize()
            if self.pageable and self._lane is not None:
                self._owner.copy_pageable(self._run, self._lane)
            self._lane = None
            self._read_tags(self._buffer)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Every record with a piece here has lost rows, also one that ends in a later run."""
        for piece in self._run.pieces:
            piece.job.error = piece.job.error or error

    def _read_tags(self, buffer: HostBuffer) -> None:
        for piece in self._run.pieces:
            tags = buffer.tag_array[piece.tag : piece.tag + piece.rows]
            job = piece.job
            if piece.first == 0 and piece.last:
                job.tags = tags
                continue
            if job.tags is None:
                job.tags = np.empty(job.request.tokens, dtype=np.int64)
            job.tags[piece.first : piece.first + piece.rows] = tags

    def done(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._owner.give(buffer)
