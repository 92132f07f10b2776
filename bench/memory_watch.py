"""The most memory of their own that processes take together while something runs.

    python bench/memory_watch.py PID [PID ...]

Runs as a process of its own: in the one that works, a watching thread would wait for the
interpreter just when most is taken. ``RssAnon`` of every process is read and added up a thousand
times a second; shared memory is not in it, and a process that has ended counts nothing. One line
with the sum at the beginning goes out at once, one with the most when stdin ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import subprocess
import sys
from collections.abc import Iterable

from crash_processes import end_with

PAUSE = 0.001  # seconds
_LIBC = ctypes.CDLL(None)


class MemoryWatch:
    """Watches processes while its ``with`` block runs; ``most`` is there afterwards."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        #: Bytes at the most, beyond those at the beginning.
        self.most = 0

    def __enter__(self) -> MemoryWatch:
        self._child = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid()), *map(str, self._pids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._before = self._line()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self.most = self._line() - self._before
        self._child.stdout.close()
        self._child.wait()

    def _line(self) -> int:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the memory watch ended with exit code {self._child.wait()}")
        return int(line)


def trim() -> None:
    """Give back to the system what this process has freed, so that taking it again is seen."""
    gc.collect()
    _LIBC.malloc_trim(0)


def own_bytes(pid: int) -> int:
    """``RssAnon`` of a process, 0 when it has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parent, *pids = map(int, sys.argv[1:])
    end_with(parent)
    most = sum(map(own_bytes, pids))
    print(most, flush=True)
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        most = max(most, sum(map(own_bytes, pids)))
    print(most, flush=True)


if __name__ == "__main__":
    main()
