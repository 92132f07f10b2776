"""What a request's end costs where none of its code and data are in the processor's caches.

In an engine it comes once in seconds, and SGLang fills the caches between any two. A loop that does
nothing else shows a third of that. `OtherWork` empties them, and `DriverCalls` is the part that
no code of ours can take out.
"""

from __future__ import annotations

import numpy as np
import torch

from sglang_bridge.cuda_driver import Event, copy
from sglang_bridge.gather_device import DeviceGatherer

TOKENS = 8192


class OtherWork:
    """What fills the processor's caches between two requests' ends; in an engine SGLang does."""

    def __init__(self) -> None:
        self._memory = np.zeros(64 << 20, dtype=np.uint8)
        self._objects = [{str(key): key for key in range(20)} for _ in range(60_000)]

    def __call__(self) -> None:
        self._memory += 1
        sum(one["7"] for one in self._objects)


class DriverCalls:
    """The driver's calls that one finished request of ``TOKENS`` tokens takes, in their order."""

    def __init__(self, gatherer: DeviceGatherer, pool: torch.Tensor) -> None:
        self._begin, self._taken, self._gathered, self._copied = (Event() for _ in range(4))
        self._schedule = torch.cuda.current_stream().cuda_stream
        self._gather, self._copy = gatherer._gather, gatherer._copy
        self._launch, self._lane = gatherer._gather_rows, gatherer._lanes[0]
        self._locations = torch.zeros(TOKENS, dtype=torch.int32, device=pool.device)
        self._source = pool.data_ptr()
        self._bytes = TOKENS * gatherer._row_bytes
        self._rows = torch.empty(self._bytes, dtype=torch.uint8).pin_memory()
        self._buffer = gatherer._buffers.take()
        self._target = self._rows.data_ptr()

    def __call__(self) -> None:
        lane, buffer = self._lane, self._buffer
        locations = self._locations.data_ptr()
        self._begin.hold_back(self._gather)
        copy(locations, self._source, 4 * TOKENS, self._gather)
        self._taken.record(self._gather)
        self._taken.hold_back(self._schedule)
        self._launch(
            (locations, TOKENS, 0, 0),
            buffer.pieces_address,
            buffer.tags_address,
            1,
            TOKENS,
            lane.words_address,
            self._gather,
        )
        self._gathered.record(self._gather)
        self._gathered.hold_back(self._copy)
        copy(self._target, lane.words_address, self._bytes, self._copy)
        self._copied.record(self._copy)
