"""Copying each layer's routes into the capture buffer, by views that are kept.

Problem: where routes are not read off the routers' own tensors (on a CPU, with DP attention, and
what ``eager_forwards`` leaves) every layer copies its own when its router has made them. Slices
and the copy are several calls of torch's, each in caches that the layers' own work has filled.
When all forwards outside of graphs did so, a prefill of 8,192 tokens on an H200 with a slow host
spent 118 ms launching kernels with routes off and 135 ms with them, so that it, and not the GPU,
said how long the prefill took (the scheduler thread's trace of ``bench/engine.py --rounds 5
--trace``, at 3bfcdd2).

Approach: forwards of one length, as the chunks of a long prefill are, have the same views. They are
made in the first one and kept until a forward has another length, so a layer is one call.
"""

from __future__ import annotations

import torch


class LayerViews:
    """The views of one capture buffer.

    Parameters
    ----------
    rows
        ``int32 [rows, all layers, top_k]``, a view of the buffer.

    Attributes
    ----------
    written
        Rows, from the first on, that were written since whoever owns the buffer set this to 0.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._top_k = rows.shape[2]
        self._count = self.written = 0
        self._views: dict[int, torch.Tensor] = {}

    def copy(self, layer: int, ids: torch.Tensor) -> None:
        """Copy a layer's routes to the first rows.

        Parameters
        ----------
        ids
            ``[n, at least top_k]``; what is behind ``top_k`` are fused shared experts.
        """
        count, columns = ids.shape
        if columns != self._top_k:
            ids = ids[:, : self._top_k]
        if torch.compiler.is_compiling():
            # What is traced runs without this code: nothing is kept for it, nothing of it.
            self._rows[:count, layer] = ids
            return
        if count != self._count:
            self._views.clear()
            self._count = count
        self.written = max(self.written, count)
        view = self._views.get(layer)
        if view is None:
            view = self._views[layer] = self._rows[:count, layer]
        view.copy_(ids)
