"""A mapped arena as arrays: state words, rid hashes, counters, slot rows, heap.

Readers map the data segment read-only and the control segment read-write; the writer and
the reaper map both read-write. Nobody unmaps while a view is alive: views keep the
``ArenaMemory`` alive, and the mapping goes with the last of them.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout, segments
from .errors import LayoutMismatch
from .segments import SegmentName

Words = npt.NDArray[np.uint64]


class ArenaMemory:
    """The two mappings of one arena and the arrays over them.

    Attributes
    ----------
    words, hashes
        ``uint64[slots]``: state words and rid hashes. An element is read and written as
        one aligned 64-bit access (``struct.pack_into`` would clear it first).
    acknowledgements
        ``uint64[slots]``: the generation that somebody released, in the control segment.
    counters
        ``uint64[4, 256]``, see ``shmroute.counters``.
    data
        The whole data segment, for ``layout``'s readers and writers.
    """

    def __init__(
        self,
        segment: SegmentName,
        description: layout.ArenaDescription,
        data: mmap.mmap,
        control: mmap.mmap,
    ) -> None:
        self.segment = segment
        self.description = description
        self.data = memoryview(data)
        self._rows_offset = description.rows_offset
        slots = description.slots
        self.words = self._column(data, description.words_offset, slots)
        self.hashes = self._column(data, description.hash_offset, slots)
        self.counters = self._column(
            data, description.counters_offset, layout.COUNTER_BANKS * layout.COUNTERS_PER_BANK
        ).reshape(layout.COUNTER_BANKS, layout.COUNTERS_PER_BANK)
        self.acknowledgements = self._column(control, 0, slots)
        self.heap = self.data[description.heap_offset : description.capacity]
        self.heap_address = (
            int(self.words.ctypes.data) - description.words_offset + description.heap_offset
        )

    @staticmethod
    def _column(buffer: mmap.mmap, offset: int, length: int) -> Words:
        return np.frombuffer(buffer, dtype=np.uint64, count=length, offset=offset)

    @classmethod
    def open(cls, segment: SegmentName, *, writable: bool = False) -> ArenaMemory:
        """Map an existing arena.

        Raises
        ------
        FileNotFoundError
            One of its files is gone.
        LayoutMismatch
            It is not an arena that this version can read.
        """
        with (
            os.fdopen(segments.open_object(segment.data, writable=writable), "rb", 0) as data,
            os.fdopen(segments.open_object(segment.control, writable=True), "rb", 0) as control,
        ):
            return cls._map(segment, data.fileno(), control.fileno(), writable=writable)

    @classmethod
    def _map(cls, segment: SegmentName, fd: int, control_fd: int, *, writable: bool) -> ArenaMemory:
        # Read, not mapped: nothing is touched, and no more is mapped than the header asks for,
        # before it is known what this is.
        head, size = os.pread(fd, layout.HEADER_BYTES, 0), os.fstat(fd).st_size
        description = layout.read_header(head, size, segment.data)
        if description.arena_id != segment.arena_id:
            raise LayoutMismatch(
                f"{segment.data} holds arena {description.arena_id.hex()}: it was renamed"
            )
        if os.fstat(control_fd).st_size < description.control_bytes:
            raise LayoutMismatch(
                f"{segment.control} is shorter than {description.control_bytes} bytes"
            )
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            data = mmap.mmap(fd, description.capacity, flags=mmap.MAP_SHARED, prot=protection)
            control = mmap.mmap(control_fd, description.control_bytes, access=mmap.ACCESS_WRITE)
        except ValueError as error:
            raise LayoutMismatch(f"{segment.data} became shorter while it was opened") from error
        return cls(segment, description, data, control)

    def slot_offset(self, slot: int) -> int:
        """``description.slot_offset(slot)`` without working out the table's place each time."""
        return self._rows_offset + layout.SLOT_ROW_BYTES * slot

    def row(self, slot: int) -> layout.SlotRow:
        return layout.read_record(self.data, self.slot_offset(slot))

    def failure(self, slot: int) -> layout.Failure:
        return layout.read_failure(self.data, self.slot_offset(slot))

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array over the heap; the caller has checked that it fits."""
        return np.ndarray(shape, dtype=dtype, buffer=self.heap, offset=offset)


def rid_hash(rid: str) -> int:
    """64-bit hash of a rid for the slot table; never 0. Equal hashes are a hint, no proof."""
    digest = hashlib.blake2b(rid.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
