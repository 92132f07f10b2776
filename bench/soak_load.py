"""What the soak test's processes do, how much of it, and where they count it.

The ratio that decides about fragmentation is that of the largest record to the heap. Here it is
0.15%, as of 32,768 tokens of 48 layers and top-8 in the default 8 GiB; lengths are drawn
log-uniformly from 1% of the largest on.

At first the load fits: what is not released and not expired fills most of the heap, and at times
nearly all of it. In the last quarter it is too much at times. An overload leaves holes as small as
the small records that were the last to find room, whatever the allocator (best fit, first fit and
large ones apart were tried); for a while the largest records find none at lower fills, too. So how
full the heap was when a request went inline is counted apart then.
"""

from __future__ import annotations

import math
import mmap
import random
from dataclasses import dataclass

import numpy as np
from crash_rows import LAYOUT, TOKENS_MAX

from shmroute import layout

READERS = 4
LASTING_READERS = 2  # are never killed, so that they may not drift
_LARGEST = 0.0015


@dataclass(frozen=True, slots=True)
class Load:
    """How much, how often, how long.

    Attributes
    ----------
    heap, slots
        Of the arena; bytes of the heap are a little more, since its tables end with a page.
    rate, pace
        Records a second; for a while of ``pace`` seconds it is a factor of that, see ``FACTORS``.
    retention
        Seconds after which a record that nobody releases may be evicted.
    hold, late
        Seconds for which a view is held, and after which a late reader comes again and releases.
    kill
        Seconds from one kill of a reader to the next.
    sample
        Seconds from one look at the processes to the next.
    rest
        Seconds from one rest to the next: nothing is reserved, read or held then.
    """

    heap: int
    slots: int
    rate: float
    pace: tuple[float, float]
    retention: float
    hold: float
    late: tuple[float, float]
    kill: tuple[float, float]
    sample: float
    rest: float

    @property
    def capacity(self) -> int:
        return layout.MIN_TABLE_BYTES + self.slots * layout.SLOT_BYTES + layout.PAGE + self.heap

    @property
    def tokens_most(self) -> int:
        """Of the largest record."""
        return min(int(self.heap * _LARGEST / LAYOUT.row_bytes), TOKENS_MAX)

    def draw_tokens(self, chance: random.Random) -> int:
        most = self.tokens_most
        return int(math.exp(chance.uniform(math.log(most / 100), math.log(most))))


LONG = Load(
    heap=64 << 20,
    slots=8192,
    rate=200.0,
    pace=(5.0, 20.0),
    retention=20.0,
    hold=1.0,
    late=(2.0, 30.0),
    kill=(5.0, 25.0),
    sample=5.0,
    rest=30.0,
)
QUICK = Load(
    heap=8 << 20,
    slots=8192,
    rate=400.0,
    pace=(1.0, 4.0),
    retention=10.0,
    hold=0.2,
    late=(0.5, 12.0),
    kill=(1.0, 4.0),
    sample=0.5,
    rest=2.5,
)

# Of the rate, while the load fits and while it is too much.
FACTORS = {False: (0.3, 1.0, 1.0, 1.4), True: (0.3, 1.0, 1.0, 3.0)}
# Below these shares of used heap a request that goes inline is counted apart.
FILLS = (50, 80, 90, 100)


def inline_below(fill: int, overload: bool) -> str:
    """The count of requests that went inline while so much of the heap was used."""
    return f"inline below {fill}%{' in the overload' if overload else ''}"


LOWEST = {
    False: "lowest inline fill, per mille",
    True: "lowest inline fill in the overload, per mille",
}
# What became of records, as the result shows it.
BECAME = (
    "records",
    "sealed",
    "failed",
    "read",
    "read by rid",
    "read again",
    "released early",
    "released late",
    "never released",
    "gone",
    "refused as failed",
    "timed out",
    "tickets that nobody took",
)
_COUNTS = (
    *BECAME,
    *(inline_below(fill, overload) for overload in (False, True) for fill in FILLS),
    "inline for want of a slot",
    "wrong rows",
    "unexpected errors",
    # as they are now
    "at rest",
    "heap bytes",
    "heap used",
    "free pieces",
    "largest free piece",
    *LOWEST.values(),
    "usable slots",
    "heap in one piece",
)
_COLUMN = {name: column for column, name in enumerate(_COUNTS)}


class Tally:
    """What one process counts, in memory that all of them share."""

    def __init__(self, counts: memoryview) -> None:
        self._counts = counts

    def add(self, name: str) -> None:
        self._counts[_COLUMN[name]] += 1

    def set(self, name: str, value: int) -> None:
        self._counts[_COLUMN[name]] = value


class Flag:
    """A word that all processes share."""

    def __init__(self) -> None:
        self._word = mmap.mmap(-1, 1)

    def __bool__(self) -> bool:
        return self._word[0] != 0

    def set(self, value: bool) -> None:
        self._word[0] = value


class Tallies:
    """The counts of all processes; made before they are forked."""

    def __init__(self, processes: int) -> None:
        memory = mmap.mmap(-1, 8 * processes * len(_COUNTS))
        self._counts = np.frombuffer(memory, dtype=np.uint64).reshape(processes, len(_COUNTS))

    def __getitem__(self, process: int) -> Tally:
        return Tally(self._counts[process].data)

    def total(self, name: str) -> int:
        return int(self._counts[:, _COLUMN[name]].sum())
