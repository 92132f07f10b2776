"""The GPU kernels: a forward's routes into the table, finished requests' rows out of it.

One launch each, because the scheduler thread pays for launches and not for bytes: as eager
torch the scatter took eight (cast, tag, checks, two index copies, refill). ``table`` has the
torch forms, which run on a CPU and are the reference in tests. Of two scatters one reads the
capture buffer, and the other the routers' own tensors by their addresses (``router_outputs``); of
these a decode graph brings one along, which nobody launches.

Integers that change from step to step are not specialised on, and neither are the alignments
of the inputs: a new combination would compile for 100 ms or more in the middle of serving.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from shmroute.cuda_runtime import current_stream

from .staging import PIECE_FIELDS
from .tags import EPOCH_MASK, EPOCH_SHIFT, FOREIGN_TOKEN, INVALID, POSITION_SHIFT

# Rows that one program of the gather copies.
GATHER_ROWS = 32

_INPUTS = ("captured", "locations", "tokens", "positions")
_GIVEN = ("addresses", "state", "locations", "tokens", "positions")
# What the table's rows are stored as.
_ELEMENTS = {torch.uint8: tl.uint8, torch.int16: tl.int16}


@triton.jit
def _store_token(  # type: ignore[no-untyped-def]
    ids,
    inside,
    location,
    word,
    position,
    rows,
    tags,
    epoch,
    vocabulary,
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
    """Check, cast and store one token's ids ``[LAYERS_PADDED, TOP_K_PADDED]``, and its tag."""
    layer = tl.arange(0, LAYERS_PADDED)
    choice = tl.arange(0, TOP_K_PADDED)
    outside = inside & ((ids < 0) | (ids >= EXPERTS))
    # Columns that are only padding get ids of their own, so that they equal nothing.
    unlike = tl.where(inside, ids, -2 - choice[None, :])
    same = unlike[:, :, None] == unlike[:, None, :]
    same = same & (choice[:, None] != choice[None, :])[None, :, :]
    faults = tl.sum(outside.to(tl.int32)) + tl.sum(same.to(tl.int32))

    known = (location >= 0) & (location < LOCATIONS)
    target = rows + location * (LAYERS * TOP_K) + layer[:, None] * TOP_K + choice[None, :]
    tl.store(target, ids.to(rows.dtype.element_ty), mask=inside & known)

    word = tl.where((word >= 0) & (word < vocabulary), word, FOREIGN)
    tag = (epoch << EPOCH) | (position << POSITION) | word
    tl.store(tags + location, tl.where(faults > 0, INVALID_TAG, tag), mask=known)


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
    """One program a token: out of the capture buffer, and -1 put where the routes were."""
    token = tl.program_id(0).to(tl.int64)
    layer = tl.arange(0, LAYERS_PADDED)
    choice = tl.arange(0, TOP_K_PADDED)
    inside = (layer < LAYERS)[:, None] & (choice < TOP_K)[None, :]
    number = tl.load(layers + layer, mask=layer < LAYERS, other=0)
    source = captured + token * TOKEN_STRIDE + number[:, None] * LAYER_STRIDE + choice[None, :]
    ids = tl.load(source, mask=inside, other=0)
    _store_token(
        ids,
        inside,
        tl.load(locations + token).to(tl.int64),
        tl.load(tokens + token).to(tl.int64),
        tl.load(positions + token).to(tl.int64),
        rows,
        tags,
        epoch.to(tl.int64),
        vocabulary,
        LOCATIONS,
        LAYERS,
        TOP_K,
        EXPERTS,
        LAYERS_PADDED,
        TOP_K_PADDED,
        INVALID_TAG,
        FOREIGN,
        POSITION,
        EPOCH,
    )
    # The element was loaded by this thread: a layer that does not capture next time shows -1.
    tl.store(source, tl.full(ids.shape, -1, tl.int32), mask=inside)


