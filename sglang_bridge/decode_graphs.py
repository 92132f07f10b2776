"""A decode graph's routes, written into the capture buffer by one kernel instead of one a layer.

Problem: SGLang copies each MoE layer's ``topk_ids`` into the capture buffer as soon as the router
has made them. In a decode graph of 48 layers these are 48 copies of a few KB, each as long as a
launch, at every step.

Approach: while a decode graph is captured, the layers' tensors are only kept. At the last layer
one kernel is captured that reads all of them by their addresses. What makes that right:

    the addresses are the graph's    a graph runs with the memory it was captured with. Graphs
                                     share one pool, but one graph's tensors are there while it
                                     runs
    nothing else is put there        the tensors are referenced until the kernel is captured, so
                                     the pool gives their memory to no later layer
    nobody changes them              between the router and the last layer SGLang writes into
                                     ``topk_ids`` only where rows are padding. Where more of it
                                     could be rewritten or reused, decode steps are captured layer
                                     by layer (``versions.keeps_routes_in_decode_graphs``), and
                                     shadow mode compares with copies taken at once
    an address is there in time      the kernel reads addresses from device memory; they are put
                                     there before the first forward after the capture, not during
                                     it. A zero is no address, and nothing is read

Only what one stream capture holds from the first MoE layer to the last is kept; everything else
(prefill, eager decode, a tensor of another form) is copied at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

_GRAPHS_MAX = 1024
_ROWS = 32  # that one program copies, of one layer


@triton.jit(do_not_specialize=["count"])
def _write_kernel(  # type: ignore[no-untyped-def]
    addresses,
    numbers,
    buffer,
    count,
    TOKEN_STRIDE: tl.constexpr,
    LAYER_STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (block, layer): ``ROWS`` rows of one layer into the capture buffer."""
    layer = tl.program_id(1)
    address = tl.load(addresses + layer)
    if address != 0:
        source = address.to(tl.pointer_type(tl.int32))
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS_PADDED)
        inside = (row < count)[:, None] & (column < COLUMNS)[None, :]
        ids = tl.load(source + row[:, None] * COLUMNS + column[None, :], mask=inside)
        number = tl.load(numbers + layer)
        target = buffer + row.to(tl.int64)[:, None] * TOKEN_STRIDE + number * LAYER_STRIDE
        tl.store(target + column[None, :], ids, mask=inside)


class DecodeGraphs:
    """The routers' outputs of decode graphs on one device.

    Parameters
    ----------
    buffer
        ``int32 [rows, all layers, columns]``: the capture buffer, on a CUDA device.
    layer_ids
        Numbers of the MoE layers, in the order in which they run.
    capturing
        Whether a decode graph is being captured on the calling thread's stream.
    """

    def __init__(
        self, buffer: torch.Tensor, layer_ids: Sequence[int], capturing: Callable[[], bool]
    ) -> None:
        self._buffer, self._capturing = buffer, capturing
        self._place = {number: at for at, number in enumerate(layer_ids)}
        device = buffer.device
        self._numbers = torch.tensor(list(layer_ids), dtype=torch.int64, device=device)
        shape = _GRAPHS_MAX, len(layer_ids)
        self._addresses = torch.zeros(shape, dtype=torch.int64, device=device)
        self._known = torch.zeros(shape, dtype=torch.int64)
        self._graphs, self._there = 0, 0
        self._kept: dict[int, torch.Tensor] = {}
        # The first launch compiles, which no stream capture may contain.
        self._write(self._addresses[0], 1)

    def keep(self, layer_id: int, ids: torch.Tensor) -> bool:
        """Take a layer's routes while a graph is captured; False: copy them at once.

        Parameters
        ----------
        ids
            ``int32 [tokens, columns]``, contiguous.
        """
        place = self._place.get(layer_id)
        if place is None or not self._capturing():
            return False
        if any(place <= earlier for earlier in self._kept):
            self._kept.clear()  # of a capture that was given up
        fits = self._fits(ids)
        if fits:
            self._kept[place] = ids
        if place == len(self._place) - 1:
            self._write_kept()
        return fits

    def _fits(self, ids: torch.Tensor) -> bool:
        same = not self._kept or len(ids) == len(next(iter(self._kept.values())))
        return (
            self._graphs < _GRAPHS_MAX
            and same
            and ids.dtype == torch.int32
            and ids.shape[1] == self._buffer.shape[2]
            and ids.is_contiguous()
        )

    def _write_kept(self) -> None:
        """Capture the kernel for what was kept, and let the pool have it behind that."""
        kept, self._kept = self._kept, {}
        if not kept:
            return
        for place, ids in kept.items():
            self._known[self._graphs, place] = ids.data_ptr()
        self._write(self._addresses[self._graphs], len(next(iter(kept.values()))))
        self._graphs += 1

    def _write(self, addresses: torch.Tensor, count: int) -> None:
        token, layer, _ = self._buffer.stride()
        columns = self._buffer.shape[2]
        shape = token, layer, columns, triton.next_power_of_2(columns), _ROWS
        grid = triton.cdiv(count, _ROWS), len(addresses)
        _write_kernel[grid](addresses, self._numbers, self._buffer, count, *shape)

    def before_forward(self) -> None:
        """On the forward's stream, before it: make new graphs' addresses known to them."""
        if self._there == self._graphs:
            return
        new = slice(self._there, self._graphs)
        # Pageable: the call returns when the values have left, and happens once a graph.
        self._addresses[new].copy_(self._known[new])
        self._there = self._graphs
