"""Long processes that run beside the tests, so that a second core has work.

A module whose tests need what such a process does names it in ``BESIDE``: by the fixture that
waits for it, the function that starts it, given an empty folder. Where a fixture of that name is
asked for, the process starts as soon as those before it have done their work, one at a time, and
at the latest when it is waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import pytest

MOST_SECONDS = 600.0
_PAUSE = 0.02


class Process(Protocol):
    """What runs beside the tests."""

    @property
    def said(self) -> str: ...

    def is_done(self) -> bool:
        """Whether it has done its work, or has imported all that it answers with."""
        ...

    def end(self) -> None:
        """Leave nothing of it."""
        ...


Start = Callable[[Path], Process]


def asked_for(items: Iterable[pytest.Item]) -> list[Start]:
    """What these tests wait for, in their order."""
    starts: dict[Start, None] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            named = getattr(item.module, "BESIDE", {})
            starts.update(dict.fromkeys(named[n] for n in item.fixturenames if n in named))
    return list(starts)


class Beside:
    """The processes that were started, and those that wait for their turn."""

    def __init__(self, starts: Iterable[Start], make_folder: Callable[[], Path]) -> None:
        self._waiting = deque(starts)
        self._make_folder = make_folder
        self._started: dict[Start, Any] = {}
        self._running: Process | None = None
        self._began = 0.0

    def go_on(self) -> bool:
        """Start the next one if it is its turn; whether any has work left."""
        if self._running is not None and self._running.is_done():
            self._running = None
        if self._running is None and self._waiting:
            start = self._waiting.popleft()
            self._running = self._started[start] = start(self._make_folder())
            self._began = time.monotonic()
        return self._running is not None

    def done(self, start: Start, seconds: float = MOST_SECONDS) -> Any:
        """What ``start`` has started, when it has done its work, for which it has so long."""
        while start not in self._started:
            assert self.go_on(), f"{start.__qualname__} is in no BESIDE by a fixture that is used"
            self._wait(MOST_SECONDS)
        while not self._started[start].is_done():
            self._wait(seconds)
        return self._started[start]

    def all_done(self) -> None:
        """Wait until nothing runs."""
        while self.go_on():
            self._wait(MOST_SECONDS)

    def _wait(self, seconds: float) -> None:
        running = self._running
        if running is not None and time.monotonic() > self._began + seconds:
            pytest.fail(f"not done after {seconds:.0f} s, and said {running.said}")
        time.sleep(_PAUSE)

    def end(self) -> None:
        for process in self._started.values():
            process.end()
