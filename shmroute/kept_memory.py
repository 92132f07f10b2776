"""Memory of a result that nobody holds any more, for the next result.

Problem
    A batch's rows are tens of MB. malloc takes as much from the kernel and gives it back as soon
    as it is free, so each batch begins with page faults, and where the ranks of a node do so at
    the same time these take longer than the copies.

Approach
    One piece is kept in a process: the last that came back. A result is a tensor over its piece;
    when the last tensor, array or slice that was made of it is gone, the piece comes back.

A piece serves a result that fills at least half of it. Nothing of this needs a lock: pieces come
back in finalisers, which may run at any moment in any thread, also in the middle of ``take``.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# What is smaller malloc keeps by itself.
_LEAST_BYTES = 1 << 20

_free: deque[npt.NDArray[np.uint8]] = deque(maxlen=1)


class _Lent(np.ndarray[Any, np.dtype[np.uint8]]):
    """A piece while somebody holds it. Only the tensor does: NumPy's views of it would hold the
    piece itself, past it.
    """


def take(nbytes: int) -> torch.Tensor:
    """``uint8 [nbytes]``, in huge pages where the kernel has some, with anything in it."""
    if nbytes < _LEAST_BYTES:
        return torch.from_numpy(np.empty(nbytes, dtype=np.uint8))
    piece = _fitting(nbytes)
    lent = piece[:nbytes].view(_Lent)
    weakref.finalize(lent, _free.append, piece).atexit = False
    return torch.from_numpy(lent)


def forget() -> None:
    """Let the piece go that waits for the next result."""
    _free.clear()


def _fitting(nbytes: int) -> npt.NDArray[np.uint8]:
    try:
        piece = _free.pop()
    except IndexError:
        pass
    else:
        if nbytes <= piece.nbytes <= 2 * nbytes:
            return piece
    # NumPy asks the kernel for huge pages, as torch does when THP_MEM_ALLOC_ENABLE is set.
    return np.empty(nbytes, dtype=np.uint8)
