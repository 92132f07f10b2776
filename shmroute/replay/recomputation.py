"""Which forward an activation recomputation belongs to.

Problem
    Activation checkpointing runs a module's forward a second time, in the backward pass. With
    several micro-batches in flight (1F1B, interleaved pipelines) that is after forwards of later
    ones, so whatever is current by then is another micro-batch's. A queue for each module is no
    answer: it is right only while backward passes come in the order of the forwards and every
    module is recomputed exactly once, and where that fails the shapes agree all the same.

Protocol
    autograd gives each node of its graph the next number of the thread that makes it. All nodes
    of a forward therefore lie in a span of numbers that no other forward of that thread has::

        forward of micro-batch   0        1        2        (0's backward)   3
        nodes                [0, 40)  [40, 80)  [80, 120)                [120, 160)

    A reentrant checkpoint recomputes inside the backward of its own node, which is one of its
    forward's: the number of the node that autograd is running names the forward, in whatever
    order backward passes come.

Where that could go wrong, and what is done
    - Forwards in several threads have numbers of several counts: ``begin`` refuses.
    - A checkpoint within a checkpoint is a node of the recomputation, in an autograd thread, with
      numbers of that thread. The outer recomputation runs it with gradients off: that is refused.
    - A checkpoint that is not reentrant recomputes inside whichever node needs its tensors first,
      with a number of the same span: right all the same.
    - A backward after ``forget``: the spans are remembered until the second ``forget`` after
      them, and a recomputation that falls into one is refused.
"""

from __future__ import annotations

import bisect
import dataclasses
import operator
import threading
from typing import Generic, TypeVar

import torch

from ..errors import ReplayError

T = TypeVar("T")

_NO_BACKWARD = -1  # of torch._C._current_graph_task_id


@dataclasses.dataclass(slots=True, eq=False)
class _Forward(Generic[T]):
    payload: T
    first: int
    end: int | None = None  # None: it is running

    def has(self, number: int) -> bool:
        return self.first <= number and (self.end is None or number < self.end)


class Forwards(Generic[T]):
    """The forwards of a schedule and what each was begun with.

    One forward runs at a time, and all in one thread; backward passes and recomputations may run
    in others, as they do on a GPU.
    """

    def __init__(self) -> None:
        self._forwards: list[_Forward[T]] = []
        self._forgotten: list[_Forward[None]] = []
        self._thread: int | None = None

    def begin(self, payload: T) -> None:
        """A forward begins in this thread.

        Raises
        ------
        ReplayError
            One is running, or those before it ran in another thread.
        """
        if self._running() is not None:
            raise ReplayError("a forward begins while another one is running: end that first")
        if self._forwards and self._thread != threading.get_ident():
            raise ReplayError(
                f"a forward in thread {threading.get_ident()} after {len(self._forwards)} in "
                f"thread {self._thread}: autograd counts each thread's nodes by itself, so run a "
                "schedule's forwards in one thread"
            )
        self._thread = threading.get_ident()
        self._forwards.append(_Forward(payload, _next_number()))

    def end(self) -> None:
        """The running forward is done."""
        self._forwards[-1].end = _next_number()

    def payloads(self) -> list[T]:
        """What each forward was begun with, in their order."""
        return [forward.payload for forward in self._forwards]

    def forget(self) -> None:
        """The schedule is over; recomputations of its forwards are errors."""
        self._forgotten = [_Forward(None, each.first, each.end) for each in self._forwards]
        self._forwards = []

    def running(self) -> T | None:
        """What the running forward was begun with; None where none is."""
        forward = self._running()
        return None if forward is None else forward.payload

    def recomputed(self) -> T | None:
        """What the forward was begun with that autograd recomputes now.

        None where it is no forward of these.

        Raises
        ------
        ReplayError
            The forward is forgotten, or its checkpoint has another one inside.
        """
        node = torch._C._current_autograd_node()
        number = _NO_BACKWARD if node is None else node._sequence_nr()
        if _find(self._forgotten, number) is not None:
            raise ReplayError(
                "activations are recomputed after the end of the schedule that their forward was "
                "in, and its routes are gone: run the backward pass inside it, too"
            )
        forward = _find(self._forwards, number)
        if forward is None:
            return None
        if not torch.is_grad_enabled():
            raise ReplayError(
                "activation checkpoints within another one are recomputed: their routes cannot be "
                "told apart. Checkpoint layers or their MoE part, not both"
            )
        return forward.payload

    def _running(self) -> _Forward[T] | None:
        last = self._forwards[-1] if self._forwards else None
        return last if last is not None and last.end is None else None


def recomputing() -> bool:
    """Whether this is called out of a backward pass."""
    return torch._C._current_graph_task_id() != _NO_BACKWARD


def _next_number() -> int:
    return torch._C._autograd._get_sequence_nr()


def _find(forwards: list[_Forward[T]], number: int) -> _Forward[T] | None:
    at = bisect.bisect_right(forwards, number, key=operator.attrgetter("first")) - 1
    return forwards[at] if at >= 0 and forwards[at].has(number) else None
