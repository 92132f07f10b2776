"""``read_batch``: the routes of a batch of samples, packed into one tensor where they are used.

Protocol
    1 open every record: each under its lease before anything is copied
    2 check that they fit together      3 copy and widen, see ``transfer``
    4 let go: at once where the copies are done, else when the GPU has passed them

An error in 1 to 3 lets go of every record: after copies that were under way already, and
without waiting for the error's traceback to be dropped.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from . import selection, views
from .errors import LayoutMismatch
from .reader import ShmRouteReader
from .releasing import as_many

if TYPE_CHECKING:
    import torch

_TOKENS_MAX = (1 << 31) - 1  # cu_seqlens is int32


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RouteBatch:
    """Routes of several records, one behind the other.

    Attributes
    ----------
    rows
        ``[sum(tokens), layers, top_k]``, contiguous.
    cu_seqlens
        ``int32 [records + 1]`` on the same device: record ``i`` has rows
        ``[cu_seqlens[i], cu_seqlens[i + 1])``.
    rids, starts
        Of each record; its first row belongs to token ``starts[i]``.
    layer_ids
        Global 0-based decoder-layer numbers of axis 1.
    missing
        Ranges ``[first, end)`` of ``rows`` that must not be used.
    """

    rows: torch.Tensor
    cu_seqlens: torch.Tensor
    rids: tuple[str, ...]
    starts: tuple[int, ...]
    layer_ids: tuple[int, ...]
    missing: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.rids)


def read_batch(
    sources: Any,
    *,
    layers: slice | Iterable[int] | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    arena: str | None = None,
    timeout: float = 5.0,
    allow_missing: bool = False,
) -> RouteBatch:
    """Read the routes of several records into one packed tensor. Needs torch.

    To a CUDA device the rows cross as they are stored and are widened there. The work is
    queued on the device's current stream and may still run on return; what that stream does
    next sees it done. The records are let go of when it is done, and may be released at once.

    The first read from an arena to a GPU has this process's mapping of it page-locked in the
    background. Until then, and where the driver or a memory limit refuses (a warning says so),
    copies go through a small page-locked buffer, at the speed of the CPU.

    Parameters
    ----------
    sources
        What ``ShmRouteReader`` takes, several or one.
    layers
        Positions on axis 1, a slice or a sequence (a pipeline stage's); no other layer's bytes
        are read. None: all.
    device
        None: the CPU.
    dtype
        ``torch.int32`` or ``torch.int64``; None: as stored, uint8 or uint16.
    arena
        See ``ShmRouteReader``.
    timeout
        Seconds to wait for records that are not there or not sealed yet, all together.
    allow_missing
        Take incomplete records; ``missing`` of the batch says which rows must not be used.

    Raises
    ------
    LayoutMismatch
        The records are of models with other layers, experts or top-k.
    ValueError
        No source, the same record twice, or layers, a device or a dtype that cannot be.
    ShmRouteError
        What ``ShmRouteReader`` raises for the first source that cannot be opened.

    Examples
    --------
    >>> batch = shmroute.read_batch(                       # doctest: +SKIP
    ...     tickets, layers=slice(0, 12), device="cuda", dtype=torch.int64
    ... )
    """
    where = _device(device)
    _check_dtype(dtype)
    opened: list[ShmRouteReader] = []
    try:
        _open_all(opened, sources, arena, time.monotonic() + timeout, allow_missing)
        _check_alike(opened)
        return _packed(opened, layers, where, dtype)
    except BaseException as error:
        # Frames of the traceback hold views, which hold leases, for as long as it is kept.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        for routes in opened:
            routes.close()


def tensor_of(routes: ShmRouteReader, device: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """See ``ShmRouteReader.torch``."""
    from . import transfer

    where = _device(device)
    _check_dtype(dtype)
    if where.type == "cpu" and dtype is None:
        return routes.torch()
    everything = selection.runs(range(len(routes.layer_ids)))
    return transfer.pack([routes.stored()], everything, device=where, dtype=dtype)


def _open_all(
    opened: list[ShmRouteReader],
    sources: Any,
    arena: str | None,
    deadline: float,
    allow_missing: bool,
) -> None:
    for source in as_many(sources):
        left = max(0.0, deadline - time.monotonic())
        opened.append(
            ShmRouteReader(source, arena=arena, timeout=left, allow_missing=allow_missing)
        )
    if not opened:
        raise ValueError("a batch of no sources: of what shape would it be?")


def _check_alike(opened: Sequence[ShmRouteReader]) -> None:
    model = _geometry(opened[0])
    seen: dict[Any, int] = {}
    for index, routes in enumerate(opened):
        if _geometry(routes) != model:
            raise LayoutMismatch(
                f"source 0 (rid {opened[0].rid!r}) has {_described(opened[0])}, source {index} "
                f"(rid {routes.rid!r}) has {_described(routes)}: read each model's records in a "
                "batch of their own"
            )
        earlier = seen.setdefault(_identity(routes), index)
        if earlier != index:
            raise ValueError(
                f"sources {earlier} and {index} are the same record, of rid {routes.rid!r}: read "
                "it once and index the result"
            )
    tokens = sum(routes.tokens for routes in opened)
    if tokens > _TOKENS_MAX:
        raise ValueError(f"{tokens} rows in a batch; cu_seqlens (int32) counts to {_TOKENS_MAX}")


def _geometry(routes: ShmRouteReader) -> tuple[int, int, tuple[int, ...]]:
    # Not the model's name, which engines may take from different paths.
    return routes.layout.num_experts, routes.layout.top_k, routes.layer_ids


def _described(routes: ShmRouteReader) -> str:
    experts, top_k, layer_ids = _geometry(routes)
    return f"top-{top_k} of {experts} experts in {len(layer_ids)} layers {list(layer_ids)[:64]}"


def _identity(routes: ShmRouteReader) -> Any:
    rows = routes.stored()
    if isinstance(rows, views.LeasedRows):
        return rows.address  # no other record has it while we hold this one
    return routes.rid, routes.start, routes.tokens


def _packed(
    opened: Sequence[ShmRouteReader],
    layers: slice | Iterable[int] | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> RouteBatch:
    import torch

    from . import transfer

    layer_ids = opened[0].layer_ids
    chosen = selection.positions(layers, len(layer_ids))
    first_rows = [0, *itertools.accumulate(routes.tokens for routes in opened)]
    rows = transfer.pack(
        [routes.stored() for routes in opened],
        selection.runs(chosen),
        device=device,
        dtype=dtype,
    )
    return RouteBatch(
        rows=rows,
        # Not ``torch.tensor(..., device=device)``, which waits for the stream.
        cu_seqlens=torch.tensor(first_rows, dtype=torch.int32).to(device, non_blocking=True),
        rids=tuple(routes.rid for routes in opened),
        starts=tuple(routes.start for routes in opened),
        layer_ids=tuple(layer_ids[position] for position in chosen),
        missing=tuple(
            (at + first, at + end)
            for at, routes in zip(first_rows, opened, strict=False)
            for first, end in routes.missing
        ),
    )


def _device(device: Any) -> torch.device:
    import torch

    where = torch.device("cpu" if device is None else device)
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device {where}: routes are read to the CPU or to a CUDA device")
    return where


def _check_dtype(dtype: torch.dtype | None) -> None:
    import torch

    if dtype not in (None, torch.int32, torch.int64):
        raise ValueError(f"dtype {dtype}: torch.int32, torch.int64, or None for as stored")
