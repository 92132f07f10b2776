"""From a finished request to a sealed record, without the scheduler thread waiting.

Flow::

    scheduler thread   note:  a request has ended; its KV locations are copied by now
                       issue: describe, reserve and ticket, all that were noted in this step
                       flush: hand what got a ticket to the gatherer
    gatherer           rows and tags out of the table, rows into the extents
                       (``gather_device``: streams; ``gather_host``: a thread)
    sealer thread      wait for the copy, check tags, compare with the shadow, seal or fail

Only the copy of the locations must be made where a request ends: SGLang may rewrite them in the
next statement. All else waits for the first response that is made after it, which is when a
ticket is first needed, and is then done for all requests of the step in one loop. Between two
requests that end SGLang runs as much code as fills the processor's caches, and what is done once
a request there costs several times what it costs in a loop (``bench/engine.py`` on an H200: 160
requests in one step took 12.8 ms of the scheduler thread when all was done where each ended, at
755b7e9, and 2.7 this way, at 5bc856c).

Who issues, whichever comes first: the making of a finished request's response (SGLang reads
``req.routed_experts`` there and nowhere else), the end of the step, the end of a later forward,
the processing of its result, the end of the engine. A request leaves the queue before anything is
done for it, so it gets one ticket and no second one.

Promises kept here
    - Never wrong: rows are gathered by locations that were copied before SGLang could
      rewrite the request's row of ``req_to_token``, before the next scatter (which ``flush``
      precedes); each row's tag must name the request's own token, else the row is missing.
    - Never lost without a name: what cannot be reserved goes inline; what fails before the
      ticket leaves becomes an error ticket, later a failed record; neither touches the other
      requests of the step. ``finished = ticketed + inline + failed + no_routes``.
    - Never in the way: sealing is Python in the engine's own process, so between two records
      the sealer lets go of the interpreter.
    - Never held up for nothing: an idle scheduler thread looks for work without end, and lets go
      of the interpreter for instants in which no other thread wakes up; each of those that seal
      got it back after milliseconds. So that thread sleeps where it has nothing to do and records
      are to be sealed (``let_the_sealer_run``, and ``wait_for_the_sealer`` where it is paused).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shmroute import Arena, ArenaFull
from shmroute.counters import ENGINE, SharedCounters
from shmroute.reservation import Reservation
from shmroute.ticket import RID_BYTES_MAX, failed_ticket

from .epochs import WeightEpochs
from .errors import DeviceError
from .finished import Finished, Gathered, Gatherer, Job
from .judge import Verdict, judge
from .shadow import Shadow
from .ticket_tensor import plain_tensor

logger = logging.getLogger("shmroute")

_WARNING_SECONDS = 1.0
# The sealer's pause before each record, and how long it waits for a step's requests to end.
_PAUSE, _PATIENCE = 50e-6, 0.02
# How long an idle scheduler thread sleeps at a time, and a paused one at most.
_IDLE_SLEEP, _PAUSED_SLEEP_MAX = 0.5e-3, 0.25


class Publisher:
    """Owner of the arena's writing side in an engine's scheduler process.

    Parameters
    ----------
    gatherer
        How rows come out of the route table: by streams or by a thread.
    vocabulary
        Token ids outside ``[0, vocabulary)`` are not told apart in tags.
    inline_when_full
        With a full arena send the rows in the response, else an error ticket.
    shadow
        Compare every record with SGLang's own rows, which each request then brings along.
    respond
        Makes of an envelope what a response carries.
    """

    def __init__(
        self,
        arena: Arena,
        epochs: WeightEpochs,
        gatherer: Gatherer,
        *,
        vocabulary: int,
        inline_when_full: bool,
        shadow: bool,
        respond: Callable[[bytes], Any] = plain_tensor,
    ) -> None:
        self.arena = arena
        self.counters = arena.writer.counters
        self.late_counters = SharedCounters(arena.memory.counters, ENGINE)
        self._epochs = epochs
        self._vocabulary = vocabulary
        self._respond = respond
        self._inline_when_full = inline_when_full
        routes = arena.memory.description.routes
        self._shadow = Shadow(routes, self.late_counters) if shadow else None
        self.gatherer = gatherer
        self._noted: deque[Finished] = deque()
        self._described: deque[Finished] = deque()
        self._pending: list[Job] = []
        self._pending_bytes, self._row_bytes = 0, routes.row_bytes
        self._last: Reservation | None = None
        # Records handed over and records settled, since each is counted by one thread.
        self._handed_over = self._settled = 0
        self._broken = False
        self._unsaid, self._next_warning = 0, 0.0
        # None ends the sealer.
        self._to_seal: queue.SimpleQueue[Gathered | None] = queue.SimpleQueue()
        self._sealer = threading.Thread(target=self._seal_loop, name="shmroute-seal", daemon=True)

    def start(self) -> None:
        """Start the gatherer and the sealer."""
        self.gatherer.start(self._to_seal.put)
        self._sealer.start()

    def stop(self) -> None:
        """Seal what is queued, then end the arena's writing."""
        self.flush()
        self.gatherer.stop()
        self._sealer.join()
        self.arena.close()

    # -- scheduler thread --------------------------------------------------------------------

    def note(self, request: Finished) -> None:
        """Take a request that has ended; ``issue`` sets its ``req.routed_experts``."""
        self._noted.append(request)

    def issue(self) -> None:
        """Give every request that was noted what its response carries, in the order of noting."""
        self._describe()
        described = self._described
        finished = len(described)
        try:
            if finished > 1:
                self._issue_together()
            while described:
                request = described.popleft()
                try:
                    envelope = self.collect(request)
                except Exception as error:
                    self.give_error(request.req, error)
                else:
                    request.answer(self._respond(envelope))
        finally:
            self.counters.add("finished", finished - len(described))

    def _describe(self) -> None:
        noted, described = self._noted, self._described
        while noted:
            request = noted.popleft()
            try:
                request.describe()
            except Exception as error:
                self.counters.add("finished")
                self.give_error(request.req, error)
            else:
                described.append(request)

    def _issue_together(self) -> None:
        """Tickets for the first of those described, in most steps for all of them.

        What needs a look of its own (no rows, no room, a rid that no record can have) and what
        is behind it stays in the queue.
        """
        described, pending = self._described, self._pending
        nbytes = self._row_bytes * sum([request.tokens for request in described])
        if self._broken or not self.gatherer.has_room(self._pending_bytes + nbytes):
            return
        try:
            records = self.arena.writer.reserve_together(described, after=self._last)
        except Exception:
            logger.exception("shmroute: a step's requests are reserved one by one")
            self.counters.add("hook_errors")
            return
        epoch, issued, rows = self._epochs.current, 0, 0
        for record in records:
            request = described.popleft()
            try:
                carried = self._respond(record.ticket)
                pending.append(Job(request, record, epoch))
            except Exception as error:
                record.fail("the engine could not issue its ticket")
                self.give_error(request.req, error)
            else:
                request.answer(carried)
                issued += 1
                rows += request.tokens
        if records:
            self._last = records[-1]
        self._pending_bytes += rows * self._row_bytes
        self.counters.add("tickets", issued)

    def give_error(self, req: Any, error: Exception) -> None:
        """Let a request's response say that its routes were lost, and why."""
        logger.error("shmroute: no routes for rid %r", req.rid, exc_info=error)
        self.counters.add("hook_errors")
        envelope = self.refuse(req.rid, f"{type(error).__name__}: {error}")
        req.routed_experts = self._respond(envelope)

    def collect(self, request: Finished) -> bytes:
        """Take one request by itself; returns its response's envelope."""
        if request.tokens == 0:
            self.counters.add("inline")
            self.counters.add("inline_empty")
            return self._empty(request)
        if self._broken:
            return self._inline(request, "inline_after_failure")
        nbytes = request.tokens * self._row_bytes
        if not self.gatherer.has_room(self._pending_bytes + nbytes):
            return self._inline(request, "inline_unlocked")
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
            self._pending.append(Job(request, record, self._epochs.current))
        except BaseException:
            record.fail("the engine could not issue its ticket")
            raise
        self._last = record
        self._pending_bytes += nbytes
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
        """Hand over what ended in this step."""
        if self._noted or self._described:
            self.issue()
        if not self._pending:
            return
        self.counters.add("publish_calls")
        self._handed_over += len(self._pending)
        try:
            self.gatherer.submit(self._pending)
        finally:
            # Only now: while there is something pending, the sealer leaves the interpreter alone.
            self._pending, self._pending_bytes = [], 0

    def let_the_sealer_run(self) -> None:
        """Sleep for a moment if there is something to seal: this thread has nothing to do."""
        if self._settled != self._handed_over:
            time.sleep(_IDLE_SLEEP)

    def wait_for_the_sealer(self) -> None:
        """Sleep until all is sealed, or for a quarter of a second: the engine is paused.

        Besides a record that goes inline this is where the scheduler thread waits for the sealer,
        and with it for the GPU: it has nothing else to do until it is told to go on.
        """
        end = time.monotonic() + _PAUSED_SLEEP_MAX
        while self._settled != self._handed_over and time.monotonic() < end:
            time.sleep(_IDLE_SLEEP)

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
            "shmroute: the rows of rid %r (%d tokens) %s; %d requests since the last such line: %s",
            request.rid,
            request.tokens,
            "travel inside its response" if self._inline_when_full else "are not kept",
            self._unsaid,
            full,
        )
        self._unsaid, self._next_warning = 0, now + _WARNING_SECONDS

    def _inline(self, request: Finished, why: str) -> bytes:
        """Gather now, on the calling thread: the one case in which it waits."""
        rows, tags = self.gatherer.gather_now(request)
        verdict = self._judge(request, tags, self._epochs.current)
        self._compare(request, rows, verdict)
        envelope = self.arena.inline(
            request.rid,
            rows,
            start=request.start,
            prompt_tokens=request.prompt_tokens,
            missing=verdict.missing,
            versions=verdict.versions,
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

    # -- sealer thread -----------------------------------------------------------------------

    def _seal_loop(self) -> None:
        while (gathered := self._to_seal.get()) is not None:
            gathered.wait()
            for job in gathered.jobs:
                self._let_the_scheduler_run()
                try:
                    self._seal(job)
                except Exception as error:
                    self._give_up(job, error)
                self._settled += 1
            gathered.done()
            self._maintain()

    def _maintain(self) -> None:
        try:
            self.arena.writer.maintain()
        except Exception:
            # The next round tries again; until then a full arena serves inline.
            logger.exception("shmroute: reclaiming failed")

    def _let_the_scheduler_run(self) -> None:
        """Leave the interpreter to the scheduler thread: sealing can wait, it cannot.

        Between two records alone that is not enough: this thread would have the lock again before
        the other has woken up (measured: 5 to 24 ms for 160 requests, 2 to 3 with the pause).
        An idle engine's thread has nothing else to do, and gets no pause.
        """
        if not self.gatherer.idle:
            time.sleep(_PAUSE)
        patience = time.monotonic() + _PATIENCE
        while (self._noted or self._described or self._pending) and time.monotonic() < patience:
            time.sleep(10 * _PAUSE)

    def _seal(self, job: Job) -> None:
        if job.error is not None:
            raise job.error
        assert job.tags is not None
        verdict = self._judge(job.request, job.tags, job.epoch)
        self._compare(job.request, job.record.rows, verdict)
        self.late_counters.add("tags_checked", job.request.tokens)
        self.late_counters.add("tags_wrong", verdict.missing_rows)
        job.record.seal(missing=verdict.missing, versions=verdict.versions)

    def _judge(self, request: Finished, tags: npt.NDArray[np.int64], epoch: int) -> Verdict:
        return judge(request, tags, epoch, vocabulary=self._vocabulary, label=self._epochs.label)

    def _compare(self, request: Finished, rows: npt.NDArray[Any], verdict: Verdict) -> None:
        if self._shadow is not None:
            self._shadow.compare(request.rid, request.start, rows, request.native, verdict.missing)

    def _give_up(self, job: Job, error: Exception) -> None:
        logger.error(
            "shmroute: the record of rid %r failed after its ticket had left: %s",
            job.request.rid,
            error,
            exc_info=error,
        )
        self._broken = self._broken or _is_device_error(error)
        self.late_counters.add("failed_after_ticket")
        if job.record.open:
            try:
                job.record.fail(f"{type(error).__name__}: {error}")
            except Exception:
                # The thread must live on: without it no later record would ever be sealed.
                logger.exception("shmroute: rid %r could not even be failed", job.request.rid)


def _is_device_error(error: Exception) -> bool:
    """After one of these no later copy can be trusted to work: requests go inline."""
    return isinstance(error, (DeviceError, torch.AcceleratorError))
