"""Arrays over a leased record: they keep the lease, and a whole one pickles as its ticket.

NumPy and torch know nothing of leases, so the lease hangs on the object that owns the
storage: ``LeasedRows`` exports the rows through the array interface and becomes the base
of every array, slice and tensor made of them. The lease drops when the last is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .attached import AttachedArena
    from .leases import HeldLeases


class LeasedRows:
    """Rows ``[tokens, moe_layers, top_k]`` in an arena's heap and the lease that keeps them, for
    NumPy's array interface.
    """

    __slots__ = ("__weakref__", "_lease", "arena", "offset", "tokens")

    def __init__(self, arena: AttachedArena, lease: HeldLeases, offset: int, tokens: int) -> None:
        self.arena = arena  # keeps the mapping
        self._lease = lease
        self.offset = offset
        self.tokens = tokens

    @property
    def address(self) -> int:
        return self.arena.memory.heap_address + self.offset

    @property
    def nbytes(self) -> int:
        return self.tokens * self.arena.memory.description.routes.row_bytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        routes = self.arena.memory.description.routes
        return {
            "version": 3,
            "shape": (self.tokens, *routes.row_shape),
            "typestr": routes.dtype.str,
            "data": (self.address, True),  # True: read-only
        }


class RouteArray(np.ndarray[Any, Any]):
    """Read-only view of a record that pickles as its ticket (about 200 bytes).

    Only a view in the mapping does: it maps the record again where it is loaded, slices
    included. Copies and computed results have no lease and pickle by value, like any array. The
    record must be there until the pickle is loaded: release it when nobody is to load it any more.

    ``torch.from_numpy`` shares its memory, and warns, once in a process, that torch has no
    read-only tensors: writing into one over this memory is a segmentation fault. ``torch`` makes
    the same tensor without the warning.
    """

    _source: tuple[LeasedRows, bytes] | None

    def __array_finalize__(self, parent: Any) -> None:
        source = getattr(parent, "_source", None)
        if source is not None:
            rows = source[0]
            first = self.__array_interface__["data"][0]
            if not rows.address <= first < rows.address + rows.nbytes:
                source = None  # a copy: it needs no lease and must not keep one
        self._source = source

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        plain = np.asarray(array)
        return plain[()] if return_scalar else plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        where = self._place()
        if where is None:  # as NumPy does it, which with protocol 5 need not copy
            return np.asarray(self).__reduce_ex__(protocol)
        ticket, offset = where
        return _map_again, (ticket, offset, self.shape, self.strides, self.dtype.str)

    def torch(self) -> Any:
        """The same view as a tensor; zero-copy, and not to be written into.

        Raises
        ------
        ValueError
            A step is negative, which torch does not have.
        """
        return as_tensor(self)

    def _place(self) -> tuple[bytes, int] | None:
        """Ticket and byte offset of this view, or None if it is not one."""
        if self._source is None:
            return None
        rows, ticket = self._source
        offset = int(self.__array_interface__["data"][0]) - rows.address
        if not self.size or self.dtype.kind == "V":
            return None  # of fields, ``dtype.str`` has no names
        if not _fits(offset, self.shape, self.strides, self.itemsize, rows.nbytes):
            return None
        return ticket, offset


def _fits(
    offset: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, size: int
) -> bool:
    """Whether all items of a view that has some lie within ``size`` bytes."""
    reach = [step * (length - 1) for step, length in zip(strides, shape, strict=True)]
    low = offset + sum(step for step in reach if step < 0)
    high = offset + sum(step for step in reach if step > 0) + itemsize
    return 0 <= low < high <= size


def route_array(rows: LeasedRows, ticket: bytes) -> RouteArray:
    """A ``RouteArray`` over all rows of a lease."""
    array = np.asarray(rows).view(RouteArray)
    array._source = (rows, ticket)
    return array


def _map_again(
    ticket: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str
) -> RouteArray:
    """Unpickle: map the record again and cut out the same view.

    The pickle is untrusted like every ticket: the view must lie within the record.
    """
    from .reader import ShmRouteReader

    with ShmRouteReader(ticket, allow_missing=True) as routes:
        whole = routes.array()
    if not isinstance(whole, RouteArray):
        raise ValueError("the pickle of a route array names no record in shared memory")
    dtype = np.dtype(typestr)
    if dtype.hasobject:
        raise ValueError(f"a route array of dtype {dtype} cannot be mapped")
    flat = whole.reshape(-1).view(np.uint8)
    # NumPy's own check of strides overflows: 8 steps of -2**61 + 13 bytes are 104 bytes to it. And
    # a length of -1 is to it as many items as the buffer has, wherever the strides lead.
    inside = 0 in shape or _fits(offset, shape, strides, dtype.itemsize, flat.nbytes)
    if min(shape, default=1) < 0 or not inside:
        raise ValueError(f"a view of shape {shape}, strides {strides} lies outside its record")
    view = np.ndarray(shape, dtype=dtype, buffer=flat, offset=offset, strides=strides)
    result = view.view(RouteArray)
    result._source = whole._source
    return result


def as_tensor(rows: LeasedRows | npt.NDArray[Any]) -> Any:
    """A torch tensor over the rows; it and its views keep the lease, or the array.

    torch has no read-only tensors: writing into this one is a segmentation fault. Nothing
    is copied. ``uint16`` rows need torch >= 2.3.
    """
    return _tensor(rows, rows.__array_interface__)


def heap_as_tensor(arena: AttachedArena) -> Any:
    """``uint8 [whole words of 8 bytes]`` over an arena's heap, from which rows are copied.

    It keeps the mapping and no lease; what is written above goes for it, too.
    """
    memory = arena.memory
    return _tensor(
        memory,
        {
            "version": 3,
            "shape": (len(memory.heap) & -8,),
            "typestr": "|u1",
            "data": (memory.heap_address, False),
        },
    )


def _tensor(owner: Any, interface: dict[str, Any]) -> Any:
    import torch

    writable: npt.NDArray[Any] = np.asarray(_Writable(owner, interface))
    return torch.from_numpy(writable)


class _Writable:
    """The same memory without the read-only mark, which torch would only warn about."""

    def __init__(self, owner: Any, interface: dict[str, Any]) -> None:
        self._owner = owner
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
