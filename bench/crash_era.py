"""One era of the crash campaign: writers of one arena name, one after the other, and readers.

::

    readers   |----x |---x |--------x |--x |-------------x         x: SIGKILL
    writers   |---x     |-----x     |---x      |----------- proof x
    dead arena     examined, reaped  ...                            examined, reaped alone, clean

A writer that died is examined (every record that it issued a ticket for), its arena is reaped
by a process that may be killed at that, too, and a new writer of the same name begins, while
the readers go on. At the end of the era all readers are killed, the last writer proves that its
whole arena is usable, and no file may be left.

Everything that an era does is drawn from the campaign's seed.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import crash_processes
from crash_life import Again, Life
from crash_log import EventLog
from crash_points import Point
from crash_reader import examine, read
from crash_reaper import clean
from crash_writer import write

from shmroute import segments

READERS = 3
_LIMIT = 10.0  # seconds after which a process that did not come to its point is killed
_SHORT_RETENTION = 0.05
_EXAMINED_AGAIN = 2
_POLL = 1e-3
_OFTEN = 20


class Deck:
    """Kill points in an order of chance; each comes up again before any comes up twice."""

    def __init__(self, points: list[Point], chance: random.Random) -> None:
        self._points = points
        self._chance = chance
        self._waiting: deque[Point] = deque()

    def draw(self) -> Point | None:
        """The next point; None when there is none at all."""
        if not self._waiting:
            self._waiting.extend(self._chance.sample(self._points, len(self._points)))
        return self._waiting.popleft() if self._waiting else None

    def missed(self, point: Point) -> None:
        """Have it come up again soon: its process ended without coming to it."""
        self._waiting.appendleft(point)


class Decks:
    """A deck for each role, and one for the points that need an arena without readers."""

    def __init__(self, points: tuple[Point, ...], chance: random.Random) -> None:
        self._decks = {
            role: Deck([p for p in points if p.role == role and not p.alone], chance)
            for role in ("writer", "reader", "reaper")
        }
        self._decks["reaper alone"] = Deck([p for p in points if p.alone], chance)

    def __getitem__(self, role: str) -> Deck:
        return self._decks[role]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an era is made of.

    Attributes
    ----------
    writers
        Lives of the arena name.
    outside
        Share of lives that are killed from outside, at any instruction, within ``seconds``.
    releases
        Share of what a reader opens that it releases.
    stretch
        A reader passes most points often: it dies at a call up to so many times later.
    again
        See ``crash_life``.
    """

    writers: int
    outside: float
    seconds: float
    releases: float
    stretch: int = 1
    again: Again | None = None

    def draw_call(self, point: Point, chance: random.Random) -> int:
        """The call of the point to die at."""
        if self.again is not None:
            return self.again.call
        often = point.role == "reader" and point.most >= _OFTEN
        return chance.randint(1, point.most * (self.stretch if often else 1))

    def draw_evicting(self, point: Point | None, chance: random.Random) -> bool:
        """Whether a writer evicts what is old."""
        if self.again is not None and self.again.role == "writer":
            return self.again.retention is not None
        if point is not None and point.operation == "evict":
            return True
        return chance.random() < 0.5

    def draw_seed(self, role: str, chance: random.Random) -> int:
        """The seed of a life."""
        if self.again is not None and self.again.role == role:
            return self.again.seed
        return chance.randrange(1 << 32)


@dataclass(slots=True)
class _Child:
    life: Life
    pid: int
    deadline: float


