"""Gathering on a CUDA engine: three streams, and nothing that the scheduler thread waits for.

Flow, with what orders each step::

    gather stream   snapshot of a request's KV locations   after the writes of req_to_token
                    (or on the schedule stream, below)     that were asked for before it
                    rows into a lane of staging, tags      after the lane's last copy
                    into page-locked host memory
                    the next scatter waits for this (``fence``), and the whole of a forward
                    that has its scatter inside (``forward_begins``)
    copy stream     lane -> page-locked arena                           after the gather
    sealer thread   waits for the copy's event, then reads the tags

Two streams, so that the next gather, and through it the next forward, never queues behind the
rows on PCIe, unless the lanes are full. The forward that wrote the rows is over when its result
is processed (the scheduler waited for it), so the gather need not wait for it.

Why staging: a kernel can write into the page-locked arena itself, by five calls of the driver less.
But it keeps multiprocessors waiting for PCIe, and the forward beside it waits with them: for two
thirds of that time and more, where the copy engine takes a tenth (H200, a script that is not kept).

The snapshot and the schedule stream
    SGLang rewrites the request's row of ``req_to_token`` right after the hook, on the schedule
    stream. Where no forward is in flight, the snapshots of a step are simply copies on that
    stream, in order with everything. But a forward that was launched meanwhile can hold it back,
    where the schedule stream waits for it behind the whole of it (18 ms of 20 in
    ``bench/gpu.py``; by SGLang's overlap ``bench/shadow_campaign.py`` saw 0.1 to 0.2 ms), and
    with it the gather and the response's rows. Then the snapshot is taken on
    the gather stream: after that forward's beginning, which itself came after all writes asked for
    before, and the schedule stream waits for it before it rewrites the row.

    Of a step's requests the first one's locations are copied alone. For those that follow all of
    ``req_to_token`` is copied once, then and there: a row is rewritten by its own request's end
    only, so theirs are still what they were.

Until the arena is page-locked (``pinned``), and where that is refused, an asynchronous copy
would make its caller wait: the sealer copies then, out of memory of the run's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from shmroute import Arena
from shmroute.counters import Counters
from shmroute.cuda_runtime import current_stream, relaxed_capture
from shmroute.pinned import PageLock

from .cuda_driver import Event, copy
from .finished import Finished, Gathered, Job
from .kernels import Gather
from .staging import (
    LANES,
    STAGING_BYTES,
    HostBuffer,
    HostBuffers,
    Lane,
    Run,
    plan_runs,
)
from .table import RouteTable

logger = logging.getLogger("shmroute")

_INT32 = 4
_LOCATIONS_LEAST = 1 << 18
# Of a step's requests the first one's locations are copied alone. Then all of SGLang's pool is,
# once for those that may follow, if it is no larger than this.
_POOL_BYTES_MAX = 64 << 20


class DeviceLocations(NamedTuple):
    """A snapshot: ``int32`` KV locations at a device address, and what keeps them there."""

    address: int
    memory: torch.Tensor


class DeviceGatherer:
    """See ``finished.Gatherer``.

    Parameters
    ----------
    table, arena
        Where rows come from, and whose heap they go to.
    counters
        The scheduler thread's.
    staging_bytes
        GPU memory for rows on their way; more than that goes through it in turns.
    """

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
        self.device, self._index = table.device, table.device.index
        routes = table.routes
        self._row_bytes = routes.row_bytes
        self._lane_bytes = max(staging_bytes // LANES, routes.row_bytes) & -table.word_bytes
        self._lane_rows = self._lane_bytes // routes.row_bytes
        self._heap = torch.frombuffer(arena.memory.heap, dtype=torch.uint8)
        self._heap_address = self._heap.data_ptr()
        self._population = arena.population
        self.page_lock = PageLock(
            arena.memory.heap_address,
            arena.memory.description.heap_bytes,
            what=f"arena {arena.segment.data}",
            device=self.device.index,
            # By its own thread: no other one writes to this gauge.
            locked=lambda: counters.set("page_locked_bytes", arena.memory.heap.nbytes),
        )
        # torch hands out streams of a small pool in turns. Those of another priority are none
        # that SGLang's forwards or copies could have been given.
        self._gather_stream = torch.cuda.Stream(self.device, priority=-1)
        self._copy_stream = torch.cuda.Stream(self.device, priority=-1)
        # Handles: the driver's calls take these, and asking torch costs as much as the call.
        self._gather, self._copy = (
            stream.cuda_stream for stream in (self._gather_stream, self._copy_stream)
        )
        self._schedule = 0
        self._gather_rows = Gather(table.words, table.tags)
        self._lanes: list[Lane] = []
        self._next_lane = 0
        self._buffers = HostBuffers(self._lane_rows, counters)
        self._hand_over: Callable[[Gathered | None], None] = lambda _: None
        self._begin, self._taken, self._gathered = (Event() for _ in range(3))
        self._begun, self._processed = 0, 0
        self._in_doubt: list[HostBuffer] = []
        # Each counted by one thread: the scheduler's, the sealer's.
        self._pageable_launched, self._pageable_copied = 0, 0
        self._ordered, self._aside, self._unfenced = False, False, False
        # Every request holds fewer locations than there are, and few share many of them.
        self._locations = torch.empty(
            2 * len(table.tags) + _LOCATIONS_LEAST, dtype=torch.int32, device=self.device
        )
        # Plain numbers, asked at every request's end.
        self._locations_address = self._locations.data_ptr()
        self._locations_room = self._locations.numel()
        self._locations_used = 0
        self._pool: torch.Tensor | None = None
        self._pool_address, self._pool_stride = 0, 0
        # The pool as it was in this step, once ``_whole``; None: it is too large to be copied.
        self._pool_copy: torch.Tensor | None = None
        self._followed, self._whole = False, False

    def start(self, hand_over: Callable[[Gathered | None], None]) -> None:
        self._hand_over = hand_over
        self._make_lanes()
        self._compile()
        # Not at the same time: the driver would enter the pages itself, and CUDA calls wait for it.
        self._population.then(self.page_lock.start)

    def _compile(self) -> None:
        """Gather a piece of no rows: the first launch compiles, which no request shall wait for."""
        words, buffer, nothing = self._lanes[0].words, self._buffers.take(), (0, 0, 0, 0)
        self._gather_rows(nothing, *buffer.tensors, 1, 1, words, self._gather)
        self._buffers.give(buffer)

    def _make_lanes(self) -> None:
        self._lanes = [self._new_lane(self._lane_bytes) for _ in range(LANES)]

    def _new_lane(self, nbytes: int) -> Lane:
        with torch.cuda.stream(self._gather_stream):  # whose later allocations may reuse it
            return Lane(nbytes, self._table.words.dtype, self.device)

    # -- the order of the schedule stream ----------------------------------------------------

    @property
    def idle(self) -> bool:
        return self._begun == self._processed

    def forward_begins(self, waits: bool = False) -> int:
        stream = current_stream(self._index)
        if waits and self._unfenced:
            self._hold_back_scatters(stream)
        self._begin.record(stream)
        self._begun += 1
        self._new_step()  # the pool has been written to
        return self._begun

    def result_processed(self, forward: int | None) -> None:
        if forward is not None:
            self._processed = forward
        self._new_step()

    def _new_step(self) -> None:
        """What was taken before is gathered from before it is overwritten."""
        self._ordered = False
        self._locations_used = 0
        self._followed, self._whole = False, False

    def _choose_stream(self) -> None:
        """Where this step's snapshots come after the writes of ``req_to_token`` asked for so far.

        While a forward is in flight the schedule stream may be held back behind it, and what was
        written before that forward began is all that there is.
        """
        self._schedule = current_stream(self._index)
        self._aside = not self.idle
        if self._aside:
            self._begin.hold_back(self._gather)
        else:
            # The step before may still be gathered from the memory that these go to.
            self._gathered.hold_back(self._schedule)
        self._ordered = True

    def snapshot(
        self, req_to_token: torch.Tensor, slot: int, start: int, end: int
    ) -> DeviceLocations:
        if req_to_token is not self._pool:
            self.look_at(req_to_token)
        if not self._ordered:
            self._choose_stream()
        count, first = end - start, self._locations_used
        if not count:
            return DeviceLocations(0, self._locations)
        before = _INT32 * (slot * self._pool_stride + start)
        if self._followed and self._pool_copy is not None:
            if not self._whole:
                self._take(self._pool_copy.data_ptr(), self._pool_address, self._pool_copy.nbytes)
                self._whole = True
            return DeviceLocations(self._pool_copy.data_ptr() + before, self._pool_copy)
        if first + count <= self._locations_room:
            self._locations_used = first + count
            taken = DeviceLocations(self._locations_address + _INT32 * first, self._locations)
        else:
            taken = self._place_elsewhere(count)
        self._take(taken.address, self._pool_address + before, _INT32 * count)
        self._followed = True
        return taken

    def _take(self, target: int, source: int, nbytes: int) -> None:
        """Copy out of the pool before what is asked of the schedule stream from here on."""
        if self._aside:
            copy(target, source, nbytes, self._gather)
            self._taken.record(self._gather)
            self._taken.hold_back(self._schedule)
        else:
            copy(target, source, nbytes, self._schedule)

    def _come_after_snapshots(self) -> None:
        """Order the gather stream behind this step's snapshots."""
        if not self._aside:
            self._taken.record(self._schedule)
            self._taken.hold_back(self._gather)

    def look_at(self, req_to_token: torch.Tensor) -> None:
        """Take what ``snapshot`` needs for this pool: at a request's end it would take too long."""
        if req_to_token.dtype != torch.int32 or req_to_token.stride(1) != 1:
            raise TypeError(
                f"req_to_token is {req_to_token.dtype} with strides {req_to_token.stride()}; "
                "contiguous rows of int32 are known"
            )
        self._pool = req_to_token
        self._pool_address, self._pool_stride = req_to_token.data_ptr(), req_to_token.stride(0)
        self._pool_copy = None
        if req_to_token.is_contiguous() and req_to_token.nbytes <= _POOL_BYTES_MAX:
            try:
                self._pool_copy = self._room_for(req_to_token.numel())
            except torch.OutOfMemoryError:
                logger.warning(
                    "shmroute: no %.1f MiB on %s for a copy of req_to_token: the KV locations of "
                    "requests that finish together are copied one by one",
                    req_to_token.nbytes / 2**20,
                    self.device,
                )

    def _place_elsewhere(self, count: int) -> DeviceLocations:
        memory = self._room_for(count)
        return DeviceLocations(memory.data_ptr(), memory)

    def _room_for(self, locations: int) -> torch.Tensor:
        with torch.cuda.stream(self._gather_stream):
            return torch.empty(locations, dtype=torch.int32, device=self.device)

    # -- scheduler thread --------------------------------------------------------------------

    def has_room(self, nbytes: int) -> bool:
        if self.page_lock.ready:
            return True  # lanes are used in turns
        # Rows that wait for the sealer's copy have GPU memory of their own.
        waiting = self._pageable_launched - self._pageable_copied
        return waiting + nbytes <= LANES * self._lane_bytes

    def submit(self, jobs: list[Job]) -> None:
        for run in plan_runs(jobs, self._row_bytes, self._lane_bytes, self._lane_rows):
            work = _Run(self, run, pageable=not self.page_lock.ready)
            try:
                self._come_after_snapshots()
                self._launch(work)
            except Exception as error:
                # Told to the sealer: one thread fails records and counts them.
                logger.exception("shmroute: the rows of finished requests could not be gathered")
                work.fail(error)
            self._hand_over(work)

    def _launch(self, work: _Run) -> None:
        run = work.run
        buffer = self._buffers.take()
        # Kept for good if what follows fails: a gather may read and write it.
        self._in_doubt.append(buffer)
        lane = self._new_lane(run.nbytes) if work.pageable else self._take_lane()
        before = lane.buffer
        if before is not None and not before.arrived:
            before.copied.hold_back(self._gather)
        self._gather_run(run, lane, buffer)
        self._gathered.record(self._gather)
        self._gathered.hold_back(self._copy)
        self._unfenced = True
        if work.pageable:
            self._pageable_launched += run.nbytes
            self._counters.add("pageable_copies")
        else:
            self.copy_rows(run, lane)
        buffer.arrived = False
        buffer.copied.record(self._copy)
        lane.buffer = buffer
        work.lane, work.buffer = lane, buffer
        self._in_doubt.pop()

    def _take_lane(self) -> Lane:
        lane = self._lanes[self._next_lane]
        self._next_lane = (self._next_lane + 1) % LANES
        return lane

    def _gather_run(self, run: Run, lane: Lane, buffer: HostBuffer) -> None:
        word, count = self._table.word_bytes, len(run.pieces)
        pieces = [
            (
                piece.job.request.locations.address + _INT32 * piece.first,
                piece.rows,
                piece.place // word,
                piece.tag,
            )
            for piece in run.pieces
        ]
        longest = pieces[0][1]
        if count > 1:
            longest = max([piece.rows for piece in run.pieces])
            buffer.pieces[:count] = pieces
        self._gather_rows(
            pieces[0],
            buffer.pieces_address,
            buffer.tags_address,
            count,
            longest,
            lane.words_address,
            self._gather,
        )

    def copy_rows(self, run: Run, lane: Lane) -> None:
        """Copy a gathered run into the page-locked arena."""
        copy(self._heap_address + run.offset, lane.words_address, run.nbytes, self._copy)

    def gather_now(self, request: Finished) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        self._come_after_snapshots()
        table, taken = self._table, request.locations
        rows = np.empty((request.tokens, *table.routes.row_shape), dtype=table.routes.dtype)
        first = (taken.address - taken.memory.data_ptr()) // _INT32
        with torch.cuda.stream(self._gather_stream):
            where = taken.memory[first : first + request.tokens]
            return rows, table.gather(where, table.as_storage(rows)).cpu().numpy()

    def fence(self) -> None:
        if self._unfenced:
            self._hold_back_scatters(current_stream(self._index))

    def _hold_back_scatters(self, stream: int) -> None:
        self._gathered.hold_back(stream)
        self._unfenced = False

    # -- sealer thread -----------------------------------------------------------------------

    def copy_pageable(self, run: Run, lane: Lane) -> None:
        """Copy a run whose target is not page-locked: this waits for the whole of it."""
        with torch.cuda.stream(self._copy_stream):
            target = self._heap[run.offset : run.offset + run.nbytes]
            target.copy_(lane.words.view(torch.uint8)[: run.nbytes])
        self._pageable_copied += run.nbytes

    def give(self, buffer: HostBuffer) -> None:
        self._buffers.give(buffer)

    # -- the end, and pauses -----------------------------------------------------------------

    def give_back(self) -> None:
        """Free the staging and the table's device memory; the engine is idle and may wait."""
        self._gather_stream.synchronize()
        self._copy_stream.synchronize()
        self._lanes, self._pool_copy = [], None
        self._table.give_back()
        torch.cuda.empty_cache()

    def take_again(self) -> None:
        """Take both again; the table's rows are invalid until forwards fill them."""
        self._table.take_again()
        self._make_lanes()
        if self._pool is not None:
            self.look_at(self._pool)

    def stop(self) -> None:
        self._hand_over(None)
        self._gather_stream.synchronize()
        self._copy_stream.synchronize()
        self._population.stop()
        self.page_lock.close()


