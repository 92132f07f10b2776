"""The route table: each KV location's latest routes, in the arena's dtype, with a tag.

SGLang's KV locations already follow prefix hits, chunked prefill, retraction and turns, so
rows kept by location are right by construction; the tags prove it row by row. Memory is
``moe_layers * top_k * itemsize + 8`` bytes a KV token: on the device that runs the model or,
where that has no room, the rows in page-locked host memory that the device writes into.

Order: a location's row may be rewritten as soon as SGLang has freed the location, so a
forward's scatter waits until the gathers that were asked for before it have read their rows
(``RouteTable.fence``; of a scatter inside a decode graph the forward waits as a whole).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from shmroute import RouteLayout
from shmroute.pinned import pinned_tensor

from .errors import StartRefused
from .tags import EPOCH_MASK, INVALID, make_tags

if TYPE_CHECKING:
    from .kernels import AddressScatter, Scatter

logger = logging.getLogger("shmroute")

# torch has no scatter for uint16: the same 16 bits travel as int16.
_STORAGE = {1: torch.uint8, 2: torch.int16}
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# Numbers in ``RouteTable.state``.
STATE_FIELDS = 3


class RouteTable:
    """Rows ``[locations, moe_layers * top_k]`` and tags ``[locations]``.

    Parameters
    ----------
    locations
        KV locations that the native capturer was told of.
    device
        Where the model runs: tags are there, and rows unless ``in_host_memory``.
    vocabulary
        Token ids outside ``[0, vocabulary)`` are not told apart in tags.
    in_host_memory
        Keep the rows in page-locked host memory, for a CUDA device.

    Attributes
    ----------
    fence
        Called by ``scatter``: what follows on the calling thread's stream comes after earlier
        gathers have read their rows. The gatherer of the table puts its own here.
    moves
        How often the memory of rows and tags has gone or come: by then it may be elsewhere.
    """

    def __init__(
        self,
        routes: RouteLayout,
        locations: int,
        device: torch.device | str,
        *,
        vocabulary: int,
        in_host_memory: bool = False,
    ) -> None:
        self.routes = routes
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # By number: for another thread "cuda" is device 0.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.in_host_memory = in_host_memory
        self._shape = (locations, routes.row_shape[0] * routes.top_k)
        self._dtype = _STORAGE[routes.dtype.itemsize]
        self.rows = self._new_rows()
        # The rows in the widest words that a row is made of, for copying.
        self.word_bytes = next(size for size in _WORDS if routes.row_bytes % size == 0)
        self.words = self.rows.view(_WORDS[self.word_bytes])
        self.tags = torch.full((locations,), INVALID, dtype=torch.int64, device=self.device)
        self._layers = torch.tensor(routes.layer_ids, dtype=torch.int64, device=self.device)
        self._every_layer = len(routes.layer_ids) == routes.num_layers
        self._vocabulary = vocabulary
        self._fused_forms: dict[tuple[int, int], Scatter] = {}
        self._address_forms: dict[int, AddressScatter] = {}
        self.moves = 0
        self.fence: Callable[[], None] = lambda: None

    def _new_rows(self) -> torch.Tensor:
        if not self.in_host_memory:
            return torch.zeros(self._shape, dtype=self._dtype, device=self.device)
        locations, width = self._shape
        memory = pinned_tensor(
            locations * width * self.routes.dtype.itemsize,
            what="route table",
            device=self.device.index,
        )
        if not memory.is_pinned():
            raise StartRefused(
                f"the route table's {memory.nbytes / 2**20:.1f} MiB of host memory cannot be "
                "page-locked (the log says why): raise the limit (ulimit -l unlimited), or "
                "--shmroute-table gpu"
            )
        return memory.view(self._dtype).view(self._shape)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.tags.nbytes

    @property
    def device_bytes(self) -> int:
        """Of these, bytes in the memory of the device that runs the model."""
        return self.tags.nbytes + (0 if self.in_host_memory else self.rows.nbytes)

    # -- on the stream of the forward --------------------------------------------------------

    def scatter(
        self,
        captured: torch.Tensor,
        locations: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        epoch: int,
    ) -> None:
        """Store a forward's routes and put -1 where they were.

        Parameters
        ----------
        captured
            ``int32 [at least n, all layers, top_k]``: a view into the capture buffer.
        tokens
            ``[n]``: token id of each row.
        locations, positions
            ``[at least n]``: KV location and position of each row; what lies beyond is padding.
        """
        self.fence()
        form = self._fused(captured) if self.device.type == "cuda" else self.scatter_with_torch
        form(captured, locations, tokens, positions, epoch)

    def scatter_with_torch(
        self,
        captured: torch.Tensor,
        locations: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        epoch: int,
    ) -> None:
        """The same in torch, for a CPU and as the kernel's reference; no fence."""
        count = len(tokens)
        captured, locations, positions = captured[:count], locations[:count], positions[:count]
        chosen = captured if self._every_layer else captured.index_select(1, self._layers)
        tags = make_tags(tokens, positions, epoch, self._vocabulary)
        tags = torch.where(valid_rows(chosen, self.routes.num_experts), tags, INVALID)
        compact = chosen.to(self.rows.dtype).flatten(1)
        where = locations.to(torch.int64)
        self.rows.index_copy_(0, where, compact)
        self.tags.index_copy_(0, where, tags)
        # A layer that does not capture next time must not show these.
        captured.fill_(-1)

    def _fused(self, captured: torch.Tensor) -> Scatter:
        """The kernel for a capture buffer of these strides."""
        strides = captured.stride(0), captured.stride(1)
        fused = self._fused_forms.get(strides)
        if fused is None:
            fused = self._fused_forms[strides] = self._make_fused(strides)
        return fused

    def _make_fused(self, strides: tuple[int, int]) -> Scatter:
        from .kernels import Scatter  # needs Triton, which not every CPU build has

        return Scatter(
            self.rows,
            self.tags,
            self._layers,
            strides=strides,
            num_experts=self.routes.num_experts,
            top_k=self.routes.top_k,
            vocabulary=self._vocabulary,
        )

    def address_scatter(self, *, columns: int) -> AddressScatter:
        """The scatter out of the routers' own tensors, which have so many columns; no fence."""
        form = self._address_forms.get(columns)
        if form is None:
            form = self._address_forms[columns] = self._make_address_scatter(columns)
        return form

    def _make_address_scatter(self, columns: int) -> AddressScatter:
        from .kernels import AddressScatter  # as above

        return AddressScatter(
            self.rows,
            self.tags,
            layers=len(self.routes.layer_ids),
            columns=columns,
            num_experts=self.routes.num_experts,
            top_k=self.routes.top_k,
            vocabulary=self._vocabulary,
        )

    def state(self, epoch: int) -> tuple[int, ...]:
        """What that scatter reads from device memory, ``STATE_FIELDS`` numbers: where rows and
        tags are now, and the epoch.
        """
        return self.rows.data_ptr(), self.tags.data_ptr(), epoch & EPOCH_MASK

    def compile(self, captured: torch.Tensor) -> None:
        """Scatter one row to no location, so that no forward waits for the kernel's compiler.

        ``captured`` is a row of the capture buffer.
        """
        if self.device.type == "cuda":
            nowhere = torch.full((1,), -1, dtype=torch.int64, device=self.device)
            self.scatter(captured, nowhere, torch.zeros_like(nowhere), torch.zeros_like(nowhere), 0)

    def forget(self) -> None:
        """Declare every row invalid: something wrote KV without a scatter."""
        self.fence()
        self.tags.fill_(INVALID)

    # -- reading -----------------------------------------------------------------------------

    def gather(self, locations: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Read rows into ``out`` (``[n, width]``, table dtype) and return their tags.

        On a CUDA device both are ordered by the calling thread's stream; ``out`` may be on the
        host, and then this waits for the copy.
        """
        where = locations.to(torch.int64)
        if out.device == self.rows.device:
            torch.index_select(self.rows, 0, where.to(out.device), out=out)
        elif self.in_host_memory:
            raise ValueError("rows in host memory are gathered into host memory")
        else:
            out.copy_(self.rows.index_select(0, where))
        return self.tags.index_select(0, where)

    def as_storage(self, rows: np.ndarray) -> torch.Tensor:
        """A record's rows as a tensor that ``gather`` can fill (shares the memory)."""
        flat = rows.reshape(len(rows), -1)
        return torch.from_numpy(flat.view(np.int16) if flat.itemsize == 2 else flat)

    # -- memory of a colocated trainer -------------------------------------------------------

    def give_back(self) -> None:
        """Free the device memory until ``take_again``; nothing may be in flight."""
        for part in self._on_device():
            part.untyped_storage().resize_(0)
        self.moves += 1

    def take_again(self) -> None:
        """Take the memory again; every row is invalid."""
        for part in self._on_device():
            part.untyped_storage().resize_(part.numel() * part.element_size())
        self.moves += 1
        self.tags.fill_(INVALID)

    def _on_device(self) -> tuple[torch.Tensor, ...]:
        return (self.tags,) if self.in_host_memory else (self.rows, self.tags)


def valid_rows(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Mask ``[n]``: rows whose ids lie in ``[0, num_experts)`` and differ within each layer."""
    ordered = chosen.sort(dim=-1).values
    inside = (ordered[..., 0] >= 0) & (ordered[..., -1] < num_experts)
    distinct = (ordered[..., 1:] != ordered[..., :-1]).all(dim=-1)
    valid: torch.Tensor = (inside & distinct).all(dim=-1)
    return valid


def place_table(
    where: str, routes: RouteLayout, locations: int, device: str, vocabulary: int
) -> RouteTable:
    """Make the route table where ``--shmroute-table`` says; ``auto`` looks at what is free.

    Raises
    ------
    StartRefused
        There is no such place, or no room there: figures and remedy in the message.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and where == "gpu":
        raise StartRefused("--shmroute-table gpu: this engine runs on a CPU; leave it at auto")
    needed = locations * (routes.row_bytes + 8)
    in_host_memory = where == "host" and not on_cpu
    if where == "auto" and not on_cpu:
        free = torch.cuda.mem_get_info(torch.device(device))[0]
        # The other half is for what SGLang takes later: CUDA graphs and activations.
        in_host_memory = needed > free // 2
        if in_host_memory:
            logger.warning(
                "shmroute: a route table of %.1f MiB would take more than half of the %.1f MiB "
                "left on %s: its rows go to page-locked host memory (--shmroute-table gpu, with a "
                "smaller --mem-fraction-static, puts them on the device)",
                needed / 2**20,
                free / 2**20,
                device,
            )
    try:
        return RouteTable(
            routes, locations, device, vocabulary=vocabulary, in_host_memory=in_host_memory
        )
    except torch.OutOfMemoryError as error:
        raise StartRefused(
            f"a route table of {needed / 2**20:.1f} MiB for {locations} KV tokens does not fit on "
            f"{device}: --shmroute-table host, or a smaller --mem-fraction-static"
        ) from error
