"""Gathering on a CPU engine: a thread and an event in place of streams.

The gatherer thread copies rows and tags out of the table into the extents; the next
forward's scatter waits for it (``fence``), as on a device one stream waits for another.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .finished import Finished, Gathered, Job
from .table import RouteTable


class _InPlace:
    """Gathered by the time it is handed over."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs

    def wait(self) -> None:
        """Nothing is in flight."""

    def done(self) -> None:
        """Nothing is kept."""


class HostGatherer:
    """See ``finished.Gatherer``."""

    def __init__(self, table: RouteTable) -> None:
        self._table = table
        table.fence = self.fence
        self._begun, self._processed = 0, 0
        self._gathered = threading.Event()
        self._gathered.set()
        # None ends the thread, and is passed on.
        self._work: queue.SimpleQueue[tuple[list[Job], threading.Event] | None] = (
            queue.SimpleQueue()
        )
        self._hand_over: Callable[[Gathered | None], None] = lambda _: None
        self._thread = threading.Thread(target=self._loop, name="shmroute-gather", daemon=True)

    def start(self, hand_over: Callable[[Gathered | None], None]) -> None:
        self._hand_over = hand_over
        self._thread.start()

    @property
    def idle(self) -> bool:
        return self._begun == self._processed

    def forward_begins(self, waits: bool = False) -> int:
        self._begun += 1
        return self._begun

    def result_processed(self, forward: int | None) -> None:
        # Nothing to order: forwards run on the scheduler thread.
        if forward is not None:
            self._processed = forward

    def look_at(self, req_to_token: torch.Tensor) -> None:
        """Nothing is needed for a pool in host memory."""

    def snapshot(self, req_to_token: torch.Tensor, slot: int, start: int, end: int) -> torch.Tensor:
        return req_to_token[slot, start:end].clone()

    def has_room(self, nbytes: int) -> bool:
        return True

    def submit(self, jobs: list[Job]) -> None:
        gathered = threading.Event()
        self._gathered = gathered
        self._work.put((jobs, gathered))

    def gather_now(self, request: Finished) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        table = self._table
        rows = np.empty((request.tokens, *table.routes.row_shape), dtype=table.routes.dtype)
        return rows, table.gather(request.locations, table.as_storage(rows)).numpy()

    def fence(self) -> None:
        self._gathered.wait()

    def give_back(self) -> None:
        self.fence()
        self._table.give_back()

    def take_again(self) -> None:
        self._table.take_again()

    def stop(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            jobs, gathered = work
            try:
                for job in jobs:
                    self._gather(job)
            finally:
                gathered.set()
            self._hand_over(_InPlace(jobs))
        self._hand_over(None)

    def _gather(self, job: Job) -> None:
        table = self._table
        try:
            tags = table.gather(job.request.locations, table.as_storage(job.record.rows))
            job.tags = tags.numpy()
        except Exception as error:
            # Told to the sealer: one thread fails records and counts them.
            job.error = error
