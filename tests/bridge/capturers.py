"""The bridge's capturer without a model behind it: forwards as the hooks see them.

Import it inside a test or fixture that has asked for ``sglang``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_bridge.capturer import ArenaCapturer
from sglang_bridge.epochs import WeightEpochs
from sglang_bridge.layer_views import LayerViews
from sglang_bridge.publisher import Publisher
from sglang_bridge.table import RouteTable


class Batch:
    """What the hooks read of a ``ForwardBatch``."""

    def __init__(self, ids: np.ndarray, locations: np.ndarray) -> None:
        self.input_ids = torch.from_numpy(ids)
        self.positions = torch.arange(len(ids))
        self.out_cache_loc = torch.from_numpy(locations)
        self.out_cache_loc_virtual = None
        self.forward_mode = ForwardMode.DECODE

    def contains_mm_inputs(self) -> bool:
        return False


class WithoutModel(ArenaCapturer):
    """An owner's capturer; with a host cache it is in shadow mode."""

    def __init__(self, publisher: Publisher, table: RouteTable, host_cache: Any = None) -> None:
        self.publisher, self.host_cache = publisher, host_cache
        self.shadow = host_cache is not None
        self.epochs, self.table = WeightEpochs(), table
        self._entry, self._shares_buffer, self._multimodal = None, False, True
        self._decode_graphs, self._eager = None, None
        self._dirty, self._copies = False, True
        self._every_row = torch.empty((0, 0, 0), dtype=torch.int32)
        self._layers = LayerViews(self._every_row)

    def forward(self, batch: Any, captured: torch.Tensor) -> Any:
        """One forward; returns what rides with its result through SGLang's overlap."""
        self.on_forward_begin(batch)
        return self.end_forward(batch, captured)

    def end_forward(self, batch: Any, captured: torch.Tensor, graph: int | None = None) -> Any:
        """``graph``: the batch of the CUDA graph that it ran in."""
        self._every_row, self._get_local_slice = captured, lambda *_: captured
        return self.on_forward_end(batch, graph is not None, graph, no_copy_to_cpu=True)
