"""Tags: which token's forward wrote a row of the route table, and under which weights.

A row is found by its KV location, and locations are reused all the time. So beside each
row the table keeps 8 bytes, written in the same scatter::

    bit 63        0; the whole tag is -1 when no valid row was ever written here, or the
                  row was invalid (an id outside [0, experts), or one twice)
    bits 46..62   weight epoch, modulo 2**17
    bits 22..45   position in the sequence (up to 16,777,215)
    bits 0..21    token id; every id outside the vocabulary is the one code 2**22 - 1,
                  because multimodal code stands images in with ids beyond it and clamps
                  them at different moments

A record is only sealed complete when every tag names the request's own token and position.
A match is necessary, not sufficient: a former occupant can have had the same token at
the same position; what closes that is that each KV write that is no forward is refused
at start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

INVALID = -1
_TOKEN_BITS, _POSITION_BITS, _EPOCH_BITS = 22, 24, 17
FOREIGN_TOKEN = (1 << _TOKEN_BITS) - 1
POSITION_MAX = (1 << _POSITION_BITS) - 1
POSITION_SHIFT = _TOKEN_BITS
EPOCH_SHIFT = _TOKEN_BITS + _POSITION_BITS
EPOCH_MASK = (1 << _EPOCH_BITS) - 1
_PLACE_MASK = (1 << EPOCH_SHIFT) - 1


def make_tags(
    tokens: torch.Tensor, positions: torch.Tensor, epoch: int, vocabulary: int
) -> torch.Tensor:
    """``int64`` tags of a forward's tokens, on their device.

    Parameters
    ----------
    tokens, positions
        ``[n]`` integers, as the forward got them.
    epoch
        Number of the weights that computed it.
    vocabulary
        Ids outside ``[0, vocabulary)`` share one code; at most ``FOREIGN_TOKEN``.
    """
    ids = tokens.to(torch.int64)
    ids = torch.where((ids >= 0) & (ids < vocabulary), ids, FOREIGN_TOKEN)
    tags = (positions.to(torch.int64) << POSITION_SHIFT) | ids
    return tags | ((epoch & EPOCH_MASK) << EPOCH_SHIFT)


def expected_places(
    tokens: npt.NDArray[np.int64], start: int, vocabulary: int
) -> npt.NDArray[np.int64]:
    """What the position and token bits of a request's tags must be, from row ``start`` on."""
    # As unsigned numbers negative ids are large ones.
    if tokens.view(np.uint64).max(initial=0) >= vocabulary:
        tokens = np.where((tokens >= 0) & (tokens < vocabulary), tokens, FOREIGN_TOKEN)
    places = _positions(len(tokens)) | tokens
    if start:
        places += start << POSITION_SHIFT
    return places


_kept_positions = np.empty(0, dtype=np.int64)


def _positions(count: int) -> npt.NDArray[np.int64]:
    """Positions ``[0, count)`` where a tag has them; kept for the longest record so far."""
    global _kept_positions
    kept = _kept_positions
    if len(kept) < count:
        kept = np.arange(1 << (count - 1).bit_length(), dtype=np.int64) << POSITION_SHIFT
        _kept_positions = kept
    return kept[:count]


def are_all_right(tags: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> bool:
    """Whether every tag names its place and all are of the first one's epoch, as most often.

    One calculation and a comparison of bytes: NumPy lets go of the interpreter in every
    calculation, and gets it back when the engine's scheduler thread pleases.
    """
    if not len(tags) or tags[0] < 0:
        return False
    expected = places | (tags[0] & ~_PLACE_MASK)
    return expected.tobytes() == tags.tobytes()


def wrong_rows(tags: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mask of the rows whose tag does not name the expected token and position."""
    wrong: npt.NDArray[np.bool_] = (tags < 0) | ((tags & _PLACE_MASK) != places)
    return wrong


def epochs_of(tags: npt.NDArray[np.int64], current: int) -> npt.NDArray[np.int64]:
    """Full epoch numbers of rows, given that none is older than 2**17 - 1 epochs."""
    behind = (current - (tags >> EPOCH_SHIFT)) & EPOCH_MASK
    result: Any = current - behind
    return result
