"""Pack rows of several records into one tensor, on the CPU or on a GPU.

To a GPU the bytes cross PCIe as they are stored, one or two a route, and become int32 or int64
there. How they cross, and why:

page-locked arena
    The copy engine takes each record where it lies, and of it the layers that are asked for: PCIe's
    speed, and the CPU does nothing. By the runtime's own calls: torch has none for layers of a
    record. Its ``copy_`` of a strided CPU tensor packs it on the CPU first, into pageable memory;
    and a kernel that reads through the mapping takes longer on the GPU (H200, 1 to 912 bytes of a
    row), and three times as long to launch.
anything else
    An arena that is not locked yet or could not be, inline records, and layers where torch came
    without the runtime's library: the CPU packs them into a page-locked piece, and the copy
    engine takes it while the next is packed.

On the CPU, too, layers are packed first and widened then, a piece at a time that the cache holds:
torch widens a strided tensor slower than both together, and a whole batch packed first would be
written to memory twice.

On a GPU all of it runs on the current stream. Leases are kept by ``inflight``.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch

from . import inflight, kept_memory, views
from .attached import AttachedArena
from .cuda_runtime import can_copy, copy_rows_to_device, copy_to_device, current_stream
from .layout import RouteLayout
from .selection import Run
from .side_by_side import sharing

logger = logging.getLogger("shmroute")

Rows = views.LeasedRows | npt.NDArray[Any]

# At PCIe's speed 150 us: long beside what it takes to start a copy.
_PIECE_BYTES = 8 << 20
# What the second-level cache of a core holds, and long beside what a call of torch takes.
_CACHED_BYTES = 1 << 20
# The widest is two doubles, which torch copies as it copies all words: bit by bit.
_WORDS = {
    16: torch.complex128,
    8: torch.int64,
    4: torch.int32,
    2: torch.int16,
    1: torch.uint8,
}
_WIDEST = max(_WORDS)


def pack(
    records: Iterable[tuple[Rows, Sequence[Run]]],
    layers: Sequence[Run],
    *,
    rows: int,
    layout: RouteLayout,
    device: torch.device,
    dtype: torch.dtype | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Put layers of records into one tensor, each record's row ranges at their places.

    Parameters
    ----------
    records
        Rows ``[tokens, moe_layers, top_k]`` of the layout, and which of them go where in the
        result. Each record is asked for when the copy of the one before has been queued, so
        that opening one overlaps with copying another.
    layers
        The layers, in the order of the result.
    rows
        Rows of the result. Those that no record has a range for are left as they are allocated.
    device
        The CPU, or a CUDA device with its index.
    dtype
        int32, int64, or None: as stored, uint8 or uint16.
    out
        None, or memory for the result: contiguous, of the result's shape, dtype and device.

    Returns
    -------
    torch.Tensor
        ``[rows, sum of the layers, top_k]``, contiguous; ``out`` where it is given. On a CUDA
        device the copies may still be in flight: the current stream is behind them.

    Raises
    ------
    RuntimeError
        A CUDA graph is being captured; or what torch says, without memory for instance.
    """
    widest = _WIDEST if out is None else _alignment(out)
    word, width, columns = _in_words(tuple(layers), layout, widest)
    shape = rows, _width(layers), layout.top_k
    if dtype is None:
        packed = _memory(out, rows, _width(columns), word, device)
        _pack(records, width, columns, packed)
        return _as_stored(packed, layout).view(shape)
    widened = _memory(out, rows, shape[1] * shape[2], dtype, device)
    if device.type == "cpu":
        _pack_and_widen(records, width, columns, word, widened, layout)
    else:
        packed = _memory(None, rows, _width(columns), word, device)
        _pack(records, width, columns, packed)
        _widen(packed, widened, layout)
    return widened.view(shape)


class _Block(NamedTuple):
    """Rows of ``width`` words, one behind the other, from a place in a tensor.

    No tensor of its own: ``as_strided`` cuts what is copied out of the whole heap in one call,
    where making a tensor of each record and then its columns takes five. ``first`` counts words
    from the beginning of the tensor's storage, as ``as_strided`` does.
    """

    memory: torch.Tensor
    first: int
    rows: int
    width: int

    @classmethod
    def of(cls, memory: torch.Tensor, first: int, rows: int) -> _Block:
        """Rows ``[first, first + rows)`` of a contiguous tensor."""
        width = memory.shape[1]
        return cls(memory, memory.storage_offset() + first * width, rows, width)

    def columns(self, first: int, end: int) -> torch.Tensor:
        """``[rows, end - first]``."""
        return self.memory.as_strided((self.rows, end - first), (self.width, 1), self.first + first)

    def part(self, first: int, end: int) -> _Block:
        """Rows ``[first, end)``."""
        return self._replace(first=self.first + first * self.width, rows=end - first)


def _placed(
    records: Iterable[tuple[Rows, Sequence[Run]]], width: int, heaps: _Heaps
) -> Iterator[tuple[Rows, _Block, int]]:
    """Each range of a record's rows, where its words are, and the row where they go."""
    for rows, ranges in records:
        if isinstance(rows, views.LeasedRows):
            memory, place = heaps[rows.arena], rows.offset // heaps.word.itemsize
        else:
            memory, place = _words_of(rows, heaps.word), 0
        for to, first, end in ranges:
            yield rows, _Block(memory, place + first * width, end - first, width), to


