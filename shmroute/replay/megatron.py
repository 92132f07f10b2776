"""Routes in Megatron-core's MoE routers, straight from the rollout engine's shared memory.

::

    replay = RouteReplay(model)                  # the chunks that forward_backward_func gets

    def forward_step(data_iterator, chunk):
        batch = next(data_iterator)
        with replay.micro_batch(batch["tickets"], chunk=chunk, tokens=partition):
            output = chunk(batch["tokens"], ...)
        return output, loss_func

    with replay.schedule():
        forward_backward_func(forward_step_func=forward_step, model=model, ...)

Problem
    A router wants, for each micro-batch, the experts of this rank's tokens at its own layer, as
    ``int64 [tokens, top_k]``: in the forward, and again when the backward recomputes it, with
    forwards of later micro-batches in between. Megatron's ``RouterReplay`` takes them through a
    list of all instances ever made, and holds them as int64 in queues that are filled and cleared
    by hand.

Protocol
    1 ``RouteReplay`` walks the model and gives each decoder layer's router a ``LayerReplay`` in
      place of its ``router_replay``; the flag ``moe_enable_routing_replay`` need not be on.
      Megatron's ``layer_number`` is global and counts from 1, pipeline and virtual-pipeline
      offsets and dense layers included: it is a record's ``layer_ids`` plus 1.
    2 The first router that asks within ``micro_batch`` has the rows of all layers of its chunk
      read, of this rank's tokens, in one go, as they are stored: a byte an id, or two, where int64
      has 8. Layer by layer the same bytes would cross in pieces of top_k.
    3 Each router has its layer widened when it asks. In a recomputation it asks again, and
      autograd says of which micro-batch, see ``recomputation``. Nothing is queued.
    4 The rows go when the last layer that was checkpointed is recomputed, at once where none is,
      and in any case when ``schedule`` is left. The records may be released earlier: they are let
      go of in step 2.

Promises
    - Within ``micro_batch`` every MoE layer of the chunk replays, or ``ReplayError`` says which
      did not. Outside no layer does: passes of a reference or a teacher need nothing.
    - No row is replayed twice, in another micro-batch, or after the schedule's end.
    - Gradients reach the router as without replay: its own scores are gathered at the ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.router import Router
from torch import nn

from ..errors import ReplayError
from ..partition import Partition
from .megatron_model import as_chunks, decoder_routers, unwrapped
from .recomputation import Forwards, recomputing
from .router_rows import RouterRows

__all__ = ["LayerReplay", "RouteReplay"]


class RouteReplay:
    """Replays rollout routes in the MoE routers of this rank's model.

    Parameters
    ----------
    model
        The model, or the list of its virtual-pipeline chunks; wrapped (``Float16Module``, DDP) or
        not. Its routers keep what this gives them until ``close``.
    arena, timeout
        Of ``shmroute.read_batch``.

    Raises
    ------
    ReplayError
        The model has no MoE layers, replays already, or is configured so that its routers would
        not ask.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        arena: str | None = None,
        timeout: float = 5.0,
    ) -> None:
        self._forwards: Forwards[_MicroBatch] = Forwards()
        self._arena, self._timeout = arena, timeout
        self._scheduled = False
        chunks = as_chunks(model)
        found = decoder_routers(chunks)
        for router in (router for routers in found for router in routers):
            if isinstance(router.router_replay, LayerReplay):
                raise ReplayError(
                    f"layer_number {router.layer_number} replays already: keep one RouteReplay a "
                    "model, or close it before the next"
                )
        self._chunks = [_Chunk(*each, self._forwards) for each in zip(chunks, found, strict=True)]

    @contextmanager
    def schedule(self) -> Iterator[None]:
        """One call of Megatron's ``forward_backward_func``, or what takes its place.

        On leaving it, by an exception, too, all rows still held are dropped.

        Raises
        ------
        ReplayError
            It is entered within itself.
        """
        if self._scheduled:
            raise ReplayError("a schedule within a schedule: enter it around the outer one only")
        self._scheduled = True
        try:
            yield
        finally:
            self._scheduled = False
            for micro_batch in self._forwards.payloads():
                micro_batch.drop()
            self._forwards.forget()

    @contextmanager
    def micro_batch(
        self, sources: Any, *, chunk: nn.Module | None = None, tokens: Partition | None = None
    ) -> Iterator[None]:
        """The forward of one micro-batch through one chunk.

        Its backward may run inside or after it, but within ``schedule``.

        Parameters
        ----------
        sources
            The micro-batch's sequences, in its order: rids, tickets or responses, in place of one
            a list of its turns, see ``shmroute.read_batch``. A record of ``n`` rows belongs to a
            sequence of ``n + 1`` tokens. The same on each rank.
        chunk
            The model that ``forward_step_func`` is called with. None: the only one there is.
        tokens
            The rank's share of them and how they are padded. None: all of them, without padding.
            A batch of several sequences side by side, ``[length, sequences]``, needs
            ``sequence_multiple=length``. Tokens without a route have experts ``0 ... top_k - 1``.

        Raises
        ------
        ReplayError
            Outside ``schedule``, or within another forward. From the routers: a layer that the
            records do not have, another ``top_k``, other experts, other tokens. On leaving it: a
            MoE layer did not ask for its routes.
        ShmRouteError
            From the first router, what ``shmroute.read_batch`` raises.
        """
        if not self._scheduled:
            raise ReplayError(
                "a micro-batch outside a schedule: put `with replay.schedule():` around the call "
                "of forward_backward_func; leaving it drops what the backward left"
            )
        rows = RouterRows(sources, tokens, self._arena, self._timeout)
        micro_batch = _MicroBatch(self._chunk(chunk), rows)
        self._forwards.begin(micro_batch)
        try:
            yield
            micro_batch.check_complete()
        except BaseException:
            micro_batch.drop()
            raise
        finally:
            self._forwards.end()
        micro_batch.forward_done()

    @property
    def held_bytes(self) -> int:
        """Bytes on the device of rows that a recomputation may still ask for."""
        return sum(micro_batch.nbytes for micro_batch in self._forwards.payloads())

    def close(self) -> None:
        """Give the routers back what they had."""
        for chunk in self._chunks:
            for layer in chunk.layers:
                layer.detach()

    def _chunk(self, model: nn.Module | None) -> _Chunk:
        if model is None and len(self._chunks) == 1:
            return self._chunks[0]
        for chunk in self._chunks:
            if model is not None and chunk.runs(model):
                return chunk
        raise ReplayError(
            f"chunk is {'None' if model is None else f'a {type(model).__name__}'}: it is to be one "
            f"of the {len(self._chunks)} of this RouteReplay, as forward_step_func gets it"
        )


