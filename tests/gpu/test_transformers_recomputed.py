"""Replay in transformers on a GPU: routes read onto it, layers recomputed in autograd's threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import shmroute
from shmroute import RouteLayout

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K, LAYERS, VOCAB = 16, 4, 3, 64
LENGTHS = (40, 25)  # tokens of two sequences


@pytest.fixture
def model(cuda: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    cuda.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=16,
    )
    made = transformers.Qwen3MoeForCausalLM(config).cuda()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.3)
    return made


@pytest.fixture
def rows(make_arena: Any) -> list[np.ndarray[Any, Any]]:
    """``[tokens - 1, layers, top_k]`` of each sequence, written as records ``r0`` and ``r1``."""
    chance = np.random.default_rng(0)
    arena = make_arena(RouteLayout(EXPERTS, TOP_K, range(LAYERS)))
    made = []
    for number, length in enumerate(LENGTHS):
        ids = chance.random((length - 1, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K]
        with arena.reserve(f"r{number}", tokens=length - 1) as slot:
            slot.rows[...] = ids
        made.append(ids)
    return made


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("device", ["cuda", None])
def test_experts_get_the_records_rows_again_where_layers_are_recomputed(
    cuda: Any, arena_name: str, model: Any, rows: Any, device: str | None, reentrant: bool | None
) -> None:
    from shmroute.replay.transformers import replay_routes

    handed: list[Any] = [[] for _ in range(LAYERS)]
    for layer, seen in zip(model.model.layers, handed, strict=True):
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[1].cpu().numpy())
        )
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    ids = cuda.arange(2 * max(LENGTHS), device="cuda").view(2, -1) % VOCAB
    mask = (cuda.arange(max(LENGTHS)) < cuda.tensor(LENGTHS)[:, None]).long().cuda()
    batch = shmroute.read_batch(["r0", "r1"], arena=arena_name, device=device)
    with replay_routes(model, batch, attention_mask=mask):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    for layer, seen in enumerate(handed):
        assert len(seen) == (1 if reentrant is None else 2)
        for indices in seen:
            of_sequence = indices.reshape(2, -1, TOP_K)
            for number, length in enumerate(LENGTHS):
                np.testing.assert_array_equal(
                    of_sequence[number, : length - 1], rows[number][:, layer]
                )
    assert all(bool(layer.mlp.gate.weight.grad.any()) for layer in model.model.layers)
