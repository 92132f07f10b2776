"""What stands in rows of a batch that no route is known for.

A trainer's forward computes every token of a sequence and the padding behind it, and its routers
want a row for each. Routes are missing for

- a sequence's last token, which the rollout sampled and never forwarded
- tokens before the first record's, where ``start`` is not 0
- rows that a record reports missing
- the padding itself

Zeros would not do: ids within a row are a set, and a repeated one breaks the count of tokens an
expert that Megatron's dispatcher makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

Pad = Literal["distinct", "minus_one", "mask"]

Spans = Sequence[tuple[int, int]]


def check(pad: Any, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless rows of that dtype can be padded in that way."""
    if pad is not None and pad not in get_args(Pad):
        raise ValueError(f"pad is {pad!r}: one of {', '.join(get_args(Pad))}, or None")
    if pad == "minus_one" and dtype is None:
        raise ValueError(
            "pad='minus_one' with ids as stored, which are unsigned: -1 would be an expert's id. "
            "Give dtype=torch.int32 or torch.int64"
        )


def fill(rows: torch.Tensor, spans: Spans, pad: Pad) -> torch.Tensor | None:
    """Fill row ranges ``[first, end)`` as ``pad`` says.

    Parameters
    ----------
    rows
        ``[rows, layers, top_k]``, contiguous.

    Returns
    -------
    torch.Tensor or None
        With "mask" ``bool [rows]`` on the same device, True in those ranges.
    """
    padding = _indices(spans).to(rows.device, non_blocking=True)
    if pad == "minus_one":
        rows.index_fill_(0, padding, -1)
        return None
    # torch does little with uint16; ids below top_k are the same as int16. All are experts: there
    # are at least top_k of them.
    known = rows.view(torch.int16) if rows.dtype is torch.uint16 else rows
    known[padding] = torch.arange(rows.shape[2], device=rows.device, dtype=known.dtype)
    if pad == "distinct":
        return None
    mask = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    return mask.index_fill_(0, padding, True)


def _indices(spans: Spans) -> torch.Tensor:
    ranges: list[npt.NDArray[np.int64]] = [np.arange(first, end) for first, end in spans]
    return torch.from_numpy(np.concatenate(ranges) if ranges else np.empty(0, np.int64))


def rest(spans: Spans, rows: int) -> list[tuple[int, int]]:
    """Ranges of ``[0, rows)`` that none of these ascending, disjoint ranges covers."""
    firsts = [0, *(end for _, end in spans)]
    ends = [*(first for first, _ in spans), rows]
    return [(first, end) for first, end in zip(firsts, ends, strict=True) if first < end]