class LayerReplay:
    """What one router asks for its experts, in the place of Megatron's ``RouterReplay``.

    Attributes
    ----------
    layer_number, num_layers
        Megatron's: global, from 1 to the number of the whole model's layers.
    column
        The layer's place among those of its chunk.
    replaced
        What the router asked before, and asks outside of micro-batches. None: nothing.
    sequences_abreast
        The batch dimension of the router's last input ``[length, batch, hidden]``.
    """

    def __init__(self, router: Router, column: int, forwards: Forwards[_MicroBatch]) -> None:
        self.layer_number: int = router.layer_number
        self.num_layers: int = router.config.num_layers
        self.column = column
        self.replaced: Any = router.router_replay
        self.sequences_abreast = 1
        self._forwards = forwards
        self._router = router
        router.router_replay = self
        self._hook = router.register_forward_pre_hook(_note_input, with_kwargs=True)

    def detach(self) -> None:
        """The router asks again what it asked before."""
        if self._router.router_replay is self:
            self._router.router_replay = self.replaced
        self._hook.remove()

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's own scores at the experts that are replayed, and these.

        Parameters
        ----------
        scores
            ``[tokens, experts]``, what the router would take its top-k of.
        topk, num_groups, group_topk, default_compute_topk
            For a choice of its own, where nothing is replayed.

        Returns
        -------
        scores, experts
            ``[tokens, topk]``; the experts int64, on the device of ``scores``.
        """
        again = recomputing()
        micro_batch = self._forwards.recomputed() if again else self._forwards.running()
        if micro_batch is not None:
            experts = micro_batch.experts(self, scores, topk, again=again)
            return scores.gather(1, experts), experts
        if self.replaced is not None:
            return self.replaced.get_replay_topk(
                scores, topk, num_groups, group_topk, default_compute_topk
            )
        return default_compute_topk(scores, topk, num_groups, group_topk)


class _Chunk:
    """A chunk's layers that replay."""

    def __init__(
        self, model: nn.Module, routers: Sequence[Router], forwards: Forwards[_MicroBatch]
    ) -> None:
        self._modules = frozenset(map(id, unwrapped(model)))
        self.layers = [LayerReplay(router, at, forwards) for at, router in enumerate(routers)]
        self.layer_ids = [layer.layer_number - 1 for layer in self.layers]

    def runs(self, model: nn.Module) -> bool:
        """Whether the model is this chunk, wrapped or not."""
        return not self._modules.isdisjoint(map(id, unwrapped(model)))