def _memory(
    out: torch.Tensor | None, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Memory for ``[rows, width]``: that of ``out``, or new."""
    if out is not None:
        return out.view(-1).view(dtype).view(rows, width)
    if device.type == "cpu":
        return _on_cpu(rows, width, dtype)
    return torch.empty((rows, width), dtype=dtype, device=device)


def _pack(
    records: Iterable[tuple[Rows, Sequence[Run]]],
    width: int,
    columns: Sequence[Run],
    packed: torch.Tensor,
) -> None:
    """Fill a tensor of words."""
    if packed.device.type != "cpu":
        with torch.cuda.device(packed.device.index):
            _gather(records, width, columns, packed)
        return
    with sharing(packed.nbytes) as do:
        for rows, source, to in _placed(records, width, _Heaps(packed.dtype)):
            target = _Block.of(packed, to, source.rows)
            do(functools.partial(_copy, source, columns, target, kept=rows))


def _pack_and_widen(
    records: Iterable[tuple[Rows, Sequence[Run]]],
    width: int,
    columns: Sequence[Run],
    word: torch.dtype,
    widened: torch.Tensor,
    layout: RouteLayout,
) -> None:
    """Fill a tensor of ids on the CPU."""
    at_once = max(1, _CACHED_BYTES // (_width(columns) * word.itemsize))
    pieces: dict[int, torch.Tensor] = {}  # one for each thread

    def widen(source: _Block, to: int, rows: Rows) -> None:
        piece = pieces.get(threading.get_ident())
        if piece is None:
            piece = torch.empty((min(at_once, len(widened)), _width(columns)), dtype=word)
            pieces[threading.get_ident()] = piece
        for first in range(0, source.rows, at_once):
            part = source.part(first, min(first + at_once, source.rows))
            _copy(part, columns, _Block.of(piece, 0, part.rows), kept=rows)
            _widen(piece[: part.rows], widened[to + first : to + first + part.rows], layout)

    with sharing(widened.nbytes) as do:
        for rows, source, to in _placed(records, width, _Heaps(word)):
            do(functools.partial(widen, source, to, rows))


class _Heaps(dict[AttachedArena, torch.Tensor]):
    """A tensor of words over the heap of each arena, made when it is first asked for."""

    def __init__(self, word: torch.dtype) -> None:
        self.word = word

    def __missing__(self, arena: AttachedArena) -> torch.Tensor:
        heap: torch.Tensor = views.heap_as_tensor(arena).view(self.word)
        self[arena] = heap
        return heap


class _Locked(dict[AttachedArena, bool]):
    """Whether each arena is page-locked; asked once, which of an ended engine's takes 9 us."""

    def __init__(self, device: int) -> None:
        self._device = device

    def __missing__(self, arena: AttachedArena) -> bool:
        locked = self[arena] = arena.page_locked(self._device)
        return locked


def _words_of(rows: npt.NDArray[Any], word: torch.dtype) -> torch.Tensor:
    if rows.ctypes.data % word.itemsize:  # on which torch's copies of wide words crash
        rows = rows.copy()
    tensor: torch.Tensor = views.as_tensor(rows)
    return tensor.view(-1).view(word)


def _on_cpu(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty`` on the CPU, but for page faults, which are half of the time of a batch."""
    if not rows:  # of no bytes torch makes no view
        return torch.empty((0, width), dtype=dtype)
    return kept_memory.take(rows * width * dtype.itemsize).view(dtype).view(rows, width)


def _copy(
    source: _Block, columns: Sequence[Run], target: _Block, *, kept: Rows | None = None
) -> None:
    """Copy columns of words; asynchronous where the two lie in memory that allows it.

    ``kept`` has the lease on the source, where this may come later.
    """
    for to, first, end in columns:
        there = target.columns(to, to + end - first)
        there.copy_(source.columns(first, end), non_blocking=True)


@functools.lru_cache(maxsize=64)
def _in_words(
    runs: tuple[Run, ...], layout: RouteLayout, widest: int
) -> tuple[torch.dtype, int, tuple[Run, ...]]:
    """The widest word, up to so many bytes, that rows and runs are whole numbers of; a row and the
    runs counted in it.
    """
    layer_bytes = layout.top_k * layout.dtype.itemsize
    in_bytes = [Run(*(layer_bytes * position for position in run)) for run in runs]
    size = math.gcd(widest, layout.row_bytes, *(place for run in in_bytes for place in run))
    columns = tuple(Run(*(place // size for place in run)) for run in in_bytes)
    return _WORDS[size], layout.row_bytes // size, columns


def _alignment(memory: torch.Tensor) -> int:
    """The widest word that a tensor can be seen in."""
    return math.gcd(_WIDEST, memory.data_ptr(), memory.storage_offset() * memory.element_size())


def _width(runs: Sequence[Run]) -> int:
    last = runs[-1]
    return last.to + last.end - last.first


def _gather(
    records: Iterable[tuple[Rows, Sequence[Run]]],
    width: int,
    columns: Sequence[Run],
    packed: torch.Tensor,
) -> None:
    """Queue the copies that fill a tensor of words on the current device."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "routes cannot be read while a CUDA graph is captured: its replays would read "
            "records whose leases have ended. Read them before, into a tensor of the graph's"
        )
    by_address = can_copy()
    by_torch = not by_address and _are_whole(columns, width, packed)
    locked = _Locked(packed.device.index)
    kept: list[Any] = []
    try:
        if by_address:
            records = _but_for_locked(records, width, columns, packed, locked, kept)
        for rows, source, to in _placed(records, width, _Heaps(packed.dtype)):
            target = _Block.of(packed, to, source.rows)
            if by_torch and isinstance(rows, views.LeasedRows) and locked[rows.arena]:
                kept.append(rows)
                _copy(source, columns, target)
            else:
                _bounce.send(source, columns, target)
    finally:
        if kept:  # also when a later record failed: the earlier copies are under way
            inflight.hold(torch.cuda.current_stream(), kept)
        # Before 2.6 torch refuses this for tensors of inference mode, which have no version.
        if by_address and not packed.is_inference():
            # As torch's own copies do: a graph of autograd may have kept ``out``.
            torch.autograd.graph.increment_version(packed)


def _are_whole(columns: Sequence[Run], width: int, packed: torch.Tensor) -> bool:
    """Whether rows of ``width`` words go to ``packed`` as they are."""
    return len(columns) == 1 and packed.shape[1] == width


def _but_for_locked(
    records: Iterable[tuple[Rows, Sequence[Run]]],
    width: int,
    columns: Sequence[Run],
    packed: torch.Tensor,
    locked: _Locked,
    kept: list[Any],
) -> Iterator[tuple[Rows, Sequence[Run]]]:
    """Queue the copies of records that the copy engine can take as they lie; yield the others.

    What it takes is added to ``kept``. By addresses alone: no tensor is made of any record.
    """
    here, there = width * packed.itemsize, packed.shape[1] * packed.itemsize
    parts = [Run(*(packed.itemsize * word for word in run)) for run in columns]
    whole_rows = _are_whole(columns, width, packed)
    target, stream = packed.data_ptr(), current_stream(packed.device.index)
    for rows, ranges in records:
        if not isinstance(rows, views.LeasedRows) or not locked[rows.arena]:
            yield rows, ranges
            continue
        if ranges:
            kept.append(rows)
        for to, first, end in ranges:
            source, goal = rows.address + first * here, target + to * there
            if whole_rows:
                copy_to_device(goal, source, (end - first) * here, stream)
                continue
            for at, begin, stop in parts:
                copy_rows_to_device(
                    goal + at, there, source + begin, here, stop - begin, end - first, stream
                )


def _as_stored(packed: torch.Tensor, layout: RouteLayout) -> torch.Tensor:
    return packed.view(torch.uint8 if layout.dtype.itemsize == 1 else torch.uint16)


def _widen(packed: torch.Tensor, widened: torch.Tensor, layout: RouteLayout) -> None:
    """Write ids ``[rows, ids]`` that are packed in words as int32 or int64."""
    if layout.dtype.itemsize == 1:
        widened.copy_(packed.view(torch.uint8))
    else:
        # torch knows little of uint16 on a GPU; as int16, ids from 32,768 on come out negative.
        widened.copy_(packed.view(torch.int16)).bitwise_and_(0xFFFF)


class _Bounce:
    """Two page-locked pieces: while the GPU empties one, the CPU fills the other.

    One pair for the process, allocated at first need; threads take turns.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._pieces: list[torch.Tensor] = []
        self._emptied: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def send(self, source: _Block, columns: Sequence[Run], target: _Block) -> None:
        """Fill the target with columns of the source, which is free on return."""
        rows_at_once = _PIECE_BYTES // (target.width * target.memory.dtype.itemsize)
        with self._turn:
            for first in range(0, source.rows, rows_at_once):
                end = min(first + rows_at_once, source.rows)
                self._send_piece(source.part(first, end), columns, target.part(first, end))

    def _send_piece(self, source: _Block, columns: Sequence[Run], target: _Block) -> None:
        if not self._pieces:
            self._pieces = [_piece(), _piece()]
        index, self._next = self._next, 1 - self._next
        emptied = self._emptied[index]
        if emptied is not None:
            emptied.synchronize()
        piece = target._replace(memory=self._pieces[index].view(target.memory.dtype), first=0)
        _copy(source, columns, piece)
        there = target.columns(0, target.width)
        there.copy_(piece.columns(0, target.width), non_blocking=True)
        self._emptied[index] = torch.cuda.current_stream().record_event()


def _piece() -> torch.Tensor:
    try:
        return torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        logger.warning(
            "no page-locked memory for copies to a GPU (%s): they go at pageable speed; raise "
            "the limit of locked memory (ulimit -l, docker run --ulimit memlock=-1)",
            error,
        )
        return torch.empty(_PIECE_BYTES, dtype=torch.uint8)


_bounce = _Bounce()
