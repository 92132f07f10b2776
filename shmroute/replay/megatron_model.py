"""Which routers of a Megatron-core model replay, and whether they would ask for their experts.

Layers for multi-token prediction are left out: they compute other tokens, and the rollout has no
routes of them. By number they could not be told apart: Megatron-core 0.16 numbers them on from the
decoder's, later versions from 1 again. Instances of ``RouterReplay`` say less still, for they are
listed in the order of their making, those of discarded models among them. So the model is walked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionLayer,
)
from torch import nn

from ..errors import ReplayError

# Load balancing that chooses experts without asking ``router_replay``.
_OWN_CHOICE = ("sinkhorn", "quantile_balancing")


def decoder_routers(chunks: Sequence[nn.Module]) -> list[list[Router]]:
    """The routers of each chunk's decoder layers, in the order of the layers.

    Raises
    ------
    ReplayError
        There are none in a model that is to have none on any rank, or one of them would not ask
        its ``router_replay``.
    """
    found = [list(_routers(chunk)) for chunk in chunks]
    # A pipeline stage may have dense layers only: what counts is the whole model's configuration.
    if not any(found) and not any(_experts(chunk) for chunk in chunks):
        raise ReplayError(
            f"no MoE router in {', '.join(type(chunk).__name__ for chunk in chunks) or 'no model'}"
            ": give the model, or the list of its chunks, that forward_backward_func gets"
        )
    for routers in found:
        for router in routers:
            _check(router)
    return found


def as_chunks(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """One model or the list of its chunks, as a list.

    Raises
    ------
    ReplayError
        It is something else.
    """
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    for chunk in chunks:
        if not isinstance(chunk, nn.Module):
            raise ReplayError(
                f"the model, or a chunk of it, is a {type(chunk).__name__}: give the module, or "
                "the list of modules, that forward_backward_func gets"
            )
    return chunks


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what it wraps (``Float16Module``, DDP), and so on."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        yield inner
        inner = getattr(inner, "module", None)


def _routers(module: nn.Module) -> Iterator[Router]:
    if isinstance(module, Router):
        yield module
    elif not isinstance(module, (MultiTokenPredictionBlock, MultiTokenPredictionLayer)):
        for child in module.children():
            yield from _routers(child)


def _experts(chunk: nn.Module) -> int | None:
    """Of the whole model's MoE layers; None where it has none or does not say."""
    configs = (getattr(module, "config", None) for module in unwrapped(chunk))
    return next(filter(None, (getattr(each, "num_moe_experts", None) for each in configs)), None)


def _check(router: Router) -> None:
    config, where = router.config, f"the router of layer_number {router.layer_number}"
    if router.layer_number is None:
        raise ReplayError(
            "a router without layer_number: build its MoE layer within a TransformerLayer, or call "
            "set_layer_number"
        )
    if getattr(config, "moe_router_fusion", False):
        raise ReplayError(f"{where} is fused and asks nobody: set moe_router_fusion=False")
    if config.moe_router_load_balancing_type in _OWN_CHOICE:
        raise ReplayError(
            f"{where} has moe_router_load_balancing_type="
            f"{config.moe_router_load_balancing_type!r}, which chooses without asking: the rollout "
            "chose by top-k, so use 'none', 'aux_loss', 'seq_aux_loss' or 'global_aux_loss'"
        )
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        raise ReplayError(
            f"{where} runs in schedule plans that mix micro-batches: set "
            "overlap_moe_expert_parallel_comm=False"
        )
