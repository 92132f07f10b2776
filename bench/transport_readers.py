"""The producer's end of its reader processes, `transport_reader`.

They are no children of the producer by ``multiprocessing``, as trainers are no children of their
engine: what such a process shares with its children alone, it has not here.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

SCRIPT = Path(__file__).with_name("transport_reader.py")
SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader did: CLOCK_MONOTONIC seconds, and what it has read.

    Attributes
    ----------
    at, through
        When it had the ndarray, and when it had read all of it.
    mark
        All bytes of it, eight by eight, by exclusive or.
    """

    at: float
    through: float
    mark: int


def read_through(rows: Any, at: float) -> Reading:
    """Read all of an array that was there at ``at``."""
    mark = mark_of(rows)
    return Reading(at, time.perf_counter(), mark)


def mark_of(rows: Any) -> int:
    return int(np.bitwise_xor.reduce(rows.reshape(-1).view(np.uint64)))


class Readers:
    """So many reader processes, which take part from the first on."""

    def __init__(self, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-transports-")
        key = multiprocessing.current_process().authkey  # torch's descriptors ask for it, too
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        address = str(Path(self._folder.name, "readers"))
        with Listener(address, "AF_UNIX", authkey=key) as listener:
            for _ in range(count):
                self._start(address, key)
                self._connections.append(listener.accept())

    def _start(self, address: str, key: bytes) -> None:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), address],
            stdin=subprocess.PIPE,
            start_new_session=True,
            # Python 3.11 takes a block that was attached for one that leaked, and says so.
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        self._processes.append(process)
        assert process.stdin is not None
        process.stdin.write(key)
        process.stdin.close()

    def pids(self, count: int) -> list[int]:
        """Of the first ``count``."""
        return [process.pid for process in self._processes[:count]]

    def read(self, way: str, locators: Sequence[Any]) -> list[Reading]:
        """Have as many readers as there are locators read at the same time."""
        connections = self._connections[: len(locators)]
        for connection, locator in zip(connections, locators, strict=True):
            connection.send(("read", way, locator))
        return [_answer(connection) for connection in connections]

    def drop(self, count: int) -> None:
        """Have the first ``count`` let go of what they hold."""
        self._ask("drop", count)

    def trim(self, count: int) -> None:
        """Have them give back to the system what they have freed."""
        self._ask("trim", count)

    def _ask(self, what: str, count: int) -> None:
        for connection in self._connections[:count]:
            connection.send((what, "", None))
        for connection in self._connections[:count]:
            _answer(connection)

    def kill_first(self) -> None:
        """SIGKILL the first one and forget it."""
        process, connection = self._processes.pop(0), self._connections.pop(0)
        process.kill()
        process.wait()
        connection.close()

    def close(self) -> None:
        """End all of them."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=False):
            process.wait()
            connection.close()
        self._folder.cleanup()


def _answer(connection: Connection) -> Any:
    if not connection.poll(SECONDS):
        raise RuntimeError(f"a reader did not answer in {SECONDS:.0f} s")
    answer = connection.recv()
    if isinstance(answer, BaseException):
        raise answer
    return answer
