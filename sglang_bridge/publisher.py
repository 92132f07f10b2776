"""From a finished request to a sealed record, without the scheduler thread waiting.

Flow::

    scheduler thread        collect: reserve, snapshot the KV locations, hand out the ticket
                            flush:   queue what finished in this step
    gatherer thread         gather rows and tags out of the table into the extents;
                            then the next forward may scatter
    sealer thread           check tags, compare with the shadow, seal or fail

Promises kept here
    - Never wrong: rows are gathered by locations that were copied before SGLang could
      rewrite the request's row of ``req_to_token``, before the next scatter; each row's tag
      must name the request's own token, else the row is missing.
    - Never lost without a name: what cannot be reserved goes inline; what fails before the
      ticket leaves becomes an error ticket, later a failed record. ``finished = ticketed +
      inline + failed + no_routes``.

This is the form for host memory, where no stream orders the work, so two threads and an
event do. On a GPU the same three steps are a gather stream, a copy stream and the sealer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shmroute import Arena, ArenaFull, WeightRun
from shmroute.counters import SEALING, Counters
from shmroute.metadata import ranges_of, weight_runs
from shmroute.reservation import Reservation
from shmroute.ticket import RID_BYTES_MAX, failed_ticket

from .epochs import WeightEpochs
from .shadow import Shadow
from .table import RouteTable
from .tags import epochs_of, expected_places, wrong_rows

logger = logging.getLogger("shmroute")

_WARNING_SECONDS = 1.0


@dataclass(slots=True)
class Finished:
    """What is known of a request at its end, before its KV cache is released.

    Attributes
    ----------
    start, tokens
        Rows ``[start, start + tokens)`` of the request.
    locations
        ``[tokens]`` KV locations: a copy, since ``req_to_token`` changes right after.
    token_ids
        Returns the ids of tokens ``[start, start + tokens)``; called once, later.
    native
        In shadow mode SGLang's own rows, ``int32 [tokens, all layers, top_k]``.
    """

    rid: str
    start: int
    tokens: int
    prompt_tokens: int
    locations: torch.Tensor
    token_ids: Callable[[], npt.NDArray[np.int64]]
    native: torch.Tensor | None = None


@dataclass(slots=True)
class _Job:
    request: Finished
    record: Reservation
    epoch: int
    tags: npt.NDArray[np.int64] | None = None
    error: Exception | None = None


class Publisher:
    """Owner of the arena's writing side in an engine's scheduler process."""

    def __init__(
        self,
        arena: Arena,
        epochs: WeightEpochs,
        *,
        vocabulary: int,
        inline_when_full: bool,
        shadow: Shadow | None,
    ) -> None:
        self.arena = arena
        self.counters = arena.writer.counters
        self._late = Counters(arena.memory.counters, SEALING)
        self._epochs = epochs
        self._vocabulary = vocabulary
        self._inline_when_full = inline_when_full
        self._shadow = shadow
        self._table: RouteTable | None = None
        self._pending: list[_Job] = []
        self._last: Reservation | None = None
        self._broken = False
        self._unsaid, self._next_warning = 0, 0.0
        self._gathered = threading.Event()
        self._gathered.set()
        # None ends a thread, and is passed on to the next.
        self._to_gather: queue.SimpleQueue[tuple[list[_Job], threading.Event] | None] = (
            queue.SimpleQueue()
        )
        self._to_seal: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=loop, name=f"shmroute-{name}", daemon=True)
            for name, loop in (("gather", self._gather_loop), ("seal", self._seal_loop))
        ]

    def start(self, table: RouteTable) -> None:
        """Attach the table and start the two threads."""
        self._table = table
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Seal what is queued, then end the arena's writing."""
        self.flush()
        self._to_gather.put(None)
        for thread in self._threads:
            thread.join()
        self.arena.close()

    def fence(self) -> None:
        """Return when every gather that was queued has read its rows."""
        self._gathered.wait()

    # -- scheduler thread --------------------------------------------------------------------

    def collect(self, request: Finished) -> bytes:
        """Take a request that was counted as finished; returns its response's envelope."""
        if request.tokens == 0:
            self.counters.add("inline")
            self.counters.add("inline_empty")
            return self._empty(request)
        if self._broken:
            return self._inline(request, "inline_after_failure")
        try:
            record = self.arena.reserve(
                request.rid,
                tokens=request.tokens,
                start=request.start,
                prompt_tokens=request.prompt_tokens,
                after=self._last,
            )
        except ArenaFull as full:
            return self._when_full(request, full)
        try:
            ticket = record.ticket
            self._pending.append(_Job(request, record, self._epochs.current))
        except BaseException:
            record.fail("the engine could not issue its ticket")
            raise
        self._last = record
        self.counters.add("tickets")
        return ticket

    def refuse(self, rid: str, reason: str) -> bytes:
        """An envelope that tells the reader why this request has no routes."""
        self.counters.add("failed_before_ticket")
        # What made the request fail may be its rid: one that no ticket can hold.
        self.arena.writer.forget_name(rid)
        printable = rid[:RID_BYTES_MAX].encode("utf-8", "replace").decode()
        return failed_ticket(printable, reason)

    def flush(self) -> None:
        """Queue what was collected in this step."""
        if not self._pending:
            return
        jobs, self._pending = self._pending, []
        gathered = threading.Event()
        self._gathered = gathered
        self.counters.add("publish_calls")
        self._to_gather.put((jobs, gathered))

    def _when_full(self, request: Finished, full: ArenaFull) -> bytes:
        self._warn_full(request, full)
        if self._inline_when_full:
            return self._inline(request, "inline_full")
        return self.refuse(request.rid, str(full))

    def _warn_full(self, request: Finished, full: ArenaFull) -> None:
        """One line a second at most: an arena that stays full must not fill the log as well."""
        self._unsaid += 1
        now = time.monotonic()
        if now < self._next_warning:
            return
        logger.warning(
            "shmroute: the rows of rid %s (%d tokens) %s; %d requests since the last such line: %s",
            request.rid,
            request.tokens,
            "travel inside its response" if self._inline_when_full else "are not kept",
            self._unsaid,
            full,
        )
        self._unsaid, self._next_warning = 0, now + _WARNING_SECONDS

    def _inline(self, request: Finished, why: str) -> bytes:
        """Gather now, on the calling thread: the one case in which it waits."""
        table = self._get_table()
        routes = table.routes
        rows = np.empty((request.tokens, *routes.row_shape), dtype=routes.dtype)
        tags = table.gather(request.locations, table.as_storage(rows)).cpu().numpy()
        missing, versions = self._judge(request, tags, self._epochs.current)
        if self._shadow is not None:
            self._shadow.compare(request.rid, request.start, rows, request.native, missing)
        envelope = self.arena.inline(
            request.rid,
            rows,
            start=request.start,
            prompt_tokens=request.prompt_tokens,
            missing=missing,
            versions=versions,
        )
        self.counters.add("inline")
        self.counters.add(why)
        return envelope

    def _empty(self, request: Finished) -> bytes:
        routes = self.arena.memory.description.routes
        return self.arena.inline(
            request.rid,
            np.empty((0, *routes.row_shape), dtype=routes.dtype),
            start=request.start,
            prompt_tokens=request.prompt_tokens,
        )

    def _get_table(self) -> RouteTable:
        assert self._table is not None, "Publisher.start was not called"
        return self._table

    # -- gatherer thread ---------------------------------------------------------------------

    def _gather_loop(self) -> None:
        while (work := self._to_gather.get()) is not None:
            jobs, gathered = work
            try:
                for job in jobs:
                    self._gather(job)
            finally:
                gathered.set()
            self._to_seal.put(jobs)
        self._to_seal.put(None)

    def _gather(self, job: _Job) -> None:
        table = self._get_table()
        try:
            tags = table.gather(job.request.locations, table.as_storage(job.record.rows))
            job.tags = tags.cpu().numpy()
        except Exception as error:
            # Told to the sealer: one thread fails records and counts them.
            job.error = error

    # -- sealer thread -----------------------------------------------------------------------

    def _seal_loop(self) -> None:
        while (jobs := self._to_seal.get()) is not None:
            for job in jobs:
                try:
                    self._seal(job)
                except Exception as error:
                    self._give_up(job, error)
            try:
                self.arena.writer.maintain()
            except Exception:
                # The next round tries again; until then a full arena serves inline.
                logger.exception("shmroute: reclaiming failed")

    def _seal(self, job: _Job) -> None:
        if job.error is not None:
            raise job.error
        assert job.tags is not None
        missing, versions = self._judge(job.request, job.tags, job.epoch)
        if self._shadow is not None:
            self._shadow.compare(
                job.request.rid, job.request.start, job.record.rows, job.request.native, missing
            )
        self._late.add("tags_checked", job.request.tokens)
        self._late.add("tags_wrong", sum(end - first for first, end in missing))
        job.record.seal(missing=missing, versions=versions)

    def _judge(
        self, request: Finished, tags: npt.NDArray[np.int64], epoch: int
    ) -> tuple[tuple[tuple[int, int], ...], tuple[WeightRun, ...]]:
        """Missing row ranges and weight runs, from the tags."""
        places = expected_places(request.token_ids(), request.start, self._vocabulary)
        if len(places) != request.tokens:
            raise RuntimeError(f"{len(places)} token ids for {request.tokens} rows")
        wrong = wrong_rows(tags, places)
        if wrong.any():
            logger.error(
                "shmroute: rid %s misses %d of %d rows: their KV locations hold other tokens' "
                "routes or none (first at token %d)",
                request.rid,
                int(wrong.sum()),
                request.tokens,
                request.start + int(np.argmax(wrong)),
            )
        # A missing row has no epoch of its own: it takes its predecessor's.
        epochs = np.where(wrong, -1, epochs_of(tags, epoch))
        known = epochs[~wrong]
        filled = np.maximum.accumulate(np.where(wrong, 0, np.arange(len(epochs))))
        epochs = epochs[filled] if len(known) else np.full(len(epochs), epoch)
        epochs[epochs < 0] = known[0] if len(known) else epoch
        return ranges_of(wrong), weight_runs(epochs, self._epochs.label)

    def _give_up(self, job: _Job, error: Exception) -> None:
        logger.error(
            "shmroute: the record of rid %s failed after its ticket had left: %s",
            job.request.rid,
            error,
            exc_info=error,
        )
        self._broken = self._broken or _is_device_error(error)
        self._late.add("failed_after_ticket")
        if job.record.open:
            try:
                job.record.fail(f"{type(error).__name__}: {error}")
            except Exception:
                # The thread must live on: without it no later record would ever be sealed.
                logger.exception("shmroute: rid %s could not even be failed", job.request.rid)


def _is_device_error(error: Exception) -> bool:
    """After one of these no later copy can be trusted to work: requests go inline."""
    accelerator_error: Any = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator_error)
