"""Order of the whole suite and its two halves, and benchmarks of which nothing stays.

Run by two processes (``make test``: pytest-xdist), one has the engines that are started one after
the other, the other all else, and whichever is done first takes files of the other's. A file's
tests stay together, as what they share takes long to make.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from benches import Bench
from processes import Processes

# Starting OpenBLAS's threads, which nothing here needs, is a third of what a process with numpy
# takes to start, and the tests start hundreds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


# Trainers' tests load frameworks whose fork handlers end a child that has no descriptor left, which
# is what the store's tests make.
FIRST, LAST = ("store",), ("replay", "bench")
# They have an arena of one name, and the last one looks back at all that the others left.
ENGINES_IN_A_ROW = tuple(
    f"tests/engine/test_{name}.py"
    for name in ("models", "parallel", "scheduling", "requests", "integrity", "starts_and_ends")
)
# Beside the row: benchmarks look for what any of them leaves in shared memory, the demo for what
# any engine does, and one of the faults is an engine that is killed and left so for a while.
TOGETHER = (
    ENGINES_IN_A_ROW,
    ("tests/bench/",),
    ("tests/engine/test_demo.py", "tests/engine/test_faults.py"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What fails in seconds runs before the engines start, or beside them."""
    folders = [*FIRST, "", *LAST]
    one_of_several = hasattr(config, "workerinput")

    def place(item: pytest.Item) -> tuple[int, int]:
        if one_of_several and item.nodeid.startswith(ENGINES_IN_A_ROW):
            return 0, 0
        folder = item.path.parent.name
        return 1 + _has_engine(item), folders.index(folder if folder in folders else "")

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole files, and some as if they were one: see ``TOGETHER``."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            for together in TOGETHER:
                if nodeid.startswith(together):
                    return str(together)
            return super()._split_scope(nodeid)

    return Files(config, log)


def pytest_collection_finish() -> None:
    """Leave the frameworks that were imported for it out of every later collection.

    Each would walk through their millions of objects, and many tests ask for one.
    """
    gc.collect()
    gc.freeze()


def _has_engine(item: pytest.Item) -> bool:
    return item.get_closest_marker("engine") is not None


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Starts what several tests look at; it ends with the tests."""
    started = Processes(lambda: tmp_path_factory.mktemp("process"))
    yield started
    started.end()


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
