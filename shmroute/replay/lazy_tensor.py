"""A tensor of routes that has no rows until somebody needs them; for slime.

Problem: slime keeps a sample's routes as an int32 tensor, which it joins, checks, sends, pads and
cuts to a rank's tokens, a copy each time; in the end a rank looks at its own layers' columns.

``LazyRoutes`` is a tensor in all of that code, ``int32 [rows, num_layers, top_k]`` on the CPU, and
holds a list of ``RowRange``s and pads. Cutting and joining rows is arithmetic on that list;
its pickle is tickets. What it selects as one layer can be put on the device::

    routes = torch.cat([earlier[:start], turn])             # turns: no row is read
    local = torch.cat([routes[a:b], routes[c:d], pads])     # a rank's tokens: neither
    layer = local[:, 17]                                    # neither
    layer.materialize_for_routing_replay("forward")         # int32 [tokens, top_k] on the GPU

The layers selected from one tensor (a micro-batch's, of a pipeline stage) are read at once, as
stored, when the first is needed, in one copy instead of one a layer of ``top_k`` bytes a token. The
device lets go of them when each has been used once.

Any other operation sees the rows: they are read and the operation runs on a plain tensor. So do
``numpy``, ``tolist`` and DLPack. What would write into the tensor, or wants its address, is a
``ReplayError``: it has no memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map_only

from ..errors import ReplayError
from . import row_ranges
from .row_ranges import RowRange

aten = torch.ops.aten

#: Rows of records, or rows that are given: ``int32 [rows, num_layers, top_k]``, pads mostly.
Part: TypeAlias = "RowRange | torch.Tensor"


def _rows(part: Part) -> int:
    return part.rows if isinstance(part, RowRange) else len(part)


class DeviceRows:
    """The layers of one lazy tensor that were selected, on the device while they are used.

    A resource in slime's sense: ``close`` ends it, after the training step.

    Parameters
    ----------
    parts
        The tensor's rows.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._selected: set[int] = set()
        self._device: torch.device | None = None
        self._rows: torch.Tensor | None = None
        self._unused: set[int] = set()
        self._columns: dict[int, int] = {}
        self._registered = False

    @property
    def ranges(self) -> list[RowRange]:
        return [part for part in self.parts if isinstance(part, RowRange)]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds on the device now."""
        return 0 if self._rows is None else self._rows.nbytes

    def select(self, layer: int) -> None:
        """Decoder layer ``layer`` will be read."""
        self._selected.add(layer)
        self._rows = None

    def read(self, layer: int, device: torch.device) -> torch.Tensor:
        """``int32 [rows, top_k]`` of one layer that was selected."""
        if self._rows is None or self._device != device:
            self._rows, self._device = self._read_selected(device), device
            self._unused = set(self._selected)
        rows = self._rows[:, self._columns[layer]].to(torch.int32)
        self._unused.discard(layer)
        if not self._unused:
            self._rows = None
        return rows

    def register(self) -> None:
        """Have slime close this with the others, once."""
        if self._registered:
            return
        from slime.utils.routing_replay import RoutingReplay

        RoutingReplay.register_lazy_resource(self)
        self._registered = True

    def begin_pass(self, release_stage: str) -> None:
        """Another pass over the layers begins: what the one before left is let go of."""
        self._rows = None

    def close(self) -> None:
        """The training step is over: let go of the device's memory and release the records."""
        self._rows = None
        row_ranges.release_all(self.ranges)
        self.parts = ()

    def _read_selected(self, device: torch.device) -> torch.Tensor:
        """Selected layers of all parts on the device, as stored; columns in their order."""
        layers = sorted(self._selected)
        self._columns = {layer: column for column, layer in enumerate(layers)}
        if not self.parts:
            raise ReplayError("these routes were released after their training step")
        begins = [0, *itertools.accumulate(map(_rows, self.parts))]
        places = list(zip(begins, self.parts, strict=False))
        read = [(at, part) for at, part in places if isinstance(part, RowRange)]
        given = [(at, part) for at, part in places if isinstance(part, torch.Tensor)]
        if not read:  # a rank whose tokens are all padding
            return torch.cat([part[:, layers] for _, part in given]).to(device)
        rows = row_ranges.read_placed(read, rows=begins[-1], device=device, layers=layers)
        for at, part in given:
            rows[at : at + len(part)] = part[:, layers].to(device=device, dtype=rows.dtype)
        return rows