@triton.jit(do_not_specialize_on_alignment=list(_GIVEN))
def _address_scatter_kernel(  # type: ignore[no-untyped-def]
    addresses,
    state,
    locations,
    tokens,
    positions,
    vocabulary: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
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
    """One program a token: out of the routers' own tensors, which are known by address.

    ``state`` is ``int64 [3]``: address of the rows, address of the tags, epoch. Where an address
    is 0 nothing is read or written.
    """
    rows_address, tags_address = tl.load(state), tl.load(state + 1)
    if (tl.load(addresses) != 0) & (rows_address != 0) & (tags_address != 0):
        token = tl.program_id(0).to(tl.int64)
        layer = tl.arange(0, LAYERS_PADDED)
        choice = tl.arange(0, TOP_K_PADDED)
        inside = (layer < LAYERS)[:, None] & (choice < TOP_K)[None, :]
        address = tl.load(addresses + layer, mask=layer < LAYERS, other=0)
        source = address.to(tl.pointer_type(tl.int32))[:, None] + token * COLUMNS + choice[None, :]
        _store_token(
            tl.load(source, mask=inside, other=0),
            inside,
            tl.load(locations + token).to(tl.int64),
            tl.load(tokens + token).to(tl.int64),
            tl.load(positions + token).to(tl.int64),
            rows_address.to(tl.pointer_type(ELEMENT)),
            tags_address.to(tl.pointer_type(tl.int64)),
            tl.load(state + 2),
            vocabulary,
            LOCATIONS,
            LAYERS,
            TOP_K,
            EXPERTS,
            LAYERS_PADDED,
            TOP_K_PADDED,
            INVALID_TAG,
            FOREIGN,
            POSITION,
            EPOCH,
        )


@triton.jit(do_not_specialize=["address", "count", "place", "first_tag"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    address: tl.int64,
    count: tl.int64,
    place: tl.int64,
    first_tag: tl.int64,
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
    """Program (block, piece): ``ROWS`` rows of one piece into staging, and their tags.

    The first piece is in the arguments and the others in ``pieces``, so that one alone, which most
    steps have, reads none of it from the host.
    """
    number = tl.program_id(1)
    if number > 0:
        piece = pieces + number * FIELDS
        address = tl.load(piece)
        count = tl.load(piece + 1)
        place = tl.load(piece + 2)
        first_tag = tl.load(piece + 3)
    first = tl.program_id(0) * ROWS
    if first < count:
        locations = address.to(tl.pointer_type(tl.int32))
        row = first + tl.arange(0, ROWS)
        wanted = row < count
        location = tl.load(locations + row, mask=wanted, other=0).to(tl.int64)
        known = wanted & (location >= 0) & (location < LOCATIONS)
        word = tl.arange(0, WORDS_PADDED)
        inside = known[:, None] & (word < WORDS)[None, :]
        values = tl.load(rows + location[:, None] * WORDS + word[None, :], mask=inside)
        target = place + row.to(tl.int64) * WORDS
        tl.store(staging + target[:, None] + word[None, :], values, mask=inside)
        tag = tl.load(tags + location, mask=known, other=INVALID_TAG)
        tl.store(staged_tags + first_tag + row, tag, mask=wanted)


class Launcher:
    """Launches a kernel past Triton's dispatch, which costs more than the launch itself.

    The dispatch looks at every argument to choose what to compile for. Here that can only
    change with ``key``: the first call with a key goes through it and keeps what it chose.
    After that, device tensors go by their addresses, which may be given as well: of a tensor the
    launch would ask the driver what it points to, one call each. Hooks of Triton's own profiler
    are not called.
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
        stored = _stored_as(len(tags), len(layers), top_k, num_experts)
        self._launch = Launcher(_scatter_kernel, (*strides, *stored), tags.device)

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


class AddressScatter:
    """The scatter that reads the routers' own tensors, for one table.

    A decode graph repeats its launch as it was captured, so what may change until it is replayed
    is read from device memory: ``state``, ``int64 [STATE_FIELDS]``, is the address of the rows,
    that of the tags, and the epoch (``RouteTable.state``).

    Parameters
    ----------
    columns
        Of the routers' tensors; the first ``top_k`` are routes.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        tags: torch.Tensor,
        *,
        layers: int,
        columns: int,
        num_experts: int,
        top_k: int,
        vocabulary: int,
    ) -> None:
        element = _ELEMENTS[rows.dtype]
        stored = _stored_as(len(tags), layers, top_k, num_experts)
        constants = vocabulary, columns, element, *stored
        self._launch = Launcher(_address_scatter_kernel, constants, tags.device)

    def __call__(
        self,
        addresses: torch.Tensor,
        state: torch.Tensor,
        locations: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Launch, or put into a capture, on the current stream.

        Parameters
        ----------
        addresses
            ``int64 [layers]`` on the device, like ``state``: of each layer's ``int32 [at least n,
            columns]``.
        tokens
            ``[n]`` integers; ``locations`` and ``positions`` may be longer. Read when the kernel
            runs.
        """
        if len(tokens):
            key = locations.dtype, tokens.dtype, positions.dtype
            given = addresses, state, locations, tokens, positions
            self._launch(key, (len(tokens), 1, 1), None, *given)


def _stored_as(locations: int, layers: int, top_k: int, num_experts: int) -> tuple[int, ...]:
    """The constants of ``_store_token``."""
    padded = triton.next_power_of_2(layers), triton.next_power_of_2(top_k)
    bits = INVALID, FOREIGN_TOKEN, POSITION_SHIFT, EPOCH_SHIFT
    return locations, layers, top_k, num_experts, *padded, *bits


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
        first: tuple[int, int, int, int],
        pieces: torch.Tensor | int,
        staged_tags: torch.Tensor | int,
        count: int,
        longest: int,
        staging: torch.Tensor | int,
        stream: int | None = None,
    ) -> None:
        """Copy rows and tags of several pieces, each with its own locations, out of the table.

        Parameters
        ----------
        first
            Of the first piece: address of ``int32`` KV locations on the device, number of rows,
            first row's place in ``staging`` in words, first tag's place in ``staged_tags``.
        pieces
            ``int64 [count, 4]``, the same of every piece; the first is not read. Tensors, this and
            the others, at the first call, also addresses later.
        staged_tags
            ``int64``, like ``pieces`` on the device or in page-locked memory.
        longest
            Most rows of any piece.
        staging
            On the device, words of the table.
        stream
            A handle; None: the current one.
        """
        grid = -(-longest // GATHER_ROWS), count, 1
        self._launch(None, grid, stream, *first, pieces, *self._table, staging, staged_tags)
