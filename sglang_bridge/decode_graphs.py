"""A decode graph stores its own routes: one kernel at its end, in place of one copy a layer.

Problem: SGLang copies each MoE layer's ``topk_ids`` into the capture buffer as soon as the router
has made them. In a decode graph of 48 layers these are 48 copies of a few KB, each as long as a
launch, at every step; and the scatter that follows costs the scheduler thread a launch of its own.

Approach: while a decode graph is captured, the layers' tensors are only kept. At the graph's end
one kernel is captured that reads all of them by their addresses and stores them in the route
table, with the token ids, positions and KV locations that the graph itself runs on. What makes
that right:

    the addresses are the graph's    a graph runs with the memory it was captured with. Graphs
                                     share one pool, but one graph's tensors are there while it
                                     runs
    nothing else is put there        the tensors are referenced until the kernel is captured, so
                                     the pool gives their memory to no later layer
    nobody changes them              between the router and the graph's end SGLang writes into
                                     ``topk_ids`` only where rows are padding. Where more of it
                                     could be rewritten or reused, decode steps are captured layer
                                     by layer (``versions.decode_graphs_store_routes``), and
                                     shadow mode compares with copies taken at once
    an address is there in time      the kernel reads addresses from device memory; they are put
                                     there before the first forward after the capture, not during
                                     it. A zero is no address, and nothing is read or written
    no two layers share memory       SGLang does not start where they do: by the graph's end only
                                     the last one's routes are there
    the inputs are the step's        SGLang copies each step's ids, positions and locations into
                                     the graph's before it is replayed
    padding goes to location 0       a graph for more requests than there are runs on zeros behind
                                     them, and location 0 is SGLang's own for that: no request
                                     ever has it
    a gather is not overtaken        the forward's stream waits for the gathers that were asked
                                     for before the graph begins (``DeviceGatherer``)
    table and epoch are the latest   a graph cannot be told of a new epoch or of a table that has
                                     moved: both are read from device memory, too, and put there
                                     before the first forward that they hold for

Only what one stream capture holds from the first MoE layer to the end is kept. A graph with a
tensor of another form goes through the capture buffer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from .router_outputs import RouterOutputs
from .table import STATE_FIELDS, RouteTable

_GRAPHS_MAX = 1024


class DecodeGraphs:
    """The routers' outputs of decode graphs on one device.

    Parameters
    ----------
    table
        Where the graphs store, on a CUDA device.
    buffer
        ``int32 [rows, all layers, columns]``: the capture buffer, for graphs that cannot.
    capturing
        Whether a decode graph is being captured on the calling thread's stream.
    """

    def __init__(
        self, table: RouteTable, buffer: torch.Tensor, capturing: Callable[[], bool]
    ) -> None:
        self._table, self._buffer, self._capturing = table, buffer, capturing
        self._layers = table.routes.layer_ids
        self._outputs = RouterOutputs(self._layers, buffer.shape[2])
        self._scatter = table.address_scatter(columns=buffer.shape[2])
        self._state = torch.zeros(STATE_FIELDS, dtype=torch.int64, device=buffer.device)
        shape = _GRAPHS_MAX, len(self._layers)
        self._addresses = torch.zeros(shape, dtype=torch.int64, device=buffer.device)
        self._known = torch.zeros(shape, dtype=torch.int64)
        self._graphs, self._there = 0, 0
        self._told: tuple[int, int] | None = None
        self._storing: dict[int, bool] = {}
        self._runner: weakref.ref[Any] | None = None
        self._warm: tuple[int, ...] = ()

    # -- while a graph is captured -----------------------------------------------------------

    def keep(self, layer_id: int, ids: torch.Tensor) -> bool:
        """Take a layer's routes while a graph is captured; False: copy them at once.

        Parameters
        ----------
        ids
            ``int32 [tokens, columns]``, contiguous.
        """
        outputs = self._outputs
        place = outputs.place(layer_id)
        if place is None or not self._capturing():
            return False
        if any(place <= earlier for earlier in outputs.kept):
            outputs.clear()  # of a capture that was given up
        return self._graphs < _GRAPHS_MAX and outputs.keep(place, ids)

    def end_capture(self, runner: Any, _output: Any, forward_batch: Any, tokens: int) -> None:
        """SGLang's hook at the end of a decode graph's forward: two times to warm up, then once
        into the capture. Another runner's graphs replace all that there were.

        Raises
        ------
        RuntimeError
            Two layers' routers share memory. Or, of two graphs for as many tokens only one stores
            its routes: a step cannot be told by which it ran. SGLang does not start then.
        """
        if not self._capturing():
            self._warm_up(runner, forward_batch)
            return
        outputs = self._outputs
        try:
            self._put_at_end(outputs, forward_batch, tokens)
        finally:
            outputs.clear()

    def _put_at_end(self, outputs: RouterOutputs, batch: Any, tokens: int) -> None:
        if not outputs.apart():
            raise RuntimeError(
                "two layers' routers write to the same memory in a decode graph, from which the "
                "routes of both cannot be read: start with --disable-cuda-graph"
            )
        stores = self._can_store(outputs, batch, tokens)
        if self._storing.setdefault(tokens, stores) != stores:
            raise RuntimeError(
                f"two decode graphs for {tokens} tokens, whose routers' outputs are not of one "
                "form: start with --disable-cuda-graph"
            )
        if not stores:
            for place, ids in outputs.kept.items():
                self._buffer[: len(ids), self._layers[place]] = ids
            return
        self._known[self._graphs] = torch.tensor(outputs.addresses())
        self._store(batch)
        self._graphs += 1

    def _warm_up(self, runner: Any, batch: Any) -> None:
        if self._runner is None or self._runner() is not runner:
            self._runner = weakref.ref(runner)
            self._addresses.zero_()
            self._graphs, self._there = 0, 0
            self._storing.clear()
        self._warm = _places(batch)
        if self._graphs < _GRAPHS_MAX:
            self._store(batch)  # from no addresses: for the compiler's sake

    def _can_store(self, outputs: RouterOutputs, batch: Any, tokens: int) -> bool:
        inputs = batch.input_ids, batch.positions, batch.out_cache_loc
        return (
            outputs.complete
            and all(len(one) == tokens for one in (*outputs.kept.values(), *inputs))
            and _places(batch) == self._warm
        )

    def _store(self, batch: Any) -> None:
        given = batch.out_cache_loc, batch.input_ids, batch.positions
        self._scatter(self._addresses[self._graphs], self._state, *given)

    # -- at each forward ---------------------------------------------------------------------

    def before_forward(self, epoch: int) -> bool:
        """On the forward's stream, before it: make known to the graphs what is new.

        Returns whether graphs are, which have warmed up through the capture buffer.
        """
        now = epoch, self._table.moves
        if now != self._told:
            # Pageable, here and below: the call returns when the values have left, and is rare.
            self._state.copy_(torch.tensor(self._table.state(epoch), dtype=torch.int64))
            self._told = now
        if self._there == self._graphs:
            return False
        new = slice(self._there, self._graphs)
        self._addresses[new].copy_(self._known[new])
        self._there = self._graphs
        return True

    def has_stored(self, tokens: int | None) -> bool:
        """Whether the replay of a decode graph for so many tokens stores its routes itself."""
        return tokens is not None and self._storing.get(tokens, False)


def _places(batch: Any) -> tuple[int, ...]:
    """Addresses of a decode batch's inputs."""
    inputs = batch.input_ids, batch.positions, batch.out_cache_loc
    return tuple(one.data_ptr() for one in inputs)
