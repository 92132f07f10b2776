"""Long processes whose outcome several tests look at; a fixture of their module starts each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

MOST_SECONDS = 600.0
_PAUSE = 0.02


class Process(Protocol):
    """What runs until the tests end."""

    @property
    def said(self) -> str: ...

    def is_done(self) -> bool:
        """Whether it has done its work, or has imported all that it answers with."""
        ...

    def end(self) -> None:
        """Leave nothing of it."""
        ...


Start = Callable[[Path], Process]


class Processes:
    """The processes that were started."""

    def __init__(self, make_folder: Callable[[], Path]) -> None:
        self._make_folder = make_folder
        self._started: list[Process] = []

    def done(self, start: Start, seconds: float = MOST_SECONDS) -> Any:
        """What ``start`` starts, given an empty folder, when it has done its work, for which it
        has so long.
        """
        process = start(self._make_folder())
        self._started.append(process)
        until = time.monotonic() + seconds
        while not process.is_done():
            if time.monotonic() > until:
                pytest.fail(f"not done after {seconds:.0f} s, and said {process.said}")
            time.sleep(_PAUSE)
        return process

    def end(self) -> None:
        for process in self._started:
            process.end()
