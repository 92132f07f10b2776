"""What the tests on a GPU share: a device, arenas with names of their own, a clean /dev/shm."""

from __future__ import annotations

import gc
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import shmroute
from shmroute.segments import SHM_DIR


@pytest.fixture(scope="session", autouse=True)
def cuda() -> Any:
    """torch, where it has a CUDA device."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.cuda.init()
    return torch


@pytest.fixture
def arena_name(eventually: Callable[..., bool]) -> Iterator[str]:
    """A name nobody else uses; the test must leave none of its files behind."""
    name = f"gpu-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    gc.collect()

    def left() -> list[str]:
        shmroute.reap(name, force=True)  # leaves what somebody has leased
        return [entry for entry in os.listdir(SHM_DIR) if f"-{name}-" in entry]

    # Copies may still be in flight, and with them leases.
    assert eventually(lambda: not left()), f"left in {SHM_DIR}: {left()}"


@pytest.fixture
def make_arena(arena_name: str) -> Iterator[Callable[..., shmroute.Arena]]:
    """Make arenas of the test's name in this process; closed after the test."""
    made: list[shmroute.Arena] = []

    def make(routes: shmroute.RouteLayout, **options: Any) -> shmroute.Arena:
        options = {"capacity": "64MiB", "slots": 64, **options}
        made.append(shmroute.Arena.create(arena_name, routes, **options))
        return made[-1]

    yield make
    for arena in made:
        arena.close()


@pytest.fixture
def add() -> Callable[..., Any]:
    """Seal a record of random ids, the largest among them: ``add(arena, rid, tokens)``."""

    def seal(arena: shmroute.Arena, rid: str, tokens: int) -> Any:
        routes = arena.memory.description.routes
        record = arena.reserve(rid, tokens=tokens)
        random = np.random.default_rng(len(rid) * 1009 + tokens)
        record.rows[...] = random.integers(0, routes.num_experts, record.rows.shape)
        record.rows[-1, -1, -1] = routes.num_experts - 1
        record.seal()
        return record

    return seal


@pytest.fixture
def eventually() -> Callable[..., bool]:
    """Wait until something becomes true: what another thread does when the GPU is done."""

    def wait(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    return wait
