"""Shadow mode: SGLang's own host cache keeps running and every record is compared with it.

The comparison is the bridge checking itself while it runs; a difference is logged with
rid, token and layer, and counted. It costs what the native path costs.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shmroute import RouteLayout
from shmroute.counters import SharedCounters

logger = logging.getLogger("shmroute")


class Shadow:
    """Compares rows with SGLang's. Called on the sealer and, for inline records, the scheduler."""

    def __init__(self, routes: RouteLayout, counters: SharedCounters) -> None:
        self._layers = list(routes.layer_ids)
        self._counters = counters

    def compare(
        self,
        rid: str,
        start: int,
        rows: npt.NDArray[Any],
        native: torch.Tensor | None,
        missing: tuple[tuple[int, int], ...],
    ) -> None:
        """Compare ``[tokens, moe_layers, top_k]`` rows, those that are missing left out."""
        if native is None:
            logger.error("shmroute: shadow mode has no native rows for rid %r", rid)
            return
        reference = native.numpy()[:, self._layers]
        if reference.shape != rows.shape:
            differs = np.ones(rows.shape[:2], dtype=bool)
        else:
            differs = (rows.astype(np.int32) != reference).any(axis=-1)
        for first, end in missing:
            differs[first:end] = False
        wrong = int(differs.any(axis=1).sum())
        if wrong:
            token, layer = np.argwhere(differs)[0]
            logger.error(
                "shmroute: SHADOW MISMATCH rid %r: %d of %d rows differ from the native path, "
                "first at token %d, layer %d",
                rid,
                wrong,
                len(rows),
                start + int(token),
                self._layers[layer],
            )
        self._counters.add("shadow_records")
        self._counters.add("shadow_rows", len(rows))
        self._counters.add("shadow_mismatches", wrong)
        self._counters.add("shadow_rows_incomparable", sum(end - first for first, end in missing))
