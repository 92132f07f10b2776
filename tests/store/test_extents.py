"""The extent allocator, against a model that only counts bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmroute.extents import ExtentAllocator
from shmroute.layout import EXTENT_ALIGN

SIZES = st.integers(1, 40).map(lambda units: units * EXTENT_ALIGN)
TOTAL = 100 * EXTENT_ALIGN


class Allocations(RuleBasedStateMachine):
    """Any order of allocating and freeing."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(TOTAL)
        self.taken: dict[int, int] = {}

    @rule(size=SIZES)
    def allocate(self, size: int) -> None:
        smallest = min((s for _, s in self.allocator.free_extents() if s >= size), default=None)
        offset = self.allocator.allocate(size)
        assert (offset is None) == (smallest is None)
        if offset is not None:
            assert smallest not in [s for o, s in self.allocator.free_extents() if o == offset]
            self.taken[offset] = size

    @precondition(lambda self: self.taken)
    @rule(size=SIZES, data=st.data())
    def allocate_behind(self, size: int, data: st.DataObject) -> None:
        before = data.draw(st.sampled_from(sorted(self.taken)))
        behind = before + self.taken[before]
        free = dict(self.allocator.free_extents())
        offset = self.allocator.allocate(size, near=behind)
        if free.get(behind, 0) >= size:
            assert offset == behind
        if offset is not None:
            self.taken[offset] = size

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        self.allocator.free(offset, self.taken.pop(offset))

    @precondition(lambda self: self.taken)
    @rule(size=SIZES, most=st.integers(1, 6), data=st.data())
    def look_for_the_cheapest_run(self, size: int, most: int, data: st.DataObject) -> None:
        size += self.allocator.largest
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.taken)), min_size=1))
        pieces = {offset: self.taken[offset] for offset in chosen}
        run = self.allocator.cheapest_run(pieces, size, most)
        costs = [sum(pieces[at] for at in other) for other in self.runs(pieces, size, most)]
        assert bool(run) == bool(costs)
        if run:
            assert sum(pieces[at] for at in run) == min(costs)
            assert sorted(run) in list(self.runs(pieces, size, most))

    def runs(self, pieces: dict[int, int], size: int, most: int) -> Iterator[list[int]]:
        """All runs that make room: every window of neighbours that are free or in ``pieces``."""
        free = dict(self.allocator.free_extents())
        extents = sorted({**free, **self.taken}.items())
        for first, end in itertools.combinations(range(len(extents) + 1), 2):
            window = extents[first:end]
            run = [offset for offset, _ in window if offset in pieces]
            usable = all(offset in free or offset in pieces for offset, _ in window)
            if usable and 0 < len(run) <= most and sum(length for _, length in window) >= size:
                yield run

    @invariant()
    def space_is_conserved_and_nothing_overlaps(self) -> None:
        free = self.allocator.free_extents()
        position = 0
        for offset, size in sorted([*free, *self.taken.items()]):
            assert offset == position
            assert offset % EXTENT_ALIGN == 0
            position += size
        assert position == TOTAL
        assert self.allocator.free_bytes == sum(size for _, size in free)
        assert self.allocator.largest == max((size for _, size in free), default=0)

    @invariant()
    def free_neighbours_are_merged(self) -> None:
        free = self.allocator.free_extents()
        ends = {offset + size for offset, size in free}
        assert not ends & {offset for offset, _ in free}

    @invariant()
    def the_order_by_size_is_kept(self) -> None:
        free = [(size, offset) for offset, size in self.allocator.free_extents()]
        assert self.allocator._by_size == sorted(free)

    def teardown(self) -> None:
        for offset, size in self.taken.items():
            self.allocator.free(offset, size)
        assert self.allocator.free_extents() == [(0, TOTAL)]


TestAllocations = Allocations.TestCase


def test_an_extent_comes_out_of_the_smallest_that_fits():
    allocator = ExtentAllocator(1000 * 64)
    first, fence, second, _ = (allocator.allocate(size * 64) for size in (20, 1, 10, 969))
    allocator.free(first, 20 * 64)
    allocator.free(second, 10 * 64)
    assert fence == 20 * 64
    assert allocator.allocate(9 * 64) == second


@given(st.integers(0, 10_000))
def test_the_total_is_cut_to_whole_units(total):
    assert ExtentAllocator(total).free_bytes == total // EXTENT_ALIGN * EXTENT_ALIGN