class LazyRoutes(torch.Tensor):
    """``int32 [rows, num_layers, top_k]`` whose rows are read when they are needed.

    Also ``[rows * num_layers * top_k]`` (flat) and ``[rows, top_k]`` (one layer).
    """

    _parts: tuple[Part, ...]
    _row: tuple[int, int]
    _layer: int | None
    _resource: DeviceRows

    @staticmethod
    def __new__(
        cls,
        parts: Sequence[Part],
        row: tuple[int, int],
        *,
        flat: bool = False,
        layer: int | None = None,
        resource: DeviceRows | None = None,
    ) -> LazyRoutes:
        rows = sum(map(_rows, parts))
        shape: tuple[int, ...] = (rows, *row) if layer is None else (rows, row[1])
        if flat:
            shape = (math.prod(shape),)
        made: LazyRoutes = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.int32)
        made._parts, made._row, made._layer = tuple(parts), row, layer
        made._resource = resource or DeviceRows(parts)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def materialize_for_routing_replay(self, stage: str) -> torch.Tensor:
        """``int32 [rows, top_k]`` of this layer, on the current CUDA device if there is one.

        Parameters
        ----------
        stage
            "forward" or "backward"; both give the same.

        Raises
        ------
        ReplayError
            The engine's model does not route in this layer, or the training step is over.
        ShmRouteError
            What ``shmroute.read_batch`` raises.
        """
        if self._layer is None:
            raise ReplayError(f"routes of shape {list(self.shape)} are not those of one layer")
        self._resource.register()
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        return self._resource.read(self._layer, device)

    @property
    def resource(self) -> DeviceRows:
        """What the layers that are selected from one tensor share."""
        return self._resource

    def plain(self) -> torch.Tensor:
        """The rows, in memory: an ordinary tensor of the same shape."""
        rows = [self._plain(part) for part in self._parts]
        return torch.cat(rows).reshape(self.shape) if rows else torch.zeros(self.shape).int()

    def _plain(self, part: Part) -> torch.Tensor:
        layers, top_k = self._row
        if not isinstance(part, RowRange):
            return part if self._layer is None else part[:, self._layer]
        if self._layer is None:
            return torch.from_numpy(row_ranges.native([part], num_layers=layers, top_k=top_k))
        return torch.from_numpy(row_ranges.one_layer(part, self._layer))

    def numpy(self, *, force: bool = False) -> npt.NDArray[np.int32]:
        """The rows as an array, a copy."""
        rows: npt.NDArray[np.int32] = self.plain().numpy(force=force)
        return rows

    def __array__(self, dtype: npt.DTypeLike = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("routes are read into new memory: only a copy can be had")
        rows = self.numpy()
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def tolist(self) -> list[Any]:
        """The rows as lists, a copy."""
        rows: list[Any] = self.plain().tolist()
        return rows

    def __dlpack__(self, **wanted: Any) -> Any:
        if wanted.get("copy") is False:
            raise BufferError("routes are read into new memory: only a copy can be had")
        return self.plain().__dlpack__(**wanted)

    def __reduce_ex__(self, protocol: Any) -> Any:
        flat = self.dim() == 1
        if self._layer is not None:
            return self.plain().__reduce_ex__(protocol)
        return _unpickle, (self._parts, self._row, flat)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _read_only("assignment")  # it would be to a copy

    # Torch's own of these work on memory at address 0.

    def apply_(self, callable: Any) -> Any:
        raise _read_only("apply_")

    def map_(self, tensor: Any, callable: Any) -> Any:
        raise _read_only("map_")

    def share_memory_(self) -> Any:
        raise _no_memory("share_memory_")

    def data_ptr(self) -> int:
        raise _no_memory("data_ptr")

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyRoutes:
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"<routes {list(self.shape)} in {len(self._parts)} parts, not read>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lazy = _LAZY.get(func)
        found = lazy(*args, **(kwargs or {})) if lazy else NotImplemented
        if found is not NotImplemented:
            return found
        if func._schema.is_mutable:
            raise _read_only(func)
        plain = tree_map_only(LazyRoutes, LazyRoutes.plain, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def _read_only(what: Any) -> ReplayError:
    return ReplayError(f"{what} would change routes, which are read-only: use plain()")


def _no_memory(what: str) -> ReplayError:
    return ReplayError(
        f"{what} of routes that have no memory of their own: send them to other processes as they "
        f"are, they travel as tickets, or use plain().{what}()"
    )


def _unpickle(parts: Sequence[Part], row: tuple[int, int], flat: bool) -> LazyRoutes:
    return LazyRoutes(parts, row, flat=flat)


# -- what is arithmetic on the list; NotImplemented: the rows are needed ------------------------


def _same(routes: LazyRoutes, *args: Any, **kwargs: Any) -> LazyRoutes:
    # An object of its own: torch refuses a view that is its base.
    return LazyRoutes(
        routes._parts,
        routes._row,
        flat=routes.dim() == 1,
        layer=routes._layer,
        resource=routes._resource,
    )


def _to_copy(routes: LazyRoutes, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    moved = torch.device(device or "cpu").type != "cpu"
    return NotImplemented if moved or dtype not in (None, torch.int32) else _same(routes)


def _view(routes: LazyRoutes, shape: Sequence[int]) -> Any:
    if routes._layer is not None:
        return NotImplemented
    whole = (sum(map(_rows, routes._parts)), *routes._row)
    wanted = list(shape)
    if -1 in wanted:
        wanted[wanted.index(-1)] = routes.numel() // -math.prod(wanted) if math.prod(wanted) else 0
    if tuple(wanted) == whole:
        return LazyRoutes(routes._parts, routes._row)
    if wanted == [math.prod(whole)]:
        return LazyRoutes(routes._parts, routes._row, flat=True)
    return NotImplemented


def _slice(
    routes: LazyRoutes,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    first, last, _ = slice(start, end).indices(routes.shape[dim])
    if step == 1 and (first, last) == (0, routes.shape[dim]):
        return _same(routes)
    if routes.dim() != 3 or dim != 0 or step != 1:
        return NotImplemented
    return LazyRoutes(_cut(routes._parts, first, max(first, last)), routes._row)


def _select(routes: LazyRoutes, dim: int, index: int) -> Any:
    if routes.dim() != 3 or dim % 3 != 1:
        return NotImplemented
    layer = index % routes.shape[1]
    routes._resource.select(layer)
    return LazyRoutes(routes._parts, routes._row, layer=layer, resource=routes._resource)


def _split(routes: LazyRoutes, size: int, dim: int = 0) -> Any:
    if routes.dim() != 3 or dim:
        return NotImplemented
    return [_slice(routes, 0, at, at + size) for at in range(0, max(len(routes), 1), size)]


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    parts: list[Part] = []
    row = next(each._row for each in tensors if isinstance(each, LazyRoutes))
    for each in tensors:
        if dim or each.dim() != 3 or tuple(each.shape[1:]) != row or each.dtype != torch.int32:
            return NotImplemented
        parts += each._parts if isinstance(each, LazyRoutes) else [each]
    return LazyRoutes([part for part in parts if _rows(part)], row)


def _cut(parts: Iterable[Part], first: int, end: int) -> list[Part]:
    kept: list[Part] = []
    at = 0
    for part in parts:
        low, high = max(first - at, 0), min(end - at, _rows(part))
        if low < high:
            if isinstance(part, RowRange):
                kept += row_ranges.cut([part], low, high)
            else:
                kept.append(part[low:high])
        at += _rows(part)
    return kept


_LAZY: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten._to_copy.default: _to_copy,
    aten.view.default: _view,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.cat.default: _cat,
}
