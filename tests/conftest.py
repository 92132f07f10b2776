"""Order of the whole suite, what runs beside it, and benchmarks of which nothing stays."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest
from benches import Bench
from beside import Beside, asked_for

# Starting OpenBLAS's threads, which nothing here needs, is a third of what a process with numpy
# takes to start, and the tests start hundreds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


# Trainers' tests load frameworks whose fork handlers end a child that has no descriptor left, which
# is what the store's tests make. Who waits for what runs beside the others does so behind them.
FIRST, LAST = ("store",), ("replay", "bench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What fails in seconds runs before the engines start."""
    folders = [*FIRST, "", *LAST]

    def place(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.parent.name
        return _has_engine(item), folders.index(folder if folder in folders else "")

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Leave the frameworks that were imported for it out of every later collection.

    Each would walk through their millions of objects, and many tests ask for one.
    """
    gc.collect()
    gc.freeze()


def _has_engine(item: pytest.Item) -> bool:
    return item.get_closest_marker("engine") is not None


@pytest.fixture(scope="session", autouse=True)
def beside(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Beside]:
    """What runs beside the tests."""
    starts = asked_for(request.session.items)
    running = Beside(starts, lambda: tmp_path_factory.mktemp("beside"))
    yield running
    running.end()


@pytest.fixture(autouse=True)
def beside_goes_on(beside: Beside) -> None:
    beside.go_on()


@pytest.fixture
def nothing_beside(beside: Beside) -> None:
    """For what looks at all that there is in shared memory."""
    beside.all_done()


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
