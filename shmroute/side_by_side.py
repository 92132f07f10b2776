"""Copies on the CPU, shared between the calling thread and one more.

Problem
    A rank of a trainer has one thread of torch (torchrun sets ``OMP_NUM_THREADS=1``). Packing a
    batch keeps it busy with opening records, which is Python, and with copying their rows, which
    is waiting for memory, of which one core cannot ask for as much as there is.

Approach
    The calling thread opens records and queues their copies. A second thread, which lives as long
    as the call, takes from the queue, and the calling thread does, too, when it has opened all.
    So nothing is left of it after the call, neither for a fork nor for the process's end.

Not where torch has threads of its own, where the process may use one core only, or for a batch
that is copied before a thread has begun.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch

_WORTH_BYTES = 4 << 20

Task: TypeAlias = Callable[[], None]


@contextmanager
def sharing(nbytes: int) -> Iterator[Callable[[Task], None]]:
    """Gives a function that takes tasks, in any order and on either thread, by the end of the
    context; ``nbytes`` is what all of them write.

    An error in a task is raised at the end, one of the body's at once; by then no task is running
    and none will.
    """
    if not _is_worth_it(nbytes):
        yield _run
        return
    tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    errors: list[BaseException] = []
    helper = threading.Thread(target=_help, args=(tasks, errors), name="shmroute-pack", daemon=True)
    helper.start()
    try:
        yield tasks.put
        for task in _left(tasks):
            task()
    finally:
        for _ in _left(tasks):
            pass  # given up
        tasks.put(None)
        helper.join()
    if errors:
        raise errors[0]


def _is_worth_it(nbytes: int) -> bool:
    return (
        nbytes >= _WORTH_BYTES and torch.get_num_threads() == 1 and len(os.sched_getaffinity(0)) > 1
    )


def _run(task: Task) -> None:
    task()


def _left(tasks: queue.SimpleQueue[Task | None]) -> Iterator[Task]:
    """What is in the queue, until it is empty."""
    while True:
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            return
        if task is not None:
            yield task


def _help(tasks: queue.SimpleQueue[Task | None], errors: list[BaseException]) -> None:
    while (task := tasks.get()) is not None:
        try:
            if not errors:
                task()
        except BaseException as error:
            errors.append(error)  # for the calling thread
        del task  # which holds rows, and with them a lease
