"""Routes of an SGLang engine with an arena, in slime.

Flag::

    --custom-generate-function-path shmroute.replay.slime.generate

slime's own generate function then gets, in place of the base64 of all rows, a tensor that has
none yet: ``lazy_tensor.LazyRoutes``. slime joins it, checks it, hands it through Ray and cuts it
to each rank's tokens as it does its own; ``RoutingReplay.record`` keeps it as a lazy resource,
and ``int32 [T_local, top_k]`` of a layer appears on a rank's GPU when that layer's router asks.
Pads and last rows are slime's own: ``arange % num_experts``. See docs/trainers/slime.md.

When records are released: with ``RoutingReplay.clear_all``, which slime calls behind the last
optimizer step of a rollout. That step needs every rank's gradients, so every rank has read
by then. What no trainer was handed (filtered and aborted samples, evaluation) stays until the
engine's retention ends.

Written against slime's documented interface; slime is not on the package index.
"""

from __future__ import annotations

from typing import Any

from ..errors import ReplayError
from . import row_ranges
from .lazy_tensor import LazyRoutes


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """slime's ``sglang_rollout.generate``, its routes by ticket.

    For a generate function of your own see ``with_routes``.

    Raises
    ------
    ReplayError
        slime took the response without handing over its ``meta_info`` as it documents.
    """
    from slime.rollout import sglang_rollout

    append = sample.append_response_tokens
    taken: list[bool] = []

    def append_with_routes(
        args: Any = None, *, meta_info: dict[str, Any] | None = None, **response: Any
    ) -> Any:
        taken.append(True)
        routed = None if meta_info is None else with_routes(args, meta_info)
        return append(args, meta_info=routed, **response)

    tokens = len(sample.tokens)
    # On this sample only: the class stays as it is for everybody else.
    sample.append_response_tokens = append_with_routes
    try:
        generated = await sglang_rollout.generate(args, sample, sampling_params)
    finally:
        del sample.append_response_tokens
    if not taken and sample.response_length and len(sample.tokens) != tokens:
        raise ReplayError(
            "this slime's generate does not append its response with Sample.append_response_tokens:"
            " call shmroute.replay.slime.with_routes in a generate function of your own"
        )
    return generated


def with_routes(args: Any, meta_info: dict[str, Any]) -> dict[str, Any]:
    """A response's ``meta_info`` as slime's ``Sample.append_response_tokens`` takes it.

    For generate functions of your own::

        sample.append_response_tokens(
            args, tokens=..., log_probs=..., trainable=True, text=...,
            meta_info=with_routes(args, output["meta_info"]),
        )

    Parameters
    ----------
    args
        slime's arguments: ``num_layers``, ``moe_router_topk``.
    meta_info
        With a ticket as ``routed_experts``; without one it is returned as it is.

    Returns
    -------
    dict
        A copy in which ``routed_experts`` is the rows, a lazy int32 tensor, and
        ``routed_experts_start_len`` the token that the first belongs to, as the record says.
        A turn that was asked for with ``routed_experts_start_len`` is joined by slime.

    Raises
    ------
    ReplayError
        The routes are of another top-k.
    InvalidTicket, RouteFailed
        See ``shmroute.errors``.
    """
    ticket = meta_info.get("routed_experts")
    if ticket is None:
        return meta_info
    turn, start = row_ranges.rows_of(ticket, top_k=args.moe_router_topk)
    rows = LazyRoutes([turn], (args.num_layers, args.moe_router_topk))
    return {**meta_info, "routed_experts": rows, "routed_experts_start_len": start}
