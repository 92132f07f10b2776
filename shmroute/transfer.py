"""Pack rows of several records into one tensor, on the CPU or on a GPU.

To a GPU the bytes cross PCIe as they are stored, one or two a route, and become int32 or int64
there. How they cross, and why:

whole rows, page-locked arena
    The copy engine takes each record where it lies: PCIe's speed, and the CPU does nothing.
some layers, page-locked arena
    A kernel reads them through the mapping, in words of up to 8 bytes, so that only those
    layers cross. The copy engine could do it, too (``cudaMemcpy2DAsync``), but is slow on narrow
    pieces, and 12 layers of top-8 are 96 bytes: torch used it for strided copies and took it
    back, since some were over 1000 times slower (pytorch PR 153176). Whole rows, cut on the
    GPU, would cross with four times the bytes for a fourth of the layers. ``copy_`` of a
    strided CPU tensor packs it on the CPU first, into pageable memory.
anything else
    An arena that is not locked yet or could not be, and inline records: the CPU packs the
    layers into a page-locked piece, and the copy engine takes it while the next is packed.

On the CPU, too, layers are packed first and widened then: torch widens a strided tensor at a
third of the speed of both together.

On a GPU all of it runs on the current stream. Leases are kept by ``inflight``.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy.typing as npt
import torch

from . import inflight, views
from .layout import RouteLayout
from .selection import Run

logger = logging.getLogger("shmroute")

Rows = views.LeasedRows | npt.NDArray[Any]

# At PCIe's speed 150 us: long beside what it takes to start a copy.
_PIECE_BYTES = 8 << 20
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def pack(
    records: Iterable[Rows],
    runs: Sequence[Run],
    *,
    tokens: int,
    layout: RouteLayout,
    device: torch.device,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Concatenate layers of records along axis 0.

    Parameters
    ----------
    records
        Rows ``[tokens, moe_layers, top_k]`` of the layout. Each is asked for when the copy of
        the one before has been queued, so that opening one overlaps with copying another.
    runs
        The layers, in the order of the result.
    tokens
        How many rows the records have together.
    device
        The CPU, or a CUDA device with its index.
    dtype
        int32, int64, or None: as stored, uint8 or uint16.

    Returns
    -------
    torch.Tensor
        ``[tokens, sum of the runs, top_k]``, contiguous. On a CUDA device the copies may still
        be in flight: the current stream is behind them.

    Raises
    ------
    RuntimeError
        A CUDA graph is being captured; or what torch says, without memory for instance.
    """
    word, columns = _in_words(runs, layout)
    words = (tokens, _width(columns))
    if device.type == "cpu":
        packed = torch.empty(words, dtype=word)
        for _, source, place in _placed(records, word):
            _copy(source, columns, packed[place])
    else:
        with torch.cuda.device(device):
            packed = _gather(records, columns, torch.empty(words, dtype=word, device=device))
    return _widened(packed, layout.dtype.itemsize, dtype).view(tokens, _width(runs), layout.top_k)


def _placed(
    records: Iterable[Rows], word: torch.dtype
) -> Iterator[tuple[Rows, torch.Tensor, slice]]:
    """Each record that has rows, its words on the CPU, and where on axis 0 they go."""
    first = 0
    for rows in records:
        source = views.as_tensor(rows)
        end = first + source.shape[0]
        if end > first:
            yield rows, source.view(end - first, -1).view(word), slice(first, end)
        first = end


def _copy(source: torch.Tensor, columns: Sequence[Run], target: torch.Tensor) -> None:
    """Copy columns of words; asynchronous where the two lie in memory that allows it."""
    for to, first, end in columns:
        target[:, to : to + end - first].copy_(source[:, first:end], non_blocking=True)


def _gather(records: Iterable[Rows], columns: Sequence[Run], packed: torch.Tensor) -> torch.Tensor:
    """Queue the copies that fill a tensor of words on the current device."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "routes cannot be read while a CUDA graph is captured: its replays would read "
            "records whose leases have ended. Read them before, into a tensor of the graph's"
        )
    kept: list[Any] = []
    try:
        for rows, words, place in _placed(records, packed.dtype):
            _send(rows, words, columns, packed[place], kept)
    finally:
        if kept:  # also when a later record failed: the earlier copies are under way
            inflight.hold(torch.cuda.current_stream(), kept)
    return packed


def _in_words(runs: Sequence[Run], layout: RouteLayout) -> tuple[torch.dtype, tuple[Run, ...]]:
    """The widest word that rows and runs are whole numbers of, and the runs counted in it."""
    layer_bytes = layout.top_k * layout.dtype.itemsize
    in_bytes = [Run(*(layer_bytes * position for position in run)) for run in runs]
    size = math.gcd(8, layout.row_bytes, *(place for run in in_bytes for place in run))
    return _WORDS[size], tuple(Run(*(place // size for place in run)) for run in in_bytes)


def _width(runs: Sequence[Run]) -> int:
    last = runs[-1]
    return last.to + last.end - last.first


def _send(
    rows: Rows,
    words: torch.Tensor,
    columns: Sequence[Run],
    target: torch.Tensor,
    kept: list[Any],
) -> None:
    if not isinstance(rows, views.LeasedRows) or not rows.arena.page_locked(target.device.index):
        _bounce.send(words, columns, target)
        return
    kept.append(rows)
    if target.shape == words.shape and len(columns) == 1:
        target.copy_(words, non_blocking=True)
    else:
        _copy(_as_seen_by_gpu(words, target.device), columns, target)


def _as_seen_by_gpu(words: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same page-locked memory as a CUDA tensor; it does not keep the memory."""
    return torch.as_tensor(_Mapped(words), device=device)


class _Mapped:
    """Page-locked words for the CUDA array interface: a GPU maps them at the CPU's address."""

    def __init__(self, words: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": tuple(words.shape),
            "typestr": f"<{'u' if words.dtype is torch.uint8 else 'i'}{words.dtype.itemsize}",
            "data": (words.data_ptr(), False),  # True is refused; nothing writes to it
        }


def _widened(packed: torch.Tensor, route_bytes: int, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return packed.view(torch.uint8 if route_bytes == 1 else torch.uint16)
    if route_bytes == 1:
        return packed.view(torch.uint8).to(dtype)
    # torch knows little of uint16 on a GPU; as int16, ids from 32,768 on come out negative.
    return packed.view(torch.int16).to(dtype).bitwise_and_(0xFFFF)


class _Bounce:
    """Two page-locked pieces: while the GPU empties one, the CPU fills the other.

    One pair for the process, allocated at first need; threads take turns.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._pieces: list[torch.Tensor] = []
        self._emptied: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def send(self, words: torch.Tensor, columns: Sequence[Run], target: torch.Tensor) -> None:
        """Fill ``target [rows, width]`` with columns of ``words``, which is free on return."""
        rows_at_once = _PIECE_BYTES // (target.shape[1] * target.dtype.itemsize)
        with self._turn:
            for first in range(0, len(words), rows_at_once):
                place = slice(first, first + rows_at_once)
                self._send_piece(words[place], columns, target[place])

    def _send_piece(
        self, words: torch.Tensor, columns: Sequence[Run], target: torch.Tensor
    ) -> None:
        if not self._pieces:
            self._pieces = [_piece(), _piece()]
        index, self._next = self._next, 1 - self._next
        emptied = self._emptied[index]
        if emptied is not None:
            emptied.synchronize()
        piece = self._pieces[index].view(target.dtype)[: target.numel()].view(target.shape)
        _copy(words, columns, piece)
        target.copy_(piece, non_blocking=True)
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
