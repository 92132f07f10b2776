"""Which layers of the served model route, and how: the arena's ``RouteLayout``.

The layers come from the model's own modules and not from its config, whose fields for
dense first layers, sparse steps and shared experts differ from family to family. Layers
that would never be captured stop the start, because their rows would be missing for ever.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.hash_topk import HashTopK
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat

from shmroute import RouteLayout

from .errors import StartRefused
from .versions import is_draft_router, routes_inside_kernel, shared_slots

# On these the experts are chosen inside the MoE kernel, out of the capturer's sight.
_ROUTED_INSIDE = (TopKOutputFormat.TRITON_KERNEL, TopKOutputFormat.BYPASSED)


def route_layout(
    model: torch.nn.Module, *, model_name: str, config: Any, device: str
) -> RouteLayout:
    """Describe the routes that the capture buffer of ``model`` will hold.

    Parameters
    ----------
    config
        The text model's config; its ``num_experts_per_tok`` and ``num_hidden_layers``
        size SGLang's capture buffer.
    device
        Where the model runs: the CPU's forwards capture whatever their output format.

    Raises
    ------
    StartRefused
        A MoE layer whose routes SGLang does not capture, or layers that route differently.
    """
    routers = [m for m in model.modules() if isinstance(m, TopK) and not is_draft_router(m)]
    for module in model.modules():
        if isinstance(module, HashTopK) and not is_draft_router(module):
            raise StartRefused(
                f"layer {module.layer_id} routes by token hash: SGLang captures no routes there"
            )
    for router in routers:
        _check_captured(router, device)
    if getattr(config, "zero_expert_num", 0):
        raise StartRefused(
            f"{config.zero_expert_num} of the experts are zero experts, which are none of the MoE "
            "kernel's: their ids are beyond it, and SGLang rewrites them behind the routers"
        )
    layer_ids = sorted({int(router.layer_id) for router in routers})
    experts = {
        int(module.layer_id): int(module.num_global_routed_experts)
        for module in model.modules()
        if isinstance(module, FusedMoE) and int(module.layer_id) in layer_ids
    }
    if not layer_ids:
        raise StartRefused(f"{model_name} has no MoE layer, so there are no routes to keep")
    _check_same(model, layer_ids, experts, routers, config)
    return RouteLayout(
        num_experts=next(iter(experts.values())),
        top_k=int(config.num_experts_per_tok),
        layer_ids=layer_ids,
        model=model_name,
        num_layers=int(config.num_hidden_layers),
    )


def _check_captured(router: TopK, device: str) -> None:
    topk = router.topk_config
    if not topk.allow_routed_experts_capture:
        raise StartRefused(f"layer {router.layer_id}: SGLang does not capture its routes")
    inside = topk.output_format in _ROUTED_INSIDE or routes_inside_kernel(topk)
    if inside and torch.device(device).type != "cpu":
        form = getattr(topk.output_format, "name", "by its backend")
        raise StartRefused(
            f"layer {router.layer_id}: its MoE kernel chooses the experts inside ({form}), so "
            "SGLang captures no routes: start with --moe-runner-backend triton"
        )


def _check_same(
    model: torch.nn.Module,
    layer_ids: list[int],
    experts: dict[int, int],
    routers: list[TopK],
    config: Any,
) -> None:
    moe = {int(m.layer_id) for m in model.modules() if isinstance(m, FusedMoE)}
    unseen = sorted(moe - set(layer_ids))
    if unseen:
        raise StartRefused(f"MoE layers {unseen} have no TopK module: their routes are not seen")
    if set(experts) != set(layer_ids):
        raise StartRefused(
            f"layers {sorted(set(layer_ids) - set(experts))} have a router and no FusedMoE: the "
            "number of their experts is unknown"
        )
    widths = {int(r.topk_config.top_k) - shared_slots(r.topk_config) for r in routers}
    if widths != {int(config.num_experts_per_tok)} or len(set(experts.values())) != 1:
        raise StartRefused(
            f"MoE layers differ (top-k {sorted(widths)}, experts {sorted(set(experts.values()))}, "
            f"config top-k {config.num_experts_per_tok}): one arena holds one shape"
        )
