"""A forward outside any graph stores its routes with one kernel, in place of one copy a layer.

Problem: a prefill of 8,192 tokens launches a few thousand kernels, and where its host is slow that,
and not the GPU, says how long it takes. Each layer's copy of its routes is one launch more, by
Python that the layers' own work has put out of the processor's caches.

Approach: the layers' tensors are only kept (``router_outputs``), and read by their addresses at the
forward's end. Beside what is said there:

    the addresses are this forward's   they cross to the GPU in the forward's own stream, before
                                       the kernel, out of page-locked memory that torch keeps until
                                       the copy is over. So the caller waits for nothing, and the
                                       next forward's come after the kernel
    a tensor outlives its reading      it is referenced until the kernel is launched. Torch gives
                                       its memory to what its stream does later, and only tensors
                                       of the forward's own stream are kept
    a router that reuses memory        of its own is found by the addresses. That forward is lost
                                       (``capturer``); from then on routes are copied layer by layer
    the latest one counts              a layer that captures again, into the buffer, has nothing
                                       kept any more
    a gather is not overtaken          the kernel waits for it, as any scatter (``RouteTable``)

What is not kept goes through the capture buffer, and with it the whole forward: layers inside a
prefill graph or compiled code, or on a stream beside, tensors of another form, and forwards so long
(``_BYTES_MAX``) that a launch a layer is nothing beside them and the memory would be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shmroute.cuda_runtime import current_stream

from .layer_views import LayerViews
from .router_outputs import RouterOutputs
from .table import STATE_FIELDS, RouteTable

_BYTES_MAX = 64 << 20


class EagerForwards:
    """The routers' outputs of the forward that is running, on a CUDA device.

    Parameters
    ----------
    table
        Where they are stored.
    columns
        Of each router's tensor: the routes, and fused shared experts behind them.
    views
        Of the capture buffer, for forwards of which not every layer is kept.
    capturing, stream
        Whether the calling thread's stream is being captured, and its handle.
    """

    def __init__(
        self,
        table: RouteTable,
        columns: int,
        views: LayerViews,
        capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
        stream: Callable[[int], int] = current_stream,
    ) -> None:
        self._table, self._views = table, views
        self._capturing, self._stream = capturing, stream
        self._device, self._forward = table.device.index, 0
        self._layers = table.routes.layer_ids
        self._outputs = RouterOutputs(self._layers, columns)
        self._tokens_max = _BYTES_MAX // (4 * columns * len(self._layers))
        self._scatter = table.address_scatter(columns=columns)
        numbers = STATE_FIELDS + len(self._layers)
        self._sent = torch.zeros(numbers, dtype=torch.int64, device=table.device)
        self._whole, self._trusted = True, True

    def begin(self) -> None:
        """A forward begins on this stream: what one before it has left is none of its."""
        self._outputs.clear()
        self._whole = True
        self._forward = self._stream(self._device)

    def keep(self, layer_id: int, ids: torch.Tensor) -> bool:
        """Take a layer's routes; False: copy them at once.

        Parameters
        ----------
        ids
            ``int32 [tokens, columns]``, contiguous.
        """
        place = self._outputs.place(layer_id)
        if place is None:
            return False
        if (
            self._whole
            and self._trusted
            and len(ids) <= self._tokens_max
            and self._stream(self._device) == self._forward
            and not self._capturing()
        ):
            self._whole = self._outputs.keep(place, ids)
        else:
            self._outputs.refuse(place, ids)
            self._whole = False
        return self._whole

    def store(
        self,
        locations: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        epoch: int,
    ) -> bool:
        """Store the forward's routes, on its stream, if every layer of it was kept. If not, those
        that were are in the capture buffer now, with the others.

        Parameters
        ----------
        tokens
            ``[n]``, like ``locations`` and ``positions``, which may be longer.

        Raises
        ------
        RuntimeError
            Two layers' routers share memory: the forward's routes are lost.
        """
        outputs = self._outputs
        try:
            if not outputs.apart():
                self._trusted = False
                raise RuntimeError(
                    "two layers' routers write to the same memory, from which the routes of both "
                    "cannot be read when a forward ends; from now on they are copied layer by layer"
                )
            if not self._holds(len(tokens)):
                for place, ids in outputs.kept.items():
                    self._views.copy(self._layers[place], ids)
                return False
            self._send((*self._table.state(epoch), *outputs.addresses()))
            self._launch(locations, tokens, positions)
            return True
        finally:
            outputs.clear()

    def _holds(self, tokens: int) -> bool:
        """Whether every layer of the forward is kept, and nothing of it is in the buffer."""
        kept = self._outputs.kept.values()
        return self._whole and self._outputs.complete and all(len(ids) >= tokens for ids in kept)

    def _send(self, numbers: tuple[int, ...]) -> None:
        on_gpu = self._sent.is_cuda
        given = torch.tensor(numbers, dtype=torch.int64, pin_memory=on_gpu)
        self._sent.copy_(given, non_blocking=True)

    def _launch(
        self, locations: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
    ) -> None:
        state, addresses = self._sent[:STATE_FIELDS], self._sent[STATE_FIELDS:]
        self._table.fence()
        self._scatter(addresses, state, locations, tokens, positions)

    def compile(self) -> None:
        """Launch the kernel for no layers, so that no forward waits for its compiler."""
        nowhere = torch.zeros(1, dtype=torch.int64, device=self._sent.device)
        self._launch(nowhere, nowhere, nowhere)
