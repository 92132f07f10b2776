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

from .cuda_driver import current_stream
from .staging import PIECE_FIELDS
from .tags import EPOCH_MASK, EPOCH_SHIFT, FOREIGN_TOKEN, INVALID, POSITION_SHIFT

# Rows that one program of the gather copies.
GATHER_ROWS = 32

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


class Launcher:
    """Launches a kernel past Triton's dispatch, which costs more than the launch itself.

    The dispatch looks at every argument to choose what to compile for. Here that can only
    change with ``key``: the first call with a key goes through it and keeps what it chose.
    After that, device tensors go by their addresses: of a tensor the launch would ask the
    driver what it points to, one call each. Hooks of Triton's own profiler are not called.
    """

    def __init__(self, kernel: Any, constants: tuple[Any, ...], device: torch.device) -> None:
        self._kernel = kernel
        self._constants = constants
        self._device = device.index
        self._chosen: dict[Any, tuple[Any, ...]] = {}

    def __call__(
        self, key: Any, grid: tuple[int, int, int], stream: int | None, *arguments: Any
    ) -> None:
        """Launch with positional arguments, the constants behind them.

        ``stream`` is a handle; None: the current one.
        """
        chosen = self._chosen.get(key)
        if chosen is None:
            self._choose(key, grid, stream, arguments)
            return
        run, function, metadata, _ = chosen
        handle = current_stream(self._device) if stream is None else stream
        given = [
            one.data_ptr() if isinstance(one, torch.Tensor) and one.is_cuda else one
            for one in arguments
        ]
        run(*grid, handle, function, metadata, None, None, None, *given, *self._constants)

    def _choose(
        self, key: Any, grid: tuple[int, int, int], stream: int | None, arguments: tuple[Any, ...]
    ) -> None:
        on = None if stream is None else torch.cuda.ExternalStream(stream, self._device)
        with torch.cuda.stream(on):
            compiled = self._kernel[grid](*arguments, *self._constants, num_warps=4)
        if compiled is not None:  # Triton's interpreter compiles nothing
            parts = compiled.run, compiled.function, compiled.packed_metadata
            self._chosen[key] = (*parts, compiled)  # which unloads its module when it goes


class Scatter:
    """The scatter for one table.

    Parameters
    ----------
    rows, tags
        The table; ``rows`` may be page-locked host memory.
    layers
        ``int64 [moe_layers]``: which layers of the capture buffer are stored.
    strides
        Of the capture buffer, in elements: from token to token and from layer to layer.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        tags: torch.Tensor,
        layers: torch.Tensor,
        *,
        strides: tuple[int, int],
        num_experts: int,
        top_k: int,
        vocabulary: int,
    ) -> None:
        self._fixed = layers, rows, tags
        self._vocabulary = vocabulary
        count = len(layers)
        padded = triton.next_power_of_2(count), triton.next_power_of_2(top_k)
        constants = (*strides, len(tags), count, top_k, num_experts, *padded)
        bits = INVALID, FOREIGN_TOKEN, POSITION_SHIFT, EPOCH_SHIFT
        self._launch = Launcher(_scatter_kernel, (*constants, *bits), tags.device)

    def __call__(
        self,
        captured: torch.Tensor,
        locations: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        epoch: int,
    ) -> None:
        """Store a forward's routes and put -1 where they were, on the current stream.

        Parameters
        ----------
        captured
            ``int32 [at least n, all layers, columns]``; the first ``top_k`` are routes.
        tokens
            ``[n]`` integers; ``locations`` and ``positions`` may be longer.
        """
        count = len(tokens)
        if count:
            key = locations.dtype, tokens.dtype, positions.dtype
            # The epoch stays an i32 whatever its value: another type would compile anew.
            number = epoch & EPOCH_MASK
            given = captured, locations, tokens, positions, *self._fixed
            self._launch(key, (count, 1, 1), None, *given, number, self._vocabulary)


class Gather:
    """The gather out of one table.

    Parameters
    ----------
    rows
        ``[locations, words]`` of the table, in words.
    """

    def __init__(self, rows: torch.Tensor, tags: torch.Tensor) -> None:
        self._table = rows, tags
        words = rows.shape[1]
        shape = len(tags), words, triton.next_power_of_2(words), GATHER_ROWS
        self._launch = Launcher(_gather_kernel, (*shape, PIECE_FIELDS, INVALID), tags.device)

    def __call__(
        self,
        pieces: torch.Tensor,
        count: int,
        longest: int,
        staging: torch.Tensor,
        staged_tags: torch.Tensor,
        stream: int | None = None,
    ) -> None:
        """Copy rows and tags of several pieces, each with its own locations, into staging.

        Parameters
        ----------
        pieces
            ``int64 [at least count, 4]`` on the device: address of ``int32`` KV locations,
            number of rows, first row's place in ``staging`` in words, first tag's place in
            ``staged_tags``.
        longest
            Most rows of any piece.
        stream
            A handle; None: the current one.
        """
        grid = triton.cdiv(longest, GATHER_ROWS), count, 1
        self._launch(None, grid, stream, pieces, *self._table, staging, staged_tags)
