"""Arenas that a rollout's records lie in."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import pytest
import torch
from rollouts import LAYOUT, WIDE

import shmroute
from shmroute import Arena, RouteLayout

MakeArena = Callable[..., Arena]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun has it; on a busy machine two wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[LAYOUT, WIDE], ids=["128 experts", "512 experts"])
def layout(request: pytest.FixtureRequest) -> RouteLayout:
    """Of ids of one byte, and of two."""
    made: RouteLayout = request.param
    return made


@pytest.fixture
def make_arena() -> Iterator[MakeArena]:
    """Make arenas of one name, of which nothing stays."""
    name = f"replay-{secrets.token_hex(4)}"
    made: list[Arena] = []

    def make(layout: RouteLayout = LAYOUT) -> Arena:
        made.append(Arena.create(name, layout, capacity="2MiB", slots=32))
        return made[-1]

    yield make
    for arena in made:
        arena.close()
    shmroute.reap(name, force=True)


@pytest.fixture
def arena(make_arena: MakeArena) -> Arena:
    return make_arena()
