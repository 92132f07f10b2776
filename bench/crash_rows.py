"""Rows that say whose they are: every row names its record and its place in it.

A row is two 64-bit words: the key of (arena, rid, generation), and the key plus a multiple of
the row's offset. So rows of another record show by their key, and rows that are cut, shifted,
zero or mixed show by the second word.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shmroute import RouteLayout

LAYOUT = RouteLayout(65536, 4, range(2), model="crash campaign")
TOKENS_MAX = 8192
_KEYS_SHOWN = 4
_STEPS = np.arange(TOKENS_MAX, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class Sight(NamedTuple):
    """What a reader saw: the keys in the rows, and whether each row was in its place."""

    keys: list[int]
    orderly: bool


def key_of(arena: str, rid: str, generation: int) -> int:
    """The record's key; ``arena`` is the hexadecimal id, since generations begin anew in each."""
    digest = hashlib.blake2b(f"{arena}/{rid}/{generation}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def rows_of(key: int, tokens: int) -> npt.NDArray[Any]:
    """The record's rows, ``uint16 [tokens, 2, 4]``."""
    pairs = np.empty((tokens, 2), dtype=np.uint64)
    pairs[:, 0] = key
    pairs[:, 1] = np.uint64(key) + _STEPS[:tokens]
    return pairs.view(np.uint16).reshape(tokens, *LAYOUT.row_shape)


def look(rows: npt.NDArray[Any]) -> Sight:
    """See what is in the rows, without knowing what should be."""
    pairs = rows.reshape(len(rows), -1).view(np.uint64).copy()
    keys = pairs[:, 0]
    same = bool((keys == keys[0]).all())
    found = [int(keys[0])] if same else np.unique(keys)[:_KEYS_SHOWN].tolist()
    orderly = bool((pairs[:, 1] - keys == _STEPS[: len(rows)]).all())
    return Sight(found, orderly)
