"""Rollouts for tests of trainers: routes in a real arena, and what SGLang natively returns of them.

The routes of a sequence are in one record or, as deltas, in one a turn.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shmroute import Arena, RouteLayout

NUM_LAYERS, TOP_K = 6, 4
#: Layers 0, 3 and 5 are dense.
LAYOUT = RouteLayout(128, TOP_K, [1, 2, 4], num_layers=NUM_LAYERS, model="tests/replay")
WIDE = RouteLayout(512, TOP_K, [1, 2, 4], num_layers=NUM_LAYERS, model="tests/replay, 512 experts")


def text(envelope: bytes) -> str:
    return base64.b64encode(envelope).decode()


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sequence.

    Attributes
    ----------
    tokens
        Its length.
    turns
        For each turn: tokens after it, and its ticket; each begins where the one before ended.
    native
        What SGLang returns of the whole sequence: ``int32 [tokens - 1, layers, top_k]``, base64.
    """

    tokens: int
    turns: tuple[tuple[int, str], ...]
    native: str

    @property
    def tickets(self) -> list[str]:
        return [ticket for _, ticket in self.turns]

    def facts(self) -> dict[str, object]:
        """What a process is told."""
        return {"tokens": self.tokens, "turns": self.turns, "native": self.native}


def routes(rows: int, layout: RouteLayout, seed: int) -> npt.NDArray[np.int64]:
    """``[rows, moe_layers, top_k]``: distinct experts in each row, from all that there are."""
    shuffled = np.random.default_rng(seed).random((rows, *layout.row_shape[:1], layout.num_experts))
    return shuffled.argsort(-1)[..., : layout.top_k]


def rollout(
    arena: Arena, rid: str, ends: Sequence[int], *, layout: RouteLayout = LAYOUT, seed: int = 0
) -> Rollout:
    """Write a sequence whose turns end after so many tokens."""
    ids = routes(ends[-1] - 1, layout, seed)
    turns = []
    start = 0
    for number, end in enumerate(ends):
        with arena.reserve(f"{rid}-{number}", tokens=end - 1 - start, start=start) as slot:
            slot.rows[...] = ids[start : end - 1]
        turns.append((end, text(slot.ticket)))
        start = end - 1
    native = np.zeros((len(ids), layout.num_layers, layout.top_k), dtype=np.int32)
    native[:, list(layout.layer_ids)] = ids
    return Rollout(ends[-1], tuple(turns), text(native.tobytes()))