class _Run:
    """A run on its way: ``finished.Gathered``.

    ``lane`` and ``buffer`` are there once everything is launched.
    """

    def __init__(self, owner: DeviceGatherer, run: Run, *, pageable: bool) -> None:
        self.run = run
        self.pageable = pageable
        self.jobs = [piece.job for piece in run.pieces if piece.last]
        self.lane: Lane | None = None
        self.buffer: HostBuffer | None = None
        self._owner = owner

    def wait(self) -> None:
        if self.lane is None or self.buffer is None:
            return  # it failed, and its jobs say why
        try:
            torch.cuda.set_device(self._owner.device)  # the sealer's own context
            with relaxed_capture():
                self.buffer.copied.synchronize()
            self.buffer.arrived = True
            if self.pageable:
                self._owner.copy_pageable(self.run, self.lane)
            self.lane = None
            self._read_tags(self.buffer)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Every record with a piece here has lost rows, also one that ends in a later run."""
        for piece in self.run.pieces:
            piece.job.error = piece.job.error or error

    def _read_tags(self, buffer: HostBuffer) -> None:
        for piece in self.run.pieces:
            tags = buffer.tags[piece.tag : piece.tag + piece.rows]
            job = piece.job
            if piece.first == 0 and piece.last:
                job.tags = tags
                continue
            if job.tags is None:
                job.tags = np.empty(job.request.tokens, dtype=np.int64)
            job.tags[piece.first : piece.first + piece.rows] = tags

    def done(self) -> None:
        buffer, self.buffer = self.buffer, None
        if buffer is not None:
            self._owner.give(buffer)
