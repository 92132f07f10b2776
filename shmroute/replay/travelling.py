"""An array that travels as tickets: what a sample carries where its framework carries rows.

Problem: miles and verl hand a sample's routes from process to process as an array, which Ray
pickles: 50 MB for 32,768 tokens of Qwen3-30B-A3B as int32. Their code slices it on the way and
asks for its shape, and at the end wants a plain array.

``TravellingRows`` answers those questions without having the rows, pickles as the tickets of its
turns, and is a plain array where it is unpickled. Copies of it, deep ones too, are itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from . import row_ranges
from .row_ranges import RowRange

#: Reads ranges into the array ``[rows, num_layers, top_k]`` that a framework's process gets.
Loader = Callable[[Sequence[RowRange], int, int], npt.NDArray[Any]]


class TravellingRows:
    """Rows ``[rows, num_layers, top_k]`` of a sequence, by ticket.

    Parameters
    ----------
    ranges
        Where the rows lie.
    num_layers, top_k
        Decoder layers and experts a token, of the trainer's model.
    load
        What reads them where this is unpickled; a function of a module.
    """

    __slots__ = ("_load", "num_layers", "ranges", "top_k")

    def __init__(
        self, ranges: Sequence[RowRange], num_layers: int, top_k: int, load: Loader
    ) -> None:
        self.ranges = tuple(ranges)
        self.num_layers, self.top_k = num_layers, top_k
        self._load = load

    @property
    def shape(self) -> tuple[int, int, int]:
        return row_ranges.count(self.ranges), self.num_layers, self.top_k

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> TravellingRows:
        if not isinstance(rows, slice):
            raise TypeError(f"routes that travel are cut by slices of rows, not by {rows!r:.80}")
        first, end, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows in steps of {step}: their tokens follow each other")
        kept = row_ranges.cut(self.ranges, first, end)
        return TravellingRows(kept, self.num_layers, self.top_k, self._load)

    def __array__(self, dtype: npt.DTypeLike = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("rows that travel are read into new memory: only a copy can be had")
        rows = row_ranges.native(self.ranges, num_layers=self.num_layers, top_k=self.top_k)
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def __reduce__(self) -> Any:
        return self._load, (self.ranges, self.num_layers, self.top_k)

    def __copy__(self) -> TravellingRows:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TravellingRows:
        return self  # nothing in it changes, and by way of __reduce__ it would be read

    def __repr__(self) -> str:
        rows, layers, top_k = self.shape
        return f"<rows [0, {rows}) x {layers} layers x top-{top_k}, of {len(self.ranges)} records>"
