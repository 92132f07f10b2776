"""Order of the whole suite, and benchmarks as processes of their own, of which nothing stays."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHM = Path("/dev/shm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What fails in seconds runs before the engines start, and the store's own before trainers'.

    These load frameworks whose fork handlers end a child that has no descriptor left, which is
    what the store's tests make.
    """
    items.sort(key=lambda item: (_has_engine(item), item.path.parent.name == "replay"))


def pytest_collection_finish() -> None:
    """Leave the frameworks that were imported for it out of every later collection.

    Each would walk through their millions of objects, and many tests ask for one.
    """
    gc.collect()
    gc.freeze()


def _has_engine(item: pytest.Item) -> bool:
    return item.get_closest_marker("engine") is not None


class Bench(subprocess.Popen[str]):
    """A script of ``bench`` with these arguments; it calls its arenas ``arena`` and its pid."""

    def __init__(self, script: str, arena: str, *arguments: str) -> None:
        super().__init__(
            [sys.executable, str(ROOT / "bench" / script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )
        self._arena = f"{arena}{self.pid}"

    def files(self) -> list[Path]:
        """What its arenas have in shared memory."""
        return list(SHM.glob(f"shmroute-*-{self._arena}-*"))

    def children(self) -> list[int]:
        """Process ids of what it started itself."""
        said = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(child) for child in said.split()]

    def end(self) -> None:
        """Leave nothing of it."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)  # its children end with it
            self.wait()
        assert self.stdout is not None
        self.stdout.close()
        for path in self.files():
            path.unlink()


@pytest.fixture(scope="module")
def start_bench() -> Iterator[Callable[..., Bench]]:
    """Start a ``Bench``."""
    started: list[Bench] = []

    def start(*what: str) -> Bench:
        started.append(Bench(*what))
        return started[-1]

    yield start
    for process in started:
        process.end()
