"""Processes that answer through a pipe each, started fresh, so that they share nothing else."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from typing import Any

CONTEXT: SpawnContext = multiprocessing.get_context("spawn")


class PipedProcesses:
    """``count`` processes that run ``target(parent, *arguments)``; give them a ``close``.

    Parameters
    ----------
    target
        A function of a module; it ends when its pipe does. SIGINT is the parent's business.
    seconds
        How long an answer may take.
    """

    def __init__(
        self, count: int, target: Callable[..., None], *arguments: Any, seconds: float
    ) -> None:
        self._seconds = seconds
        self._children: list[tuple[Any, Connection]] = []
        for _ in range(count):
            ours, theirs = CONTEXT.Pipe()
            child = CONTEXT.Process(target=_run, args=(target, theirs, *arguments), daemon=True)
            self._children.append((child, ours))
            child.start()
            theirs.close()

    def send(self, message: Any, count: int | None = None) -> None:
        """Tell the first ``count`` of them, or all."""
        for _, ours in self._children[:count]:
            ours.send(message)

    def answers(self, count: int | None = None) -> list[Any]:
        """One of each of the first ``count``, or of all.

        Raises
        ------
        RuntimeError
            One of them did not answer in time.
        """
        return [self._answer(child, ours) for child, ours in self._children[:count]]

    def _answer(self, child: Any, ours: Connection) -> Any:
        if not ours.poll(self._seconds):
            raise RuntimeError(f"process {child.pid} did not answer in {self._seconds:.0f} s")
        return ours.recv()

    def close(self) -> None:
        """End the processes."""
        for child, _ in self._children:
            child.terminate()
        for child, ours in self._children:
            child.join()
            ours.close()


def _run(target: Callable[..., None], parent: Connection, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this one, or is gone itself
    target(parent, *arguments)
