"""verl's agent loop, handing tickets on instead of rows; for ``verl_engine``.

verl's configuration (its trainer with the transfer queue has workers of its own)::

    trainer.use_v1=False
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=\
        shmroute.replay.verl_agent_loop.TicketAgentLoopManager
    actor_rollout_ref.model.external_lib=shmroute.replay.verl_engine

verl's own worker pads a sample's rows to ``int16 [prompt_length + response_length, num_layers,
top_k]``, 768 bytes a token for 48 layers and top-8, pads included. They go to the driver, and on
to each trainer rank. Here a sample carries its tickets, in ``extra_fields["shmroute"]``.

When records are released: with the second batch after theirs, when no trainer reads them any
more, also where generation is one step ahead of training; validation's at once.
"""

from __future__ import annotations

import collections
from typing import Any

import ray
from verl import DataProto
from verl.experimental.agent_loop import AgentLoopManager, AgentLoopWorker
from verl.utils.ray_utils import auto_await

from . import row_ranges, verl
from .row_ranges import RowRange
from .travelling import TravellingRows
from .verl import ROUTES

_BATCHES_KEPT = 2


class TicketAgentLoopWorker(AgentLoopWorker):
    """``AgentLoopWorker`` whose samples carry the tickets of their routes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        verl.keep_tickets()
        super().__init__(*args, **kwargs)

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> Any:
        put_tickets_aside(output)
        return await super()._agent_loop_postprocess(output, validate, **kwargs)


def put_tickets_aside(output: Any) -> None:
    """Move an ``AgentLoopOutput``'s routes, if they are tickets, to its extra fields."""
    if isinstance(output.routed_experts, TravellingRows):
        output.extra_fields[ROUTES] = output.routed_experts.ranges
        output.routed_experts = None


class TicketAgentLoopManager(AgentLoopManager):
    """``AgentLoopManager`` with ``TicketAgentLoopWorker``s; it releases what they handed on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.agent_loop_workers_class = ray.remote(TicketAgentLoopWorker)
        self.trained_on = HandedOn()
        super().__init__(*args, **kwargs)

    @auto_await
    async def generate_sequences(self, prompts: DataProto) -> DataProto:
        self.trained_on.begin_batch(validate=prompts.meta_info.get("validate", False))
        output = await super().generate_sequences(prompts)
        self.trained_on.end_batch(output)
        return output


class HandedOn:
    """Tickets of the batches that trainers may still read."""

    def __init__(self) -> None:
        self._batches: collections.deque[list[RowRange]] = collections.deque()
        self._validate = False

    def begin_batch(self, *, validate: bool) -> None:
        """A batch is about to be generated: the one before the last has been trained on."""
        self._validate = validate
        while not validate and len(self._batches) >= _BATCHES_KEPT:
            row_ranges.release_all(self._batches.popleft())

    def end_batch(self, output: DataProto) -> None:
        """A batch was generated; nobody trains on that of a validation."""
        samples = output.non_tensor_batch.get(ROUTES, ())
        tickets = [part for ranges in samples for part in ranges or ()]
        if self._validate:
            output.non_tensor_batch.pop(ROUTES, None)
            row_ranges.release_all(tickets)
        else:
            self._batches.append(tickets)
