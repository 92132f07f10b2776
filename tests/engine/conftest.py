"""Real engines, one at a time, all with an arena of the same name.

Each engine serves a small checkpoint with saved random weights, in shadow mode, and is
ended by SIGTERM or by SIGKILL of its whole process tree; ``Engines`` keeps a list of what
each end left in ``/dev/shm``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from engines import Engines
from small_models import deepseek_v3, mixtral, qwen3_moe

import shmroute

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "qwen3-32": qwen3_moe,
    "qwen3-32-trained": partial(qwen3_moe, seed=1),
    "qwen3-256": partial(qwen3_moe, num_experts=256, top_k=8),
    "qwen3-512": partial(qwen3_moe, num_experts=512, top_k=8),
    "deepseek-v3": deepseek_v3,
    "mixtral": mixtral,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What holds of all of a configuration's requests is asked when they have been served."""
    first: dict[type, int] = {}

    def place(indexed: tuple[int, pytest.Item]) -> tuple[int, bool]:
        index, item = indexed
        cls = getattr(item, "cls", None)
        if cls is None:
            return index, False
        inherited = getattr(item, "originalname", "") not in vars(cls)
        return first.setdefault(cls, index), inherited

    items[:] = [item for _, item in sorted(enumerate(items), key=place)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the checkpoint of that name, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = CHECKPOINTS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return of


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Starts engines with an arena of a name that only this session uses."""
    arena = f"tests-{secrets.token_hex(4)}"
    yield Engines(arena, tmp_path_factory.mktemp("logs"))
    shmroute.reap(arena, force=True)
