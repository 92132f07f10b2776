"""What the processes of a store test share: geometry, row patterns, and a line of talk.

A test starts an actor with the ``actor`` fixture; actor and test exchange JSON lines over
the actor's standard streams. Only numpy and shmroute are imported here, since actors also
run under other Python versions.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from typing import Any

import numpy as np

from shmroute import Arena, RouteLayout, ShmRouteReader
from shmroute.ticket import decode

LAYOUT = RouteLayout(256, 8, range(4), model="tests/store")
WIDE = RouteLayout(512, 8, range(1, 5), model="tests/store, 512 experts")


def pattern(rid: str, generation: int, tokens: int, layout: RouteLayout = LAYOUT) -> Any:
    """Rows that no other (rid, generation) has, over all ids of the layout."""
    seed = zlib.crc32(f"{rid}/{generation}".encode())
    steps = np.arange(tokens * layout.row_bytes // layout.dtype.itemsize, dtype=np.uint64)
    ids = ((steps + np.uint64(seed)) * np.uint64(2654435761) >> np.uint64(9)) % np.uint64(
        layout.num_experts
    )
    return ids.astype(layout.dtype).reshape(tokens, *layout.row_shape)


def add(arena: Arena, rid: str, tokens: int = 20, **sealing: Any) -> Any:
    """Seal a record of ``pattern`` rows and return its reservation."""
    record = arena.reserve(rid, tokens=tokens)
    record.rows[...] = pattern(rid, record.generation, tokens, arena.memory.description.routes)
    record.seal(**sealing)
    return record


def is_intact(routes: ShmRouteReader) -> bool:
    """Whether the rows are those of exactly this record."""
    generation = decode(routes.ticket).generation
    expected = pattern(routes.rid, generation, routes.tokens, routes.layout)
    return bool(np.array_equal(routes.numpy(), expected))


def described(array: Any, arena: str) -> dict[str, Any]:
    """What an array is to this process, and whether it lies in the arena of that name."""
    at = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        bounds = [line.split()[0].split("-") for line in maps if f"-{arena}-" in line]
    return {
        "rows": array.tolist(),
        "dtype": array.dtype.str,
        "kind": type(array).__name__,
        "mapped": any(int(low, 16) <= at < int(high, 16) for low, high in bounds),
        "process": os.getpid(),
    }


def say(**facts: Any) -> None:
    """Tell the test."""
    print(json.dumps(facts), flush=True)


def hear() -> Any:
    """Wait for the test to say something; the test's end is the actor's end."""
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    return json.loads(line)


def die() -> None:
    """End as an engine does."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop(when: str, owner: Any, function: str) -> None:
    """Let this process be stopped (SIGSTOP) right before or after its next call of a step."""
    original = getattr(owner, function)

    def step(*arguments: Any, **options: Any) -> Any:
        setattr(owner, function, original)
        if when == "before":
            os.kill(os.getpid(), signal.SIGSTOP)
        result = original(*arguments, **options)
        if when == "after":
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    setattr(owner, function, step)


def die_after(module: Any, function: str, calls: int = 1) -> None:
    """Let this process be killed right after the ``calls``-th call of a step."""
    original, made = getattr(module, function), 0

    def step(*arguments: Any, **options: Any) -> Any:
        nonlocal made
        result = original(*arguments, **options)
        made += 1
        if made == calls:
            die()
        return result

    setattr(module, function, step)
