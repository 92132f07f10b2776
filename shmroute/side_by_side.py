"""Copies on the CPU, shared between the calling thread and one more.

Problem
    A rank of a trainer has one thread of torch (torchrun sets ``OMP_NUM_THREADS=1``). Packing a
    batch keeps it busy with opening records, which is Python, and with copying their rows, which
    is waiting for memory, of which one core cannot ask for as much as there is.

Approach
    The calling thread opens records and queues their copies. A second thread, which lives as long
    as the call, takes from the queue, and the calling thread does, too, when it has opened all.
    So nothing is left of it after the call, neither for a fork nor for the process's end.

Not where torch has threads of its own, where the process may use one core only or start no thread,
or for a batch that is copied before a thread has begun.

Traps, and where they are closed
    - An exception at any moment, also of a signal's handler: until the second thread has said
      that it ends, ``end`` waits. It asks a list and a ``SimpleQueue``, which an exception leaves
      whole; ``threading.Thread`` is neither started nor joined in one piece. What a handler
      raises in the very call of ``end`` leaves no owner: the second thread begins no more tasks.
    - A fork in between, by a handler: the child has no second thread, and what that was at is not
      done there. The child's read raises.
    - torch's inference mode is a thread's own: the second takes the first one's.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import queue
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch

_WORTH_BYTES = 4 << 20
_LOOK_SECONDS = 0.5

Task: TypeAlias = Callable[[], None]
Tasks: TypeAlias = "queue.SimpleQueue[Task | None]"


@contextmanager
def sharing(nbytes: int) -> Iterator[Callable[[Task], None]]:
    """Gives a function that takes tasks, in any order and on either thread, by the end of the
    context; ``nbytes`` is what all of them write.

    An error in a task is raised at the end, one of the body's at once; by then no task is running
    and none will.

    Raises
    ------
    RuntimeError
        In a child that was forked in between: not everything was done there.
    """
    if not _is_worth_it(nbytes):
        yield _run
        return
    helper = _Helper()
    try:
        if not helper.start():
            yield _run
            return
        yield helper.tasks.put
        for task in _left(helper.tasks):
            task()
    finally:
        error = helper.end()
    if error is not None:
        raise error


class _Helper:
    """The second thread, from the calling one's side."""

    def __init__(self) -> None:
        self.tasks: Tasks = queue.SimpleQueue()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._said: list[BaseException | None] = []
        self._process = os.getpid()
        self._started = False

    def start(self) -> bool:
        """Whether there is a second thread now."""
        inference = torch.is_inference_mode_enabled()
        try:
            given = self.tasks, self._said, self._wake, weakref.ref(self), inference
            _thread.start_new_thread(_help, given)
        except RuntimeError:  # the limit of processes
            return False
        self._started = True
        return True

    def end(self) -> BaseException | None:
        """Give up what is queued and wait for what is running; the error of a task, if there was
        one. What interrupts this is raised when it is done.
        """
        interruption: BaseException | None = None
        error: BaseException | None
        while True:
            try:
                for _ in _left(self.tasks):
                    pass
                self.tasks.put(None)  # also where an exception hid that the thread has started
                if not self._started:
                    error = None
                elif os.getpid() != self._process:
                    error = RuntimeError(
                        "this process was forked while the batch was read, by a thread that the "
                        "child does not have: read the batch again"
                    )
                else:
                    error = self._wait()
                break
            except BaseException as another:
                interruption = another
        self._said.clear()  # an error's traceback leads back here
        if interruption is not None:
            raise interruption
        return error

    def _wait(self) -> BaseException | None:
        while not self._said:
            # With a limit: an exception can come between a word's arrival and its being seen.
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=0.01)
        return self._said[0]  # not taken: what interrupts this now has it asked for again


def _is_worth_it(nbytes: int) -> bool:
    return (
        nbytes >= _WORTH_BYTES and torch.get_num_threads() == 1 and len(os.sched_getaffinity(0)) > 1
    )


def _run(task: Task) -> None:
    task()


def _left(tasks: Tasks) -> Iterator[Task]:
    """What is in the queue, until it is empty."""
    while True:
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            return
        if task is not None:
            yield task


def _help(
    tasks: Tasks,
    said: list[BaseException | None],
    wake: queue.SimpleQueue[None],
    owner: weakref.ref[_Helper],
    inference: bool,
) -> None:
    """Run tasks until there is a None, none after an error or once the owner is gone; then say
    so, and the error.
    """
    error: BaseException | None = None
    with torch.inference_mode(inference):
        while owner() is not None:
            try:
                task = tasks.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if task is None:
                break
            try:
                if error is None and owner() is not None:
                    task()
            except BaseException as raised:
                error = raised
            del task  # which holds rows, and with them a lease
    said.append(error)
    del said, error  # which has this frame in its traceback
    wake.put(None)