class _MicroBatch:
    """The routes of one micro-batch in the layers of one chunk, from its forward to its backward.

    ::

        (nothing) -first router asks-> rows -forward done, none checkpointed-> (nothing)
                                       rows -last checkpointed layer recomputed-> (nothing)
    """

    def __init__(self, chunk: _Chunk, source: RouterRows) -> None:
        self._chunk = chunk
        self._source = source
        self._rows: torch.Tensor | None = None
        self._asked: set[int] = set()
        self._to_recompute: set[int] = set()
        self._trains = torch.is_grad_enabled()  # else a checkpoint recomputes nothing
        self._running = True

    @property
    def nbytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes

    def experts(
        self, layer: LayerReplay, scores: torch.Tensor, topk: int, *, again: bool
    ) -> torch.Tensor:
        """``int64 [tokens, topk]`` of a layer whose router asks, in the forward or ``again``."""
        self._check_turn(layer, again)
        if self._rows is None:
            self._rows = self._source.read(
                self._chunk.layer_ids,
                scores.device,
                num_layers=layer.num_layers,
                sequences_abreast=layer.sequences_abreast,
            )
        experts = self._rows[:, layer.column].to(torch.int64)
        self._source.check(layer.layer_number - 1, experts, scores, topk)
        self._asked.add(layer.column)
        if again:
            self._to_recompute.remove(layer.column)
            self._drop_if_done()
        elif self._trains and not torch.is_grad_enabled():
            self._to_recompute.add(layer.column)  # a checkpoint's forward
        return experts

    def check_complete(self) -> None:
        """Raise unless each MoE layer of the chunk has asked."""
        layers = self._chunk.layers
        silent = [layer.layer_number for layer in layers if layer.column not in self._asked]
        if silent:
            raise ReplayError(
                f"{len(silent)} of {len(layers)} MoE layers did not ask for their routes: "
                f"layer_number {silent[:16]}. Was the chunk's forward called within micro_batch? "
                "CUDA graphs that hold the router do not ask: leave moe_router, moe and whole "
                "layers out of them"
            )

    def forward_done(self) -> None:
        self._running = False
        self._drop_if_done()

    def drop(self) -> None:
        self._rows = None

    def _drop_if_done(self) -> None:
        if not self._running and not self._to_recompute:
            self.drop()

    def _check_turn(self, layer: LayerReplay, again: bool) -> None:
        if layer not in self._chunk.layers:
            raise ReplayError(
                f"layer_number {layer.layer_number} runs in a micro-batch of another chunk, that "
                f"of layer_number {[each.layer_number for each in self._chunk.layers][:16]}: give "
                "micro_batch the chunk that forward_step_func was called with"
            )
        if not again and layer.column in self._asked:
            raise ReplayError(
                f"layer_number {layer.layer_number} runs a second time in one forward: enter "
                "micro_batch for each forward"
            )
        if again and layer.column not in self._to_recompute:
            raise ReplayError(
                f"layer_number {layer.layer_number} is recomputed a second time, or by a "
                "checkpoint whose forward had gradients on: use Megatron's recompute_granularity, "
                "and one backward pass a forward"
            )


def _note_input(router: Router, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # The scores come flattened, [length * batch]: which token a row is depends on the batch.
    if isinstance(router.router_replay, LayerReplay):
        router.router_replay.sequences_abreast = (args[0] if args else kwargs["input"]).shape[1]
