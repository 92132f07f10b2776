"""Small real Megatron-core models, and what Megatron needs to run them on a CPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

# A dependency that is built for GPUs and cannot be loaded on a machine without; Megatron takes
# its absence well.
sys.modules.setdefault("flash_mla", None)  # type: ignore[arg-type]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries for GPUs that are not there
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

# Without Transformer Engine, Megatron-core 0.16.1 asks whether this is None and has not named it.
vars(moe_utils).setdefault("te_general_gemm", None)

process_groups = moe_utils.get_default_pg_collection

EXPERTS, TOP_K, VOCAB, HIDDEN = 16, 4, 32, 16


@contextmanager
def megatron_on_a_cpu(*, stages: int = 1) -> Iterator[None]:
    """Megatron as the last rank of a pipeline, on a CPU; of 2 stages with 2 chunks each.

    The ranks' process group is torch's fake one: nothing that is called here communicates with
    another stage. What is replaced are questions to a GPU: which it is, and what its random
    generator's state is.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state())
        patch.setattr(megatron_random, "_get_cuda_rng_state", lambda *_, **__: None)
        patch.setattr(megatron_random, "_set_cuda_rng_state", lambda *_, **__: None)
        torch.distributed.init_process_group(
            "fake", rank=stages - 1, world_size=stages, store=FakeStore()
        )
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=2 if stages > 1 else None,
        )
        tensor_parallel.get_cuda_rng_tracker().add("model-parallel-rng", 1)
        try:
            yield
        finally:
            tensor_parallel.get_cuda_rng_tracker().reset()
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def config(**changes: Any) -> TransformerConfig:
    """Three layers, the first dense, on one pipeline stage."""
    settings: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_ffn_hidden_size": 8,
        "moe_layer_freq": [0, 1, 1],
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "bias_dropout_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**{**settings, **changes})


def pipelined(**changes: Any) -> TransformerConfig:
    """Eight layers in four chunks of two, on two pipeline stages."""
    settings: dict[str, Any] = {
        "num_layers": 8,
        "moe_layer_freq": [0, 1, 1, 1, 1, 1, 1, 1],
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.float32,
    }
    return config(**{**settings, **changes})


def gpt(
    settings: TransformerConfig,
    *,
    vp_stage: int | None = None,
    first: bool | None = None,
    last: bool | None = None,
) -> GPTModel:
    """A GPT model, or a chunk from its middle; always the same weights for the same settings.

    ``first`` and ``last`` say whether a chunk has the embedding and the output layer.
    """
    torch.manual_seed(0)
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, vp_stage=vp_stage)
    mtp = settings.mtp_num_layers and get_gpt_mtp_block_spec(
        settings, spec, use_transformer_engine=False
    )
    model = GPTModel(
        settings,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=64,
        pre_process=vp_stage is None if first is None else first,
        post_process=vp_stage is None if last is None else last,
        position_embedding_type="rope",
        vp_stage=vp_stage,
        mtp_block_spec=mtp or None,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.data.normal_()  # scores far from each other: a choice does not hang on noise
    return model


def logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """``[batch, length, vocabulary]`` of tokens ``[batch, length]``."""
    return model(tokens, *_positions(*tokens.shape))


def loss(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """``[batch, length]``; multi-token prediction, which asks for labels, adds its gradients."""
    return model(tokens, *_positions(*tokens.shape), labels=tokens)


def through(chunk: GPTModel, hidden: torch.Tensor) -> torch.Tensor:
    """A middle chunk's output for another's, ``[length, batch, hidden]``."""
    chunk.set_input_tensor(hidden)
    length, batch = hidden.shape[:2]
    return chunk(None, *_positions(batch, length))


def routers(model: nn.Module) -> list[nn.Module]:
    """All of a model's, those of multi-token prediction last."""
    return [module for name, module in model.named_modules() if name.endswith("mlp.router")]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Routed:
    """What each router decided, forward by forward: ``bool [tokens, experts]`` of each."""

    def __init__(self, *models: nn.Module) -> None:
        self.maps: dict[int, list[torch.Tensor]] = {}
        for model in models:
            for router in routers(model):
                self.maps[router.layer_number] = []
                router.register_forward_hook(self._note)

    def _note(self, router: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.maps[router.layer_number].append(output[1].detach())

    def take(self) -> dict[int, list[torch.Tensor]]:
        """Since the last time, by ``layer_number``."""
        taken = {layer: list(maps) for layer, maps in self.maps.items()}
        for maps in self.maps.values():
            maps.clear()
        return taken


def as_map(experts: Sequence[Any] | Any) -> torch.Tensor:
    """``bool [tokens, experts]`` of ids ``[tokens, top_k]``."""
    ids = torch.as_tensor(experts, dtype=torch.int64)
    return torch.zeros(len(ids), EXPERTS, dtype=torch.bool).scatter(1, ids, True)


def _positions(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids, and the causal mask, which Megatron else makes on a GPU."""
    mask = torch.triu(torch.ones(1, 1, length, length), 1).bool()
    return torch.arange(length).expand(batch, length), mask
