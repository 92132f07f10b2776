"""What a record says beside its rows: rid, missing rows, weight versions.

msgpack ``[rid, missing, versions]``: ``missing`` is a list of ``[first, end)`` row ranges,
flattened, or a bit a row, whichever is smaller; ``versions`` are runs
``[first row, epoch, label]`` in row order, each reaching to the next one's first row.

What is read is untrusted: types and ranges are checked, and no list has more than ``_LIST_MAX``
items, so that nested ones cannot claim the reader's memory (see ``ticket``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

_LIST_MAX = 1 << 14


class WeightRun(NamedTuple):
    """Rows ``[first, next run's first)`` were computed under this weight version."""

    first: int
    epoch: int
    label: str


class Metadata(NamedTuple):
    """The variable part of a record. ``missing`` holds disjoint ascending row ranges."""

    rid: str
    missing: tuple[tuple[int, int], ...] = ()
    versions: tuple[WeightRun, ...] = ()

    @property
    def missing_rows(self) -> int:
        return sum([end - first for first, end in self.missing])

    def check(self, tokens: int) -> None:
        """Raise ValueError unless a record of ``tokens`` rows can say this of itself."""
        if self.missing and not 0 <= self.missing[0][0] < self.missing[-1][1] <= tokens:
            raise ValueError(f"missing rows {self.missing} lie outside [0, {tokens})")
        if len(self.versions) > _LIST_MAX:
            raise ValueError(f"{len(self.versions)} weight runs; a record has up to {_LIST_MAX}")
        for first, _epoch, _label in self.versions:
            if not 0 <= first < max(tokens, 1):
                raise ValueError(f"weight runs {self.versions} begin outside [0, {tokens})")

    def without_labels(self) -> Metadata:
        """The same with every weight run named by its epoch, for a record with little room."""
        runs = tuple(run._replace(label=f"epoch-{run.epoch}") for run in self.versions)
        return self._replace(versions=runs)

    def pack(self, tokens: int = 0) -> bytes:
        """Encode; with ``tokens`` given, many ranges turn into a bitmap, as is smaller."""
        flat: Any = [bound for span in self.missing for bound in span]
        if tokens and (len(flat) * 5 > (tokens + 7) // 8 or len(flat) > _LIST_MAX):
            bits = np.zeros(tokens, dtype=np.uint8)
            for first, end in self.missing:
                bits[first:end] = 1
            flat = np.packbits(bits).tobytes()
        packed: bytes = msgpack.packb((self.rid, flat, self.versions))
        return packed

    @classmethod
    def unpack(cls, blob: bytes, tokens: int) -> Metadata:
        """Decode and check against the record's number of rows.

        Raises
        ------
        ValueError
            It is no metadata, or speaks of rows that the record does not have.
        """
        try:
            rid, missing, versions = msgpack.unpackb(
                blob, max_array_len=_LIST_MAX, max_map_len=0, max_ext_len=0
            )
            runs = _runs(versions, tokens)
            spans = _spans(missing, tokens)
        except ValueError:
            raise
        except Exception as error:  # msgpack raises a dozen types for garbage
            raise ValueError(f"unreadable record metadata: {error}") from error
        if not isinstance(rid, str):
            raise ValueError("the record's rid is no text")
        return cls(rid, spans, runs)


def _runs(versions: Any, tokens: int) -> tuple[WeightRun, ...]:
    runs = tuple([WeightRun(first, epoch, label) for first, epoch, label in versions])
    for run in runs:
        if [*map(type, run)] != [int, int, str] or not 0 <= run.first < max(tokens, 1):
            raise ValueError(f"{run!r:.80} is no weight version run of {tokens} rows")
    return runs


def _spans(missing: Any, tokens: int) -> tuple[tuple[int, int], ...]:
    if missing == []:
        return ()  # the common case, on the reader's way
    if isinstance(missing, bytes):
        if len(missing) != (tokens + 7) // 8:
            raise ValueError(f"a bitmap of {len(missing)} bytes for {tokens} rows")
        return ranges_of(np.unpackbits(np.frombuffer(missing, np.uint8), count=tokens))
    if not isinstance(missing, list) or len(missing) % 2:
        raise ValueError("missing rows are neither ranges nor a bitmap")
    inside = all(type(bound) is int and 0 <= bound <= tokens for bound in missing)
    if not inside or missing != sorted(missing):
        raise ValueError(f"missing rows lie outside [0, {tokens})")
    return tuple(zip(missing[::2], missing[1::2], strict=True))


def ranges_of(mask: npt.ArrayLike) -> tuple[tuple[int, int], ...]:
    """Turn a mask over rows into ascending ``[first, end)`` ranges."""
    flags = np.asarray(mask, dtype=bool)
    if not flags.any():
        return ()
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False]))))
    return tuple((int(first), int(end)) for first, end in edges.reshape(-1, 2))


def weight_runs(epochs: npt.NDArray[np.int64], label: Any) -> tuple[WeightRun, ...]:
    """Runs of equal epochs; ``label(epoch)`` gives the name of each."""
    if not len(epochs):
        return ()
    firsts = np.concatenate(([0], np.flatnonzero(np.diff(epochs)) + 1))
    return tuple(WeightRun(int(i), int(epochs[i]), label(int(epochs[i]))) for i in firsts)


def merge_ranges(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sort ranges and merge those that touch or overlap."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(spans):
        if first >= end:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)


def as_runs(versions: Iterable[WeightRun | tuple[int, int, str]]) -> tuple[WeightRun, ...]:
    """Weight runs out of plain tuples."""
    return tuple(
        [WeightRun(int(first), int(epoch), str(label)) for first, epoch, label in versions]
    )
