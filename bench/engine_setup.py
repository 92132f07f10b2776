"""The engines that ``engine.py`` measures: their model, their arguments, the sizes of the load.

On a GPU the model has every dimension of Qwen3-30B-A3B with random weights, so nothing is
fetched; on a CPU it is a tiny one of the same architecture, on which figures mean nothing and
only the way they are taken is tried. Which of the two is decided by torch seeing a GPU.

Configurations
    off      SGLang, routes not asked for: what the others are held against
    native   SGLang's ``enable_return_routed_experts``, every request asks
    arena    the same server with ``--shmroute-arena``, every request asks
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CONFIGURATIONS = ("off", "native", "arena")

QWEN3_30B_A3B: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
TINY: Mapping[str, Any] = {
    **QWEN3_30B_A3B,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class LongFinishes:
    """Long requests that finish beside steady streams.

    Attributes
    ----------
    name
        Their length, as figures name it.
    prompt
        Tokens of each long prompt.
    phases
        For each phase the output lengths of its long requests, which are sent together: equal
        lengths finish in the same step.
    stream_prompt, stream_output
        Tokens of each steady stream; it must outlast the phases.
    """

    name: str
    prompt: int
    phases: tuple[tuple[int, ...], ...]
    stream_prompt: int
    stream_output: int


@dataclass(frozen=True, slots=True)
class Turns:
    """Conversations that go on together: tokens that each turn's prompt and answer add."""

    conversations: int
    turns: int
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of every load on one kind of machine."""

    batch: int
    prompt: int
    output: int
    throughput_runs: int
    streams: int
    finishes: tuple[tuple[LongFinishes, int], ...]  # and how often each is run
    settle_seconds: float
    turns: Turns
    turns_runs: int
    steady_requests: int
    latency_prompts: tuple[tuple[str, int], ...]
    latency_repeats: int
    kv_tokens: int
    memory_fraction: float  # of free GPU memory, as SGLang's ``mem_fraction_static``
    capacity: str


GPU = Scale(
    batch=160,
    prompt=256,
    output=512,
    throughput_runs=2,
    streams=64,
    finishes=(
        (LongFinishes("8K", 8000, ((120, 170, 220, 270, 350, 350, 350, 350),), 256, 520), 2),
        # 4 x 32,768 tokens and the streams just fit into the KV cache.
        (LongFinishes("32K", 32_728, ((40,), (40, 40, 40, 40)), 64, 260), 1),
    ),
    settle_seconds=0.1,
    turns=Turns(conversations=32, turns=4, prompt=896, output=128),
    turns_runs=2,
    steady_requests=320,
    latency_prompts=(("1K", 1008), ("8K", 8176), ("32K", 32_752)),
    latency_repeats=6,
    # Below what mem_fraction_static leaves, so that every configuration has the same.
    kv_tokens=163_840,
    memory_fraction=0.92,
    capacity="8GiB",
)
GPU_QUICK = replace(
    GPU,
    output=64,
    throughput_runs=1,
    finishes=(
        (LongFinishes("8K", 8000, ((20, 30, 40, 40),), 64, 130), 1),
        (LongFinishes("32K", 32_728, ((20,),), 64, 130), 1),
    ),
    turns_runs=1,
    steady_requests=200,
    latency_repeats=4,
)
# What two engines at once have memory for on one H200 of 139 GiB.
GPU_ROUNDS = replace(
    GPU,
    output=256,
    throughput_runs=1,
    finishes=((LongFinishes("8K", 8000, ((60, 90, 120, 120, 120, 120),), 64, 300), 1),),
    kv_tokens=84_992,
    memory_fraction=0.95,
)
CPU = Scale(
    batch=6,
    prompt=12,
    output=16,
    throughput_runs=2,
    streams=3,
    finishes=(
        (LongFinishes("300", 300, ((10, 15, 20, 20),), 12, 60), 2),
        (LongFinishes("900", 900, ((8,), (8, 8)), 12, 70), 1),
    ),
    settle_seconds=0.02,
    turns=Turns(conversations=4, turns=4, prompt=120, output=16),
    turns_runs=8,  # of a second each
    steady_requests=12,
    latency_prompts=(("100", 92), ("1K", 1000)),
    latency_repeats=4,
    kv_tokens=16_384,
    memory_fraction=0.2,
    capacity="64MiB",
)
CPU_QUICK = replace(
    CPU,
    throughput_runs=1,
    finishes=((LongFinishes("300", 300, ((8, 12, 12),), 12, 70), 1),),
    turns_runs=1,
    latency_repeats=2,
)


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def scale_for(gpu: bool, quick: bool, rounds: bool = False) -> Scale:
    """``rounds``: engines that are up at once, on one GPU."""
    if gpu and rounds:
        return GPU_ROUNDS
    if gpu:
        return GPU_QUICK if quick else GPU
    return CPU_QUICK if quick or rounds else CPU


def dimensions(gpu: bool) -> Mapping[str, Any]:
    """The model's ``config.json``."""
    return QWEN3_30B_A3B if gpu else TINY


def write_model(folder: Path, gpu: bool) -> Path:
    """Write a model folder that ``load_format="dummy"`` can start from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dimensions(gpu)))
    return folder


def server_flags(
    configuration: str, scale: Scale, *, arena: str, gpu: bool, prefill_graph: bool
) -> list[str]:
    """Flags for ``sglang.launch_server``: the same for every configuration but for the routes."""
    arguments: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "random_seed": 1,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "max_running_requests": scale.batch,
        "max_total_tokens": scale.kv_tokens,
        "mem_fraction_static": scale.memory_fraction,
        "log_level": "info",
        "decode_log_interval": 100,
    }
    if configuration == "native":
        arguments["enable_return_routed_experts"] = True
    elif configuration == "arena":
        arguments |= {"shmroute_arena": arena, "shmroute_capacity": scale.capacity}
    arguments |= _gpu_arguments(scale, prefill_graph) if gpu else _CPU_ARGUMENTS
    return [word for name, value in arguments.items() for word in _flag(name, value)]


def _flag(name: str, value: Any) -> Iterator[str]:
    yield "--" + name.replace("_", "-")
    if isinstance(value, list):
        yield from map(str, value)
    elif value is not True:
        yield str(value)


def _gpu_arguments(scale: Scale, prefill_graph: bool) -> dict[str, Any]:
    sizes = {1, 2, 4, 8, scale.streams, scale.streams + 8, 96, 128, scale.batch}
    arguments = {
        "attention_backend": "triton",
        "moe_runner_backend": "triton",
        "chunked_prefill_size": 8192,
        # Few: each takes time at the start.
        "cuda_graph_bs_decode": sorted(sizes),
    }
    if prefill_graph:
        return {**arguments, "cuda_graph_bs_prefill": [256, 512, 1024, 2048]}
    return {**arguments, "disable_prefill_cuda_graph": True}


#: Beside ``engine_process.CPU_ARGS``.
_CPU_ARGUMENTS = {"chunked_prefill_size": 512}
