"""What the soak test watches from outside: processes, shared memory and locks over time.

``drift`` is the Theil-Sen slope of the second half of the run (the median of the slopes between
any two samples, which no outlier moves), times that half's length: by how much the series rose or
fell meanwhile, whatever it did up and down.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shmroute import segments


class Samples:
    """Series by name, each a value a look."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self.times: list[float] = []
        self.series: dict[str, list[float]] = defaultdict(list)

    def take(self, arena: str, processes: dict[str, int], noted: dict[str, float]) -> None:
        """Look at these processes, by what they are called, and at the arena's files; of the
        series that are ``noted`` the caller knows the value."""
        self.times.append(time.monotonic() - self._begun)
        for role, pid in processes.items():
            for what, value in _of_process(pid):
                self.series[f"{role}: {what}"].append(value)
        for what, value in (*_of_arena(arena), *noted.items()):
            self.series[what].append(value)

    def drift(self, name: str) -> float:
        """By how much the series rose (or fell, negative) over the second half of the run."""
        half = len(self.times) // 2
        times, values = np.array(self.times[half:]), np.array(self.series[name][half:])
        return theil_sen(times, values) * float(times[-1] - times[0])

    def median(self, name: str) -> float:
        """Of the second half."""
        return float(np.median(self.series[name][len(self.times) // 2 :]))


def theil_sen(times: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> float:
    """Median slope between any two of the points."""
    first, second = np.triu_indices(len(times), k=1)
    slopes = (values[second] - values[first]) / (times[second] - times[first])
    return float(np.median(slopes))


def _of_process(pid: int) -> Iterator[tuple[str, float]]:
    yield "descriptors", len(os.listdir(f"/proc/{pid}/fd"))
    yield "threads", len(os.listdir(f"/proc/{pid}/task"))
    mapped = _mebibytes(Path(f"/proc/{pid}/smaps_rollup"))
    yield "RSS", mapped["Rss"]
    yield "PSS", mapped["Pss"]
    yield "memory of its own", _mebibytes(Path(f"/proc/{pid}/status"))["RssAnon"]


def _mebibytes(path: Path) -> dict[str, float]:
    """The lines ``name: number kB`` of a file."""
    rows = [line.split() for line in path.read_text().splitlines()]
    return {row[0].rstrip(":"): int(row[1]) / 1024 for row in rows if row[-1] == "kB"}


def _of_arena(arena: str) -> Iterator[tuple[str, float]]:
    found = {name: os.stat(segments.path_of(name)) for name in files_of(arena)}
    yield "files in /dev/shm", len(found)
    yield "bytes in /dev/shm", sum(status.st_blocks * 512 for status in found.values())
    yield "locks", _locks({_place(status) for name, status in found.items() if ".L" in name})


def files_of(arena: str) -> list[str]:
    """Names of what the arena has in shared memory."""
    return [name for name in os.listdir(segments.SHM_DIR) if f"-{arena}-" in name]


def _place(status: os.stat_result) -> str:
    """A file as ``/proc/locks`` names it."""
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"


def _locks(places: set[str]) -> int:
    """Ranges of these files that anybody has locked; neighbours of one owner are one."""
    lines = Path("/proc/locks").read_text().splitlines()
    return sum(not places.isdisjoint(line.split()) for line in lines)
