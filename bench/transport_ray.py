"""The way through Ray's object store, which has servers of its own.

Its readers are actors: that is how an ``ObjectRef`` is passed on. What ``ray.get`` gives is mapped,
not copied. See `transport_ways` for what a way is.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
from memory_watch import trim
from transport_readers import Reading, read_through
from transport_ways import Array, Record, Way

HEARD_SECONDS = 0.6
START_SECONDS = 60.0
PLASMA = re.compile(r"Plasma memory usage (\d+) MiB")


class RayWay(Way[Any]):
    """``ray.put``; a locator is the reference."""

    name = "Ray object store"
    copied: ClassVar = {"into the store": 1}

    def __init__(self, largest_bytes: int, readers: int) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        here = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = f"{here}:{os.environ.get('PYTHONPATH', '')}"
        import ray

        self._ray = ray
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        ray.init(
            "local",  # never a cluster that somebody else has started
            num_cpus=1,
            object_store_memory=max(128 << 20, 6 * largest_bytes),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=self._folder.name,
        )
        self.readers = RayReaders(ray, readers)
        self._references: list[Any] = []

    def publish(self, record: Record, readers: int) -> Sequence[Any]:
        reference = self._ray.put(record.rows)
        self._references.append(reference)
        return [reference] * readers

    def retire(self) -> None:
        self._references.clear()

    def shared_bytes(self) -> int:
        """What the object store says, in whole MiB, once it has heard of what was let go."""
        from ray._private.internal_api import memory_summary

        time.sleep(HEARD_SECONDS)
        found = PLASMA.search(memory_summary(stats_only=True))
        if found is None:
            raise RuntimeError("Ray does not say how much its object store holds")
        return int(found[1]) << 20

    def pids(self) -> list[int]:
        return [
            child.pid
            for child in psutil.Process().children(recursive=True)
            if "ray" in " ".join(child.cmdline())
        ]

    def close(self) -> None:
        self._references.clear()
        self._ray.shutdown()
        self._folder.cleanup()


class RayReaders:
    """Readers that are actors; see `transport_readers.Readers`."""

    def __init__(self, ray: Any, count: int) -> None:
        self._ray = ray
        actor = ray.remote(num_cpus=0)(_Actor)
        self._actors = [actor.remote() for _ in range(count)]
        self._all_pids = ray.get(
            [each.pid.remote() for each in self._actors], timeout=START_SECONDS
        )

    def pids(self, count: int) -> list[int]:
        """Of the first ``count``; they are among the way's own."""
        return []

    def read(self, way: str, locators: Sequence[Any]) -> list[Reading]:
        actors = self._actors[: len(locators)]
        pending = [
            actor.read.remote(locator) for actor, locator in zip(actors, locators, strict=True)
        ]
        readings: list[Reading] = self._ray.get(pending)
        return readings

    def drop(self, count: int) -> None:
        self._ray.get([actor.drop.remote() for actor in self._actors[:count]])

    def trim(self, count: int) -> None:
        self._ray.get([actor.trim.remote() for actor in self._actors[:count]])

    def kill_first(self) -> None:
        """SIGKILL the first one and forget it."""
        os.kill(self._all_pids.pop(0), signal.SIGKILL)
        del self._actors[0]


class _Actor:
    def __init__(self) -> None:
        self._rows: Array | None = None

    def pid(self) -> int:
        return os.getpid()

    def read(self, rows: Array) -> Reading:
        at = time.perf_counter()
        self._rows = rows
        return read_through(rows, at)

    def drop(self) -> None:
        self._rows = None

    def trim(self) -> None:
        trim()
