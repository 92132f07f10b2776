"""What a trainer takes of a record: positions on an axis, as runs of neighbours."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Positions ``[first, end)`` of a source, which begin at ``to`` in the result."""

    to: int
    first: int
    end: int


def positions(layers: slice | Iterable[int] | None, count: int) -> Sequence[int]:
    """The layers that a user asks for, as positions among ``count`` that there are.

    Raises
    ------
    ValueError
        None at all, one twice, one that is not there, or what is no integer. A slice may not
        reach beyond the end, as Python's may: a pipeline stage would get fewer layers than it has.
    """
    try:
        chosen = _chosen(layers, count)
    except TypeError as error:
        raise ValueError(f"layers {layers}: give integers, 0 to {count - 1}: {error}") from error
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers {layers} are none at all, or hold one twice: {list(chosen)}")
    return chosen


def _chosen(layers: slice | Iterable[int] | None, count: int) -> Sequence[int]:
    if layers is None:
        return range(count)
    if isinstance(layers, slice):
        bounds = [bound for bound in (layers.start, layers.stop) if bound is not None]
        if any(not -count <= operator.index(bound) <= count for bound in bounds):
            raise ValueError(f"layers {layers} of records with {count} MoE layers")
        if layers.step == 0:
            raise ValueError(f"layers {layers} of {count}: a step of 0 leads nowhere")
        return range(count)[layers]
    if isinstance(layers, (set, frozenset)):
        raise ValueError(f"layers {layers} have no order: give a list")
    if isinstance(layers, int):
        raise ValueError(f"layers {layers}: give several positions, or [{layers}] for one")
    wanted = list(layers)
    if any(map(_is_bool, wanted)):
        # As integers they would be layers 0 and 1.
        raise ValueError(f"layers {layers} are a mask: give positions, 0 to {count - 1}")
    asked = [operator.index(position) for position in wanted]
    if any(not -count <= position < count for position in asked):
        raise ValueError(f"layers {asked} of records with {count} MoE layers")
    return [position % count for position in asked]


def _is_bool(position: object) -> bool:
    return isinstance(position, bool) or "bool" in str(getattr(position, "dtype", ""))


def runs(chosen: Sequence[int]) -> tuple[Run, ...]:
    """Join positions that follow one another."""
    if isinstance(chosen, range) and chosen.step == 1:  # all layers, a pipeline stage's: nearly all
        return (Run(0, chosen.start, chosen.stop),)
    firsts = [to for to, at in enumerate(chosen) if to == 0 or chosen[to - 1] != at - 1]
    ends = [*firsts[1:], len(chosen)]
    return tuple(
        [Run(to, chosen[to], chosen[end - 1] + 1) for to, end in zip(firsts, ends, strict=True)]
    )
