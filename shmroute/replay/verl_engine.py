"""verl's Megatron engine, its routes read from the arena where a rank needs them.

verl's configuration: see ``verl_agent_loop``, which puts a sample's tickets into the batch. Here
they become, for each micro-batch, what verl's R3 takes: ``routed_experts``, jagged ``int16
[batch, tokens, moe_layers, top_k]`` on the rank's GPU. verl's own code cuts it to the rank's
context- and sequence-parallel share. Only MoE layers are in it, which verl counts itself.

Row ``i`` is token ``i``'s. The last token of a sequence has none, nor have tokens that a tool
added behind the last turn: their rows are experts ``0 .. top_k - 1``, a set, since verl replays
all rows but the last, whose routing it leaves to the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from verl.utils import tensordict_utils
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from ..errors import ReplayError
from . import row_ranges
from .row_ranges import RowRange
from .verl import ROUTES  # the import fills in what verl's rollout server lacks


@EngineRegistry.register(
    model_type="language_model", backend="megatron", device="cuda", vendor="nvidia"
)
class RoutedMegatronEngine(MegatronEngineWithLMHead):
    """verl's engine for language models, with routes by ticket.

    Registered for NVIDIA's GPUs, which verl prefers to the engine it has for any vendor.
    """

    def prepare_model_inputs(self, batch: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_model_inputs(batch)
        samples = tensordict_utils.get(batch, ROUTES)
        if samples is not None and inputs["routed_experts"] is None:
            inputs["routed_experts"] = read_jagged(samples, inputs["input_ids"])
        return inputs


def read_jagged(samples: Sequence[Sequence[RowRange] | None], input_ids: Any) -> Any:
    """Routes of a micro-batch as verl's R3 takes them.

    Parameters
    ----------
    samples
        Tickets of each sequence.
    input_ids
        Jagged ``[batch, tokens]``, on the device to which the routes are read.

    Returns
    -------
    torch.Tensor
        Jagged ``int16 [batch, tokens, moe_layers, top_k]``, of the lengths of ``input_ids``.

    Raises
    ------
    ReplayError
        A sample has no tickets, or more rows than tokens.
    ShmRouteError
        What ``shmroute.read_batch`` raises.
    """
    offsets = input_ids.offsets()
    begins = offsets.tolist()
    places: list[tuple[int, RowRange]] = []
    unrouted: list[tuple[int, int]] = []
    for index, (ranges, at) in enumerate(zip(samples, begins, strict=False)):
        end, rows = begins[index + 1], row_ranges.count(ranges or ())
        if not rows or rows > end - at:
            raise ReplayError(
                f"sequence {index} of a micro-batch has {end - at} tokens and routes for {rows}: "
                "do all of its samples come from an engine with an arena, uncut?"
            )
        unrouted.append((at + rows, end))
        for part in ranges or ():
            places.append((at, part))
            at += part.rows
    routed = row_ranges.read_placed(places, rows=begins[-1], device=offsets.device)
    values = routed.to(torch.int16)
    for first, end in unrouted:
        values[first:end] = torch.arange(values.shape[-1], dtype=values.dtype, device=values.device)
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets)