class Era:
    """See the module. ``run`` once; the logs are then in ``folder``."""

    def __init__(
        self, arena: str, folder: Path, seed: int, first: int, decks: Decks, plan: Plan
    ) -> None:
        self._arena = arena
        self._folder = folder
        self.number = first  # of the next life; counts on through the campaign
        self._decks = decks
        self._plan = plan
        self._chance = random.Random(f"{seed}/era/{first}")
        self._log = EventLog(folder / "campaign.log")
        self._children: dict[int, _Child] = {}
        self._dead: list[Life] = []
        self._ask, self._asked = -1, -1

    def run(self) -> None:
        asked, self._ask = os.pipe()
        self._asked = asked
        try:
            for _ in range(READERS):
                self._start_reader()
            for _ in range(self._plan.writers - 1):
                self._live_through(self._start_writer())
            self._last_writer()
        finally:
            for child in self._children.values():
                crash_processes.end(child.pid)
            os.close(asked)
            os.close(self._ask)
            _remove_files(self._arena)

    # -- the course of an era ------------------------------------------------------------------

    def _live_through(self, writer: _Child) -> None:
        self._wait_for(writer)
        self._dead.append(writer.life)
        self._examine()
        self._reap("reaper", force=False)

    def _last_writer(self) -> None:
        writer = self._start_writer(last=True)
        until = time.monotonic() + self._plan.seconds / 2
        while time.monotonic() < until:
            self._poll()
        for child in list(self._children.values()):
            if child is not writer:
                self._end_from_outside(child)
        self._log.write("prove", process=writer.life.name)
        os.write(self._ask, b"!")
        self._wait_for(writer)
        self._dead.append(writer.life)
        self._examine()
        self._reap("reaper alone", force=True)
        self._wait_for(self._start("reaper", partial(clean, force=True)))
        self._log.write("left", files=_files(self._arena))

    def _examine(self) -> None:
        """The last writer's records, and those of writers before it that nothing may evict."""
        older = [life for life in self._dead[:-1] if life.retention == float("inf")]
        dead = [*older[-_EXAMINED_AGAIN:], self._dead[-1]]
        self._wait_for(self._start("examiner", partial(examine, dead=dead)))

    def _reap(self, deck: str, *, force: bool) -> None:
        point = self._decks[deck].draw() if self._chance.random() >= self._plan.outside else None
        if point is not None:
            self._wait_for(self._start("reaper", partial(clean, force=force), point))

    # -- processes -----------------------------------------------------------------------------

    def _start_writer(self, *, last: bool = False) -> _Child:
        point = None if last else self._draw("writer")
        evicts = self._plan.draw_evicting(point, self._chance)
        return self._start(
            "writer",
            partial(write, asked=self._asked),
            point,
            retention=_SHORT_RETENTION if evicts else float("inf"),
            lasts=last,
        )

    def _start_reader(self) -> None:
        reading = partial(read, releases=self._plan.releases)
        self._start("reader", reading, self._draw("reader"))

    def _draw(self, role: str) -> Point | None:
        if self._chance.random() < self._plan.outside:
            return None
        return self._decks[role].draw()

    def _start(
        self,
        role: str,
        main: Callable[[Life], None],
        point: Point | None = None,
        *,
        retention: float = float("inf"),
        lasts: bool = False,
    ) -> _Child:
        seed = self._plan.draw_seed(role, self._chance)
        call = self._plan.draw_call(point, self._chance) if point else 0
        life = Life(role, self.number, seed, self._arena, self._folder, point, call, retention)
        self.number += 1
        life.log_path.touch()  # others read it, and the process may be killed before it does this
        random_end = role in ("writer", "reader") and point is None and not lasts
        seconds = self._chance.uniform(0.01, self._plan.seconds) if random_end else _LIMIT
        pid = crash_processes.start(lambda: main(life))
        deadline = float("inf") if lasts else time.monotonic() + seconds
        child = self._children[pid] = _Child(life, pid, deadline)
        return child

    def _wait_for(self, child: _Child) -> None:
        while child.pid in self._children:
            self._poll()

    def _poll(self) -> None:
        """Wait a moment; kill whose time has come, and have new readers for dead ones."""
        time.sleep(_POLL)
        for child in list(self._children.values()):
            status = crash_processes.ended(child.pid)
            if status is not None:
                self._ended(child, status, outside=False)
            elif time.monotonic() > child.deadline:
                self._end_from_outside(child)
            else:
                continue
            if child.life.role == "reader":
                self._start_reader()

    def _end_from_outside(self, child: _Child) -> None:
        crash_processes.kill(child.pid)
        while (status := crash_processes.ended(child.pid)) is None:
            time.sleep(_POLL)
        self._ended(child, status, outside=True)

    def _ended(self, child: _Child, status: int, *, outside: bool) -> None:
        del self._children[child.pid]
        life = child.life
        self._log.write("end", process=life.name, role=life.role, status=status, outside=outside)
        if life.point is not None and (outside or status == 0):
            deck = f"{life.role} alone" if life.point.alone else life.role
            self._decks[deck].missed(life.point)


def _files(arena: str) -> list[str]:
    """What lies in shared memory under this name."""
    return sorted(name for name in os.listdir(segments.SHM_DIR) if f"-{arena}-" in name)


def _remove_files(arena: str) -> None:
    for name in _files(arena):
        segments.unlink_if_present(name)


@contextmanager
def no_leftovers(prefix: str) -> Iterator[None]:
    """Remove what any arena whose name begins so left, also after an error."""
    try:
        yield
    finally:
        for name in os.listdir(segments.SHM_DIR):
            if f"-{prefix}-" in name:
                segments.unlink_if_present(name)
