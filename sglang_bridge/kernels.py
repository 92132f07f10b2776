"""The two GPU kernels: a forward's routes into the table, finished requests' rows out of it.

One launch each, because the scheduler thread pays for launches and not for bytes: as eager
torch the scatter took eight (cast, tag, checks, two index copies, refill). ``table`` has the
torch forms, which run on a CPU and are the reference in tests.

Integers that change from step to step are not specialised on, and neither are the alignments
of the inputs: a new combination would compile for 100 ms or more in the middle of serving.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .tags import EPOCH_MASK, EPOCH_SHIFT, FOREIGN_TOKEN, INVALID, POSITION_SHIFT

# Rows that one program of the gather copies.
GATHER_ROWS = 32
# What the gather is told of each piece: address of its KV locations, rows, where they go.
DESCRIPTOR_FIELDS = 4

_INPUTS = ("captured", "locations", "tokens", "positions")


@triton.jit(
    do_not_specialize=["epoch", "vocabulary"],
    do_not_specialize_on_alignment=list(_INPUTS),
)
def _scatter_kernel(  # type: ignore[no-untyped-def]
    captured,
    locations,
    tokens,
    positions,
    layers,
    rows,
    tags,
    epoch,
    vocabulary,
    TOKEN_STRIDE: tl.constexpr,
    LAYER_STRIDE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    LAYERS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    LAYERS_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    INVALID_TAG: tl.constexpr,
    FOREIGN: tl.constexpr,
    POSITION: tl.constexpr,
    EPOCH: tl.constexpr,
):
    """One program a token: cast, check, tag, store, and put -1 where the routes were."""
    token = tl.program_id(0).to(tl.int64)
    layer = tl.arange(0, LAYERS_PADDED)
    choice = tl.arange(0, TOP_K_PADDED)
    inside = (layer < LAYERS)[:, None] & (choice < TOP_K)[None, :]
    number = tl.load(layers + layer, mask=layer < LAYERS, other=0)
    source = captured + token * TOKEN_STRIDE + number[:, None] * LAYER_STRIDE + choice[None, :]
    ids = tl.load(source, mask=inside, other=0)

    outside = inside & ((ids < 0) | (ids >= EXPERTS))
    # Columns that are only padding get ids of their own, so that they equal nothing.
    unlike = tl.where(inside, ids, -2 - choice[None, :])
    same = unlike[:, :, None] == unlike[:, None, :]
    same = same & (choice[:, None] != choice[None, :])[None, :, :]
    faults = tl.sum(outside.to(tl.int32)) + tl.sum(same.to(tl.int32))

    location = tl.load(locations + token).to(tl.int64)
    known = (location >= 0) & (location < LOCATIONS)
    target = rows + location * (LAYERS * TOP_K) + layer[:, None] * TOP_K + choice[None, :]
    tl.store(target, ids.to(rows.dtype.element_ty), mask=inside & known)

    word = tl.load(tokens + token).to(tl.int64)
    word = tl.where((word >= 0) & (word < vocabulary), word, FOREIGN)
    position = tl.load(positions + token).to(tl.int64)
    tag = (epoch.to(tl.int64) << EPOCH) | (position << POSITION) | word
    tl.store(tags + location, tl.where(faults > 0, INVALID_TAG, tag), mask=known)
    # The element was loaded by this thread: a layer that does not capture next time shows -1.
    tl.store(source, tl.full(ids.shape, -1, tl.int32), mask=inside)


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    pieces,
    rows,
    tags,
    staging,
    staged_tags,
    LOCATIONS: tl.constexpr,
    WORDS: tl.constexpr,
    WORDS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    FIELDS: tl.constexpr,
    INVALID_TAG: tl.constexpr,
):
    """Program (block, piece): ``ROWS`` rows of one piece, and their tags, into staging."""
    piece = pieces + tl.program_id(1) * FIELDS
    count = tl.load(piece + 1)
    first = tl.program_id(0) * ROWS
    if first < count:
        locations = tl.load(piece).to(tl.pointer_type(tl.int32))
        row = first + tl.arange(0, ROWS)
        wanted = row < count
        location = tl.load(locations + row, mask=wanted, other=0).to(tl.int64)
        known = wanted & (location >= 0) & (location < LOCATIONS)
        word = tl.arange(0, WORDS_PADDED)
        inside = known[:, None] & (word < WORDS)[None, :]
        values = tl.load(rows + location[:, None] * WORDS + word[None, :], mask=inside)
        target = tl.load(piece + 2) + row.to(tl.int64) * WORDS
        tl.store(staging + target[:, None] + word[None, :], values, mask=inside)
        tag = tl.load(tags + location, mask=known, other=INVALID_TAG)
        tl.store(staged_tags + tl.load(piece + 3) + row, tag, mask=wanted)


def scatter(
    captured: torch.Tensor,
    locations: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    layers: torch.Tensor,
    rows: torch.Tensor,
    tags: torch.Tensor,
    *,
    epoch: int,
    vocabulary: int,
    num_experts: int,
    top_k: int,
) -> None:
    """Store a forward's routes into the table and refill the capture buffer with -1.

    Parameters
    ----------
    captured
        ``int32 [n, all layers, columns]``, a view into the capture buffer; the first
        ``top_k`` columns are routes.
    locations, tokens, positions
        ``[n]`` integers, contiguous.
    layers
        ``int64 [moe_layers]``: which layers of ``captured`` are stored.
    rows, tags
        The table; ``rows`` may be page-locked host memory.
    """
    count = len(tokens)
    if not count:
        return
    _scatter_kernel[(count,)](
        captured,
        locations,
        tokens,
        positions,
        layers,
        rows,
        tags,
        epoch & EPOCH_MASK,  # as an i32, whatever its value: another type would compile anew
        vocabulary,
        TOKEN_STRIDE=captured.stride(0),
        LAYER_STRIDE=captured.stride(1),
        LOCATIONS=len(tags),
        LAYERS=len(layers),
        TOP_K=top_k,
        EXPERTS=num_experts,
        LAYERS_PADDED=triton.next_power_of_2(len(layers)),
        TOP_K_PADDED=triton.next_power_of_2(top_k),
        INVALID_TAG=INVALID,
        FOREIGN=FOREIGN_TOKEN,
        POSITION=POSITION_SHIFT,
        EPOCH=EPOCH_SHIFT,
        num_warps=4,
    )


def gather(
    pieces: torch.Tensor,
    longest: int,
    rows: torch.Tensor,
    tags: torch.Tensor,
    staging: torch.Tensor,
    staged_tags: torch.Tensor,
) -> None:
    """Copy rows and tags of several pieces, each with its own KV locations, into staging.

    Parameters
    ----------
    pieces
        ``int64 [n, 4]`` on the device: address of ``int32`` KV locations, number of rows,
        first row's place in ``staging`` in words, first tag's place in ``staged_tags``.
    longest
        Most rows of any piece.
    rows, staging
        Table rows ``[locations, words]`` and ``[any]``, in words of the same dtype.
    """
    words = rows.shape[1]
    grid: Any = (triton.cdiv(longest, GATHER_ROWS), len(pieces))
    _gather_kernel[grid](
        pieces,
        rows,
        tags,
        staging,
        staged_tags,
        LOCATIONS=len(tags),
        WORDS=words,
        WORDS_PADDED=triton.next_power_of_2(words),
        ROWS=GATHER_ROWS,
        FIELDS=DESCRIPTOR_FIELDS,
        INVALID_TAG=INVALID,
        num_warps=4,
    )
