"""Contiguous extents of the record heap: best fit, with coalescing.

Problem
    A record is one contiguous piece of the heap, so that one copy fills it and one view
    reads it. Records live for very different times, so freed neighbours must merge, and
    requests that finish together want adjacent pieces.

The book-keeping is the writer's own memory: a crash of the writer ends the arena, so
nobody else ever needs it. Sizes are multiples of ``EXTENT_ALIGN``. Not thread-safe: the
writer serialises calls.

Invariant: the free extents are disjoint, no two touch, and
``free_bytes + allocated bytes == total``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import NamedTuple

from .layout import EXTENT_ALIGN


class Space(NamedTuple):
    """Bytes of a heap, how many of them are free, of these in the largest piece; free pieces."""

    total: int
    free: int
    largest: int
    pieces: int


class ExtentAllocator:
    """Allocates ``[offset, offset + size)`` pieces of ``[0, total)``."""

    def __init__(self, total: int) -> None:
        self.total = total & -EXTENT_ALIGN
        self.free_bytes = self.total
        self._by_size: list[tuple[int, int]] = []  # sorted (size, offset)
        self._size_at: dict[int, int] = {}  # free extent by its start
        self._start_of_end: dict[int, int] = {}  # free extent by its end
        if self.total:
            self._insert(0, self.total)

    @property
    def largest(self) -> int:
        """Bytes of the largest free extent."""
        return self._by_size[-1][0] if self._by_size else 0

    def space(self) -> Space:
        return Space(self.total, self.free_bytes, self.largest, len(self._by_size))

    def allocate(self, size: int, near: int | None = None) -> int | None:
        """Offset of a piece of ``size`` bytes, or None when no free extent is that large.

        The piece begins at ``near`` if a large enough extent begins there, else it comes out
        of the smallest extent that fits.
        """
        if near is not None and self._size_at.get(near, 0) >= size:
            offset = near
        else:
            index = bisect_left(self._by_size, (size, -1))
            if index == len(self._by_size):
                return None
            offset = self._by_size[index][1]
        self._cut(offset, size)
        self.free_bytes -= size
        return offset

    def free(self, offset: int, size: int) -> None:
        """Give a piece back and merge it with its free neighbours."""
        self.free_bytes += size
        left = self._start_of_end.get(offset)
        if left is not None:
            self._remove(left)
            size += offset - left
            offset = left
        right = self._size_at.get(offset + size)
        if right is not None:
            self._remove(offset + size)
            size += right
        self._insert(offset, size)

    def cheapest_run(self, pieces: dict[int, int], size: int, most: int) -> list[int]:
        """Offsets of neighbours among allocated ``pieces`` (size by offset) which, given back,
        make one free extent of ``size``, which none is now, with the free space between and
        beside them.

        Those of the fewest bytes, of equals the first, and at most ``most`` of them; empty when
        there are none. Its time does not grow with ``size``: a window slides over the pieces.
        """
        order = {offset: place for place, offset in enumerate(pieces)}
        best: list[int] = []
        least = self.total, 0
        window: deque[int] = deque()
        cost = behind = 0
        for offset in sorted(pieces):
            if self._free_before(offset) != behind:
                window.clear()  # something that stays lies between
                cost = 0
            window.append(offset)
            cost += pieces[offset]
            behind = offset + pieces[offset]
            end = behind + self._size_at.get(behind, 0)
            while len(window) > 1 and end - self._free_before(window[1]) >= size:
                cost -= pieces[window.popleft()]
            first = window[0]
            enough = end - self._free_before(first) >= size and len(window) <= most
            if enough and (cost, order[first]) < least:
                best, least = list(window), (cost, order[first])
        return best

    def _free_before(self, offset: int) -> int:
        """Where the free extent that ends at ``offset`` begins; ``offset`` if there is none."""
        return self._start_of_end.get(offset, offset)

    def free_extents(self) -> list[tuple[int, int]]:
        """``(offset, size)`` of every free extent, by offset."""
        return sorted(self._size_at.items())

    def _cut(self, offset: int, size: int) -> None:
        """Take ``size`` bytes off the front of the free extent at ``offset``."""
        extent = self._size_at.pop(offset)
        by_size, end = self._by_size, offset + extent
        index = bisect_left(by_size, (extent, offset))
        if extent == size:
            del by_size[index], self._start_of_end[end]
            return
        rest = (extent - size, offset + size)
        self._size_at[offset + size] = extent - size
        self._start_of_end[end] = offset + size
        # Most often the rest keeps its place in the order (what is cut is the largest extent,
        # and stays so): then nothing behind it moves.
        if index == 0 or by_size[index - 1] < rest:
            by_size[index] = rest
        else:
            del by_size[index]
            insort(by_size, rest, hi=index)

    def _insert(self, offset: int, size: int) -> None:
        insort(self._by_size, (size, offset))
        self._size_at[offset] = size
        self._start_of_end[offset + size] = offset

    def _remove(self, offset: int) -> None:
        size = self._size_at.pop(offset)
        del self._start_of_end[offset + size]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
