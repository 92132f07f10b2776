"""Routes of an SGLang engine with an arena, in miles.

Flags::

    --custom-generate-function-path shmroute.replay.miles.generate
    --custom-megatron-before-train-step-hook-path shmroute.replay.miles.release_loaded

Where miles has the rows of a sample, ``Sample.rollout_routed_experts``, an array that travels
as its tickets is put. Ray carries it from the rollout to each trainer rank, where it becomes
what miles expects: ``int32 [tokens - 1, num_layers, top_k]``, of which the trainer pads the last
row and every other pad with -1 itself. See docs/trainers/miles.md.

When records are released: before the first training step of a rollout, behind a barrier of all
trainer ranks. By then each rank has read its rows. What no trainer was handed (filtered and
aborted samples, evaluation) stays until the engine's retention ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ReplayError
from . import row_ranges
from .row_ranges import RowRange
from .travelling import TravellingRows

if TYPE_CHECKING:
    from miles.rollout.base_types import GenerateFnInput, GenerateFnOutput
    from miles.utils.types import Sample

# What this process has read and not released yet.
_loaded: list[RowRange] = []


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """Generate one turn, as ``miles.rollout.generate_hub.single_turn`` does, routes by ticket.

    Of a sample that is continued (partial rollout) only the rows behind those it has are asked
    for.

    Raises
    ------
    ReplayError
        The response's routes are not of this sample's tokens.
    """
    from miles.rollout.base_types import GenerateFnOutput
    from miles.rollout.generate_utils.generate_endpoint_utils import (
        compute_prompt_ids_from_sample,
        compute_request_payload,
    )
    from miles.utils.http_utils import post

    args, sample, sampling = input.args, input.sample, dict(input.sampling_params)
    prompt = compute_prompt_ids_from_sample(input.state, sample)
    tokens = prompt
    if sample.response:
        tokens = sample.tokens
        sampling["max_new_tokens"] -= len(tokens) - len(prompt)
    payload, ended = compute_request_payload(args, tokens, sampling, sample.multimodal_inputs)
    if payload is None:
        sample.status = ended
        return GenerateFnOutput(samples=sample)
    payload |= {"return_routed_experts": False} if input.evaluation else routes_wanted(sample)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    await update_sample(args, sample, payload, await post(url, payload))
    return GenerateFnOutput(samples=sample)


def routes_wanted(sample: Sample) -> dict[str, int]:
    """What to add to a request's payload, so that no row is recorded twice.

    A sample that was unpickled has an array: its rows cannot be joined to a ticket, and the turn
    is asked for all of them.
    """
    known = sample.rollout_routed_experts
    return {"routed_experts_start_len": len(known)} if isinstance(known, TravellingRows) else {}


async def update_sample(
    args: Any,
    sample: Sample,
    payload: dict[str, Any],
    output: dict[str, Any],
    update_loss_mask: bool = False,
) -> None:
    """miles's ``update_sample_from_response`` for a response with a ticket.

    For generate functions of your own: call it where they call miles's. A turn's routes are
    joined to those that the sample has, whether it repeats the prefix or begins behind it.

    Raises
    ------
    ReplayError
        The turn leaves a gap, its routes end at another token than the sample, or it has none;
        or it is a delta, and the sample's rows an array, see ``routes_wanted``.
    """
    from miles.rollout.generate_utils.generate_endpoint_utils import update_sample_from_response

    meta_info = dict(output["meta_info"])
    ticket = meta_info.pop("routed_experts", None)
    known = sample.rollout_routed_experts
    await update_sample_from_response(
        args, sample, payload, {**output, "meta_info": meta_info}, update_loss_mask
    )
    tokens = len(sample.tokens)
    if ticket is not None:
        sample.rollout_routed_experts = travelling(ticket, known, args, tokens=tokens)
    elif known is not None and len(known) == tokens - 1:
        sample.rollout_routed_experts = known  # nothing was generated
    elif payload.get("return_routed_experts") and meta_info.get("output_token_logprobs"):
        raise ReplayError(
            f"the response brings sample {sample.index} to {tokens} tokens and carries no "
            "routed_experts: start the engine with --shmroute-arena NAME"
        )


def travelling(
    ticket: Any,
    known: TravellingRows | npt.NDArray[np.int32] | None,
    args: Any,
    *,
    tokens: int,
) -> TravellingRows:
    """The routes of a sequence of ``tokens`` tokens: those known, and a turn's.

    Raises
    ------
    ReplayError
        See ``update_sample``.
    """
    turn, start = row_ranges.rows_of(ticket, top_k=args.moe_router_topk)
    before = known.ranges if isinstance(known, TravellingRows) else ()
    if start and known is not None and not isinstance(known, TravellingRows):
        raise ReplayError(
            f"this turn has routes from token {start} on, and the sample's {len(known)} rows were "
            "read when it was unpickled, with no ticket left to join: ask such a sample's turn for "
            "all rows, without routed_experts_start_len, as routes_wanted(sample) does"
        )
    ranges = row_ranges.joined(before, turn, start, tokens=tokens)
    return TravellingRows(ranges, args.num_layers, args.moe_router_topk, load)


def load(ranges: Sequence[RowRange], num_layers: int, top_k: int) -> npt.NDArray[np.int32]:
    """The rows in a trainer rank, as miles's native path has them there."""
    rows = row_ranges.native(ranges, num_layers=num_layers, top_k=top_k)
    _loaded.extend(ranges)
    return rows


def release_loaded(
    args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any
) -> None:
    """Release the records of a rollout before its first training step.

    A hook of ``--custom-megatron-before-train-step-hook-path``, called on every rank.
    """
    if step_id:
        return
    import torch.distributed as dist
    from miles.utils.distributed_utils import get_gloo_group

    # Tensor- and pipeline-parallel ranks read the same records: none goes before all have.
    dist.barrier(group=get_gloo_group())
    released, _loaded[:] = list(_loaded), []
    row_ranges.release_all(released)
