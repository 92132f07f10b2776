"""What an arena looks like from outside, for people and scripts.

Problem
    Whoever asks how full an arena is, or what a dead engine left, must neither disturb the
    writer and the readers nor trip over a segment that is damaged, foreign, of another
    version, or removed while it is looked at.

Approach
    Nothing is locked: leases are asked for with ``F_OFD_GETLK``, words and counters are read
    as they are. The figures of a running arena are therefore a snapshot in which neighbouring
    figures may differ by what happened in between.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import reaper, segments
from .counters import read_counters
from .errors import LayoutMismatch
from .layout import ArenaDescription
from .leases import SLOTS_PER_FILE, is_locked, open_lease_file
from .memory import ArenaMemory
from .segments import SegmentName

LIVE, STARTING, DEAD, UNREADABLE = "live", "starting", "dead", "unreadable"


@dataclass(frozen=True, slots=True)
class SlotUse:
    """Slots and heap bytes by what they hold.

    ``unreleased`` of the ``sealed`` records nobody has released yet; ``leased`` are open in
    some reader. Bytes are those of sealed records' extents.
    """

    total: int
    sealed: int
    in_flight: int
    unreleased: int
    leased: int
    sealed_bytes: int
    unreleased_bytes: int

    @property
    def in_use(self) -> int:
        return self.sealed + self.in_flight


@dataclass(frozen=True, slots=True)
class ArenaReport:
    """One segment as found.

    Attributes
    ----------
    state
        ``live`` (its writer lives), ``starting`` (its writer is still making it), ``dead`` or
        ``unreadable``; ``problem`` says why it cannot be read.
    alive
        Whether its writer lives; None when that cannot be told.
    taken_bytes
        Memory that the data segment takes now, holes left out.
    description, use
        None unless it could be read.
    """

    segment: SegmentName
    state: str
    alive: bool | None
    taken_bytes: int
    problem: str = ""
    description: ArenaDescription | None = None
    use: SlotUse | None = None
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def user(self) -> str:
        """Name of the user that the segment belongs to, or the number."""
        try:
            return pwd.getpwuid(self.segment.uid).pw_name
        except KeyError:
            return str(self.segment.uid)

    @property
    def age(self) -> float | None:
        """Seconds since it was made."""
        if self.description is None:
            return None
        return (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self.description.created_ns) / 1e9

    @property
    def writer_started(self) -> float | None:
        """When the writer process started, in seconds since 1970."""
        if self.description is None:
            return None
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return booted + self.description.writer.start_time / os.sysconf("SC_CLK_TCK")

    def as_json(self) -> dict[str, Any]:
        """Plain values for scripts; what could not be read is None."""
        return {
            "arena": self.segment.arena,
            "segment": self.segment.data,
            "state": self.state,
            "problem": self.problem or None,
            "uid": self.segment.uid,
            "user": self.user,
            "taken_bytes": self.taken_bytes,
            "age_seconds": self.age,
            **self._described(),
            "slots": asdict(self.use) | {"in_use": self.use.in_use} if self.use else None,
            "counters": self.counters or None,
        }

    def _described(self) -> dict[str, Any]:
        if self.description is None:
            return {"writer": None, "geometry": None, "capacity": None, "retention": None}
        routes, writer = self.description.routes, self.description.writer
        return {
            "writer": {
                "pid": writer.pid,
                "started": self.writer_started,
                "host": writer.host,
                "boot_id": writer.boot_id,
            },
            "geometry": {
                "model": routes.model,
                "layer_ids": list(routes.layer_ids),
                "moe_layers": routes.row_shape[0],
                "num_layers": routes.num_layers,
                "top_k": routes.top_k,
                "num_experts": routes.num_experts,
                "dtype": routes.dtype_name,
                "row_bytes": routes.row_bytes,
            },
            "capacity": self.description.capacity,
            "retention": self.description.retention,
        }


def find_segments(wanted: str | None) -> list[SegmentName]:
    """Segments by arena name or by segment name; None: all, sorted by both."""
    found = segments.list_segments()
    chosen = [one for one in found if wanted in (None, one.arena, one.base, one.data)]
    return sorted(chosen, key=lambda segment: (segment.arena, segment.base))


def inspect_all(wanted: str | None = None) -> list[ArenaReport]:
    """A report of every segment of that name; those that vanish meanwhile are left out."""
    reports = (inspect(segment) for segment in find_segments(wanted))
    return [report for report in reports if report is not None]


def inspect(segment: SegmentName) -> ArenaReport | None:
    """Report on one segment; None when it is gone."""
    try:
        status = Path(segments.path_of(segment.data)).lstat()
    except FileNotFoundError:
        return None
    taken = status.st_blocks * 512
    try:
        alive = reaper.is_alive(segment)
    except FileNotFoundError:
        return None
    except PermissionError:
        return ArenaReport(segment, UNREADABLE, None, taken, "another user's, and not shared")
    except (LayoutMismatch, OSError) as error:
        return ArenaReport(segment, UNREADABLE, None, taken, str(error))
    if segment.temporary:
        problem = "" if alive else "its writer died before it was whole"
        return ArenaReport(segment, STARTING if alive else DEAD, alive, taken, problem)
    return _read(segment, alive, taken)


def _read(segment: SegmentName, alive: bool, taken: int) -> ArenaReport | None:
    try:
        memory = ArenaMemory.open(segment)
        use = _use(memory)
    except FileNotFoundError as error:
        if not Path(segments.path_of(segment.data)).exists():
            return None
        problem = f"half removed, {Path(error.filename).name} is missing"
        return ArenaReport(segment, UNREADABLE, alive, taken, problem)
    except (LayoutMismatch, OSError) as error:
        return ArenaReport(segment, UNREADABLE, alive, taken, str(error))
    return ArenaReport(
        segment,
        LIVE if alive else DEAD,
        alive,
        taken,
        description=memory.description,
        use=use,
        counters=read_counters(memory.counters),
    )


def _use(memory: ArenaMemory) -> SlotUse:
    words, released = memory.words.copy(), memory.acknowledgements.copy()
    sealed = (words != 0) & (words & 1 == 0)
    unreleased = sealed & (words != released)
    return SlotUse(
        total=len(words),
        sealed=int(np.count_nonzero(sealed)),
        in_flight=int(np.count_nonzero(words & 1)),
        unreleased=int(np.count_nonzero(unreleased)),
        leased=_leased_slots(memory, np.flatnonzero(sealed)),
        sealed_bytes=_extent_bytes(memory, np.flatnonzero(sealed)),
        unreleased_bytes=_extent_bytes(memory, np.flatnonzero(unreleased)),
    )


def _extent_bytes(memory: ArenaMemory, slots: Any) -> int:
    # A slot may be recycled between the words and here: its row then is the next record's.
    return sum(memory.row(slot).extent_bytes for slot in slots.tolist())


def _leased_slots(memory: ArenaMemory, sealed: Any) -> int:
    """Slots that readers hold: a shared lock collides with a write lock and with no other."""
    leased = 0
    for index in np.unique(sealed // SLOTS_PER_FILE).tolist():
        try:
            fd = open_lease_file(memory.segment.lease_file(index), writable=False)
        except FileNotFoundError:
            continue  # a reaper is removing the arena
        try:
            if not is_locked(fd, fcntl.F_WRLCK, 0, SLOTS_PER_FILE):
                continue
            for byte in (sealed[sealed // SLOTS_PER_FILE == index] % SLOTS_PER_FILE).tolist():
                leased += is_locked(fd, fcntl.F_WRLCK, byte, 1) and not is_locked(
                    fd, fcntl.F_RDLCK, byte, 1
                )
        finally:
            os.close(fd)
    return leased
