"""The route table: each KV location's latest routes, in the arena's dtype, with a tag.

SGLang's KV locations already follow prefix hits, chunked prefill, retraction and turns, so
rows kept by location are right by construction; the tags prove it row by row. Memory is
``moe_layers * top_k * itemsize + 8`` bytes a KV token, on the device that runs the model.

Order: a location's row may be rewritten as soon as SGLang has freed the location, so a
forward's scatter waits until the gathers that were asked for before it are done
(``RouteTable.fence``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from shmroute import RouteLayout

from .tags import INVALID, make_tags

# torch has no scatter for uint16: the same 16 bits travel as int16.
_STORAGE = {1: torch.uint8, 2: torch.int16}


class RouteTable:
    """Rows ``[locations, moe_layers * top_k]`` and tags ``[locations]``.

    Parameters
    ----------
    locations
        KV locations that the native capturer was told of.
    vocabulary
        Token ids outside ``[0, vocabulary)`` are not told apart in tags.
    fence
        Called before every scatter: returns when earlier gathers have read their rows.
    """

    def __init__(
        self,
        routes: RouteLayout,
        locations: int,
        device: torch.device | str,
        *,
        vocabulary: int,
        fence: Callable[[], None],
    ) -> None:
        self.routes = routes
        width = routes.row_shape[0] * routes.top_k
        self.rows = torch.zeros(
            (locations, width), dtype=_STORAGE[routes.dtype.itemsize], device=device
        )
        self.tags = torch.full((locations,), INVALID, dtype=torch.int64, device=device)
        self._layers = torch.tensor(routes.layer_ids, dtype=torch.int64, device=device)
        self._every_layer = len(routes.layer_ids) == routes.num_layers
        self._vocabulary = vocabulary
        self._fence = fence

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.tags.nbytes

    def scatter(
        self,
        captured: torch.Tensor,
        locations: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        epoch: int,
    ) -> None:
        """Store a forward's routes.

        Parameters
        ----------
        captured
            ``int32 [n, all layers, top_k]`` out of the capture buffer.
        locations, tokens, positions
            ``[n]``: KV location, token id and position of each row.
        """
        chosen = captured if self._every_layer else captured.index_select(1, self._layers)
        tags = make_tags(tokens, positions, epoch, self._vocabulary)
        tags = torch.where(valid_rows(chosen, self.routes.num_experts), tags, INVALID)
        compact = chosen.to(self.rows.dtype).flatten(1)
        where = locations.to(torch.int64)
        self._fence()
        self.rows.index_copy_(0, where, compact)
        self.tags.index_copy_(0, where, tags)

    def gather(self, locations: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Read rows into ``out`` (``[n, width]``, table dtype) and return their tags."""
        where = locations.to(torch.int64)
        torch.index_select(self.rows, 0, where, out=out)
        return self.tags.index_select(0, where)

    def as_storage(self, rows: np.ndarray) -> torch.Tensor:
        """A record's rows as a tensor that ``gather`` can fill (shares the memory)."""
        flat = rows.reshape(len(rows), -1)
        return torch.from_numpy(flat.view(np.int16) if flat.itemsize == 2 else flat)

    def forget(self) -> None:
        """Declare every row invalid: something wrote KV without a scatter."""
        self._fence()
        self.tags.fill_(INVALID)


def valid_rows(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Mask ``[n]``: rows whose ids lie in ``[0, num_experts)`` and differ within each layer."""
    ordered = chosen.sort(dim=-1).values
    inside = (ordered[..., 0] >= 0) & (ordered[..., -1] < num_experts)
    distinct = (ordered[..., 1:] != ordered[..., :-1]).all(dim=-1)
    valid: torch.Tensor = (inside & distinct).all(dim=-1)
    return valid
