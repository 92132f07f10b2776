"""Small random-weight MoE checkpoints with a working tokenizer, made without a download.

Problem: tests and the demo need models that the real engine serves, whose
routing differs between tokens as in a trained model. SGLang's dummy weights are
so small that the routers hardly tell tokens apart.

Approach: transformers builds and saves the model; weights are drawn with a
standard deviation of ``1 / sqrt(fan in)``, so that every layer keeps its input's
variance and attention moves the routers as much as the token does. The
tokenizer is a byte-level BPE whose merges are written down instead of trained:
any text survives a round trip and every id of the vocabulary has a text. The
same arguments and seed give the same files.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_POSITIONS = 8192
# Releases of transformers save the same number under different names.
EXPERT_COUNT = ("num_local_experts", "n_routed_experts", "num_experts")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a reader of routes must know of a checkpoint."""

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    num_layers: int
    vocab_size: int


def shape_of(path: Path | str) -> ModelShape:
    """The shape of a checkpoint that this module wrote, from its ``config.json``."""
    config = json.loads(Path(path, "config.json").read_text())
    layers = config["num_hidden_layers"]
    return ModelShape(
        num_experts=next(config[name] for name in EXPERT_COUNT if name in config),
        top_k=config["num_experts_per_tok"],
        layer_ids=tuple(range(config.get("first_k_dense_replace", 0), layers)),
        num_layers=layers,
        vocab_size=config["vocab_size"],
    )


def qwen3_moe(
    path: Path | str,
    *,
    num_experts: int = 32,
    top_k: int = 4,
    layers: int = 4,
    hidden: int = 128,
    expert_width: int = 32,
    vocab: int = 1024,
    logits_std: float = 1.0,
    seed: int = 0,
) -> Path:
    """Write a Qwen3-MoE checkpoint (every layer is MoE) and return its folder.

    ``logits_std`` is the standard deviation of its logits, by a factor on the output matrix. With
    1 each token of the vocabulary is about as likely as any other; trained models are more certain.
    """
    config = Qwen3MoeConfig(
        **_common(hidden, layers, vocab),
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=expert_width,
        norm_topk_prob=True,
    )
    return _save(Path(path), Qwen3MoeForCausalLM, config, seed, logits_std)


def deepseek_v3(
    path: Path | str,
    *,
    num_experts: int = 64,
    top_k: int = 4,
    layers: int = 4,
    hidden: int = 128,
    expert_width: int = 32,
    vocab: int = 1024,
    latent: int = 64,
    rotary: int = 16,
    seed: int = 0,
) -> Path:
    """Write a DeepSeek-V3 checkpoint and return its folder.

    The first layer is dense, the others have one shared expert and pick their
    experts from two of four groups.
    """
    config = DeepseekV3Config(
        **_common(hidden, layers, vocab),
        num_key_value_heads=4,
        n_routed_experts=num_experts,
        num_experts_per_tok=top_k,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        # Settings of the original checkpoints that transformers does not know but SGLang reads.
        moe_layer_freq=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_intermediate_size=expert_width,
        q_lora_rank=64,
        kv_lora_rank=latent,
        qk_nope_head_dim=32,
        qk_rope_head_dim=rotary,
        v_head_dim=32,
        # SGLang's MLA on a CPU runs only with the yarn form of rotary embedding.
        rope_scaling={
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": MAX_POSITIONS,
        },
    )
    return _save(Path(path), DeepseekV3ForCausalLM, config, seed)


def mixtral(path: Path | str) -> Path:
    """Write a Mixtral checkpoint (3 layers, top-2 of 8 experts in each) and return its folder."""
    config = MixtralConfig(
        **_common(hidden=128, layers=3, vocab=1024),
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    return _save(Path(path), MixtralForCausalLM, config, seed=0)


def _common(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    """Settings that all architectures share."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }


def _save(
    path: Path, kind: type[PreTrainedModel], config: Any, seed: int, logits_std: float = 1.0
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        _spread(model)
    model.get_output_embeddings().weight.data.mul_(logits_std)
    model.to(torch.bfloat16).save_pretrained(path)
    _tokenizer(config.vocab_size).save_pretrained(path)
    return path


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Draw every matrix so that its output has the variance of its input."""
    embedding = model.get_input_embeddings().weight
    for weight in model.parameters():
        if weight.dim() >= 2:
            weight.normal_(std=1.0 if weight is embedding else weight.shape[-1] ** -0.5)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly ``vocab_size`` tokens and a chat template."""
    single = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(_pairs(), vocab_size - len(single) - len(SPECIAL_TOKENS)))
    texts = [*SPECIAL_TOKENS, *single, *("".join(pair) for pair in merges)]
    if len(texts) != vocab_size:
        raise ValueError(f"the vocabulary has {len(texts)} tokens at best, not {vocab_size}")
    vocabulary = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def _pairs() -> Iterator[tuple[str, str]]:
    """Merges in order of use: lower-case pairs first, then all letters and digits."""
    lower = list(itertools.product(string.ascii_lowercase, string.ascii_lowercase))
    yield from lower
    known = set(lower)
    letters = string.ascii_letters + string.digits
    every = itertools.product(letters, letters)
    yield from (pair for pair in every if pair not in known)
