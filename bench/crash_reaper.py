"""A reaper's life in the crash campaign: reap the era's arenas, again and again, until killed."""

from __future__ import annotations

import time

from crash_life import Life

from shmroute import reap

_TRIES = 20


def clean(life: Life, *, force: bool, tries: int = _TRIES) -> None:
    """Reap up to ``tries`` times: whether readers have the dead arena open changes meanwhile."""
    _chance, log = life.begin()
    for _ in range(tries if life.point is not None else 1):
        reap(life.arena, force=force)
        time.sleep(1e-3)
    log.write("ended")
