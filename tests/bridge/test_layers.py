"""Models whose routes would not all be captured stop the start, by SGLang's own module types."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_bridge.errors import StartRefused

CONFIG = SimpleNamespace(num_experts_per_tok=2, num_hidden_layers=3)


@pytest.fixture
def make(sglang: SimpleNamespace) -> Any:
    """SGLang's modules, by the part they play."""
    import moe_layers

    return moe_layers


def layout(*modules: torch.nn.Module, device: str = "cpu", config: Any = CONFIG) -> Any:
    from sglang_bridge.layers import route_layout

    model = torch.nn.ModuleList(modules)
    return route_layout(model, model_name="made", config=config, device=device)


def test_only_the_layers_that_route_are_kept(make: Any) -> None:
    routes = layout(make.router(1), make.experts(1), make.router(2), make.experts(2))
    assert routes.layer_ids == (1, 2)
    assert (routes.num_experts, routes.top_k, routes.num_layers) == (8, 2, 3)


def test_a_model_without_moe_layers_is_refused(make: Any) -> None:
    with pytest.raises(StartRefused, match="no MoE layer"):
        layout(torch.nn.Linear(2, 2))


def test_zero_experts_are_refused(make: Any) -> None:
    """SGLang replaces their ids, in the routers' own tensors, by that of the first expert."""
    config = SimpleNamespace(**vars(CONFIG), zero_expert_num=256)
    with pytest.raises(StartRefused, match="256 of the experts are zero experts"):
        layout(make.router(1), make.experts(1), config=config)
    config.zero_expert_num = 0
    assert layout(make.router(1), make.experts(1), config=config).layer_ids == (1,)


def test_hash_routing_is_refused(make: Any) -> None:
    with pytest.raises(StartRefused, match="layer 0 routes by token hash"):
        layout(make.hashed(0), make.router(1), make.experts(1))


def test_a_router_that_is_not_captured_is_refused(make: Any) -> None:
    with pytest.raises(StartRefused, match="layer 1: SGLang does not capture"):
        layout(make.router(1, captured=False), make.experts(1))


def test_routing_inside_the_kernel_is_refused_where_kernels_route(make: Any) -> None:
    modules = make.router(1, inside=True), make.experts(1)
    assert layout(*modules, device="cpu").layer_ids == (1,)
    with pytest.raises(StartRefused, match="chooses the experts inside"):
        layout(*modules, device="cuda")


def test_experts_without_a_router_are_refused(make: Any) -> None:
    with pytest.raises(StartRefused, match=r"MoE layers \[2\] have no TopK"):
        layout(make.router(1), make.experts(1), make.experts(2))


def test_a_router_without_experts_is_refused(make: Any) -> None:
    with pytest.raises(StartRefused, match=r"layers \[2\] have a router and no FusedMoE"):
        layout(make.router(1), make.experts(1), make.router(2))


@pytest.mark.parametrize("change", ["top_k", "experts"])
def test_layers_of_different_shapes_are_refused(make: Any, change: str) -> None:
    second = (
        (make.router(2, top_k=3), make.experts(2))
        if change == "top_k"
        else (make.router(2), make.experts(2, 16))
    )
    with pytest.raises(StartRefused, match="MoE layers differ"):
        layout(make.router(1), make.experts(1), *second)
