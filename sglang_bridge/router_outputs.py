"""What the routers of one forward chose, each layer's tensor kept where it is.

Problem: SGLang hands every MoE layer's ``topk_ids`` over as soon as its router has made them, and
copying them then is a launch a layer, 48 of them a forward, on a thread that launches all else.

Approach: the tensors are only referenced, and at the forward's end one kernel reads all of them by
their addresses (``kernels.AddressScatter``). What makes that right, in a decode graph
(``decode_graphs``) and outside of one (``eager_forwards``):

    nothing else is put there        a tensor that is referenced keeps its memory: torch gives it
                                     to no later layer
    nobody changes them              between the router and the forward's end SGLang writes into
                                     ``topk_ids`` only where rows are padding. Where more of it
                                     could be rewritten or reused, they are copied layer by layer
                                     (``versions.routes_stay``) or the model is refused (zero
                                     experts, ``layers``), and shadow mode compares with copies
                                     taken at once
    no two layers share memory       a router that makes its output in memory of its own, again in
                                     each layer, would leave the last one's there: ``apart`` tells,
                                     also of a tensor that could not be kept
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


class RouterOutputs:
    """The MoE layers' tensors of a forward, by the layer's place among them.

    Parameters
    ----------
    layer_ids
        Decoder-layer number of each place.
    columns
        Of each tensor: the routes, and fused shared experts behind them.
    """

    def __init__(self, layer_ids: Sequence[int], columns: int) -> None:
        self._place = {number: at for at, number in enumerate(layer_ids)}
        self._columns = columns
        self.kept: dict[int, torch.Tensor] = {}
        self._beside: list[tuple[int, int]] = []

    def place(self, layer_id: int) -> int | None:
        """Of a layer whose routes are stored; None of any other."""
        return self._place.get(layer_id)

    def keep(self, place: int, ids: torch.Tensor) -> bool:
        """Reference a layer's tensor if the kernel can read it: ``int32 [tokens, columns]``,
        contiguous. If not, it is ``refuse``d.
        """
        fits = ids.dtype == torch.int32 and ids.shape[1] == self._columns and ids.is_contiguous()
        if fits:
            self.kept[place] = ids
        else:
            self.refuse(place, ids)
        return fits

    def refuse(self, place: int, ids: torch.Tensor) -> None:
        """A layer's tensor is not kept, and nothing that was kept of that layer before counts."""
        self.kept.pop(place, None)
        if self.kept:
            self._beside.append(_span(ids))

    def clear(self) -> None:
        self.kept.clear()
        self._beside.clear()

    @property
    def complete(self) -> bool:
        """Whether every layer is here."""
        return len(self.kept) == len(self._place)

    def addresses(self) -> list[int]:
        """In the order of places; 0 where no tensor is."""
        kept = self.kept
        return [kept[at].data_ptr() if at in kept else 0 for at in range(len(self._place))]

    def apart(self) -> bool:
        """Whether what is kept shares memory with no other layer's tensor."""
        spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in self.kept.values())
        among = all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        return among and all(
            to <= begin or end <= at for at, to in self._beside for begin, end in spans
        )


def _span(ids: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and behind its last, whatever its strides."""
    begin = ids.data_ptr()
    if not ids.numel():
        return begin, begin
    steps = zip(ids.shape, ids.stride(), strict=True)
    return begin, begin + (1 + sum((n - 1) * step for n, step in steps)) * ids.element_size()
