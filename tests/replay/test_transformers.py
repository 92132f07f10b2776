"""Replay in transformers: exactly the rows given, gradients and recomputations included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import shmroute
from shmroute import ReplayError, RouteLayout, ShmRouteReader
from shmroute.replay.transformers import record_routes, replay_routes

EXPERTS, TOP_K, VOCAB, TOKENS = 16, 4, 64, 12

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
}


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**COMMON, head_dim=8, num_experts=EXPERTS, moe_intermediate_size=16)
    return Qwen3MoeForCausalLM(config)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=EXPERTS))


def gpt_oss() -> PreTrainedModel:
    return GptOssForCausalLM(GptOssConfig(**COMMON, head_dim=8, num_local_experts=EXPERTS))


def deepseek(kind: type[PreTrainedModel], config: type, **settings: object) -> PreTrainedModel:
    """A first dense layer, groups of experts."""
    return kind(
        config(
            **{**COMMON, "num_key_value_heads": 4},
            n_routed_experts=EXPERTS,
            moe_intermediate_size=16,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            **settings,
        )
    )


def deepseek_v3() -> PreTrainedModel:
    return deepseek(DeepseekV3ForCausalLM, DeepseekV3Config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3-moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek-v3": deepseek_v3,
    "gpt-oss": gpt_oss,
}


@functools.cache
def weights(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        # As drawn by transformers, most biases and some routers are zero.
        parameter.data.normal_(std=0.3)
    return model


@pytest.fixture
def model_of() -> Callable[[str], PreTrainedModel]:
    """A model of the family that no other test has touched."""

    def make(family: str) -> PreTrainedModel:
        model = FAMILIES[family]()
        model.load_state_dict(weights(family).state_dict())
        return model

    return make


@pytest.fixture
def model(model_of: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return model_of("qwen3-moe")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(1, TOKENS + 1)[None]


def own_routes(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), record_routes(model) as recorded:
        model(input_ids=tokens)
    return recorded.rows


def other_routes(layers: int, tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Random sets of experts."""
    chance = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, layers, EXPERTS, generator=chance).topk(TOP_K).indices


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


# -- the four families --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_its_own_routes_change_neither_logits_nor_gradients(
        self, family: str, model_of, tokens
    ) -> None:
        model, routes = model_of(family), None
        outcomes = []
        for replayed in (False, True):
            model.zero_grad()
            with replay_routes(model, routes) if replayed else record_routes(model) as recorded:
                outcome = model(input_ids=tokens, labels=tokens)
            outcome.loss.backward()
            routes = recorded.rows if recorded else routes
            outcomes.append((outcome.logits, gradients(model)))
        (logits, before), (again, after) = outcomes
        assert torch.equal(logits, again)
        assert equal(before, after)

    def test_other_routes_are_those_that_the_experts_get(
        self, family: str, model_of, tokens
    ) -> None:
        model = model_of(family)
        own = own_routes(model, tokens)
        routes = other_routes(own.shape[1])
        got = {}

        def note(layer: int, experts: nn.Module, args: tuple) -> None:
            got[layer] = args[1]

        layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        for layer in layers:
            experts = model.model.layers[layer].mlp.experts
            experts.register_forward_pre_hook(functools.partial(note, layer))
        with torch.no_grad(), replay_routes(model, routes):
            logits = model(input_ids=tokens).logits
        assert torch.equal(torch.stack([got[layer] for layer in layers], dim=1), routes)
        assert not torch.equal(own, routes)
        assert not torch.equal(logits, model(input_ids=tokens).logits)

    def test_each_expert_gets_the_weight_that_is_its_own(
        self, family: str, model_of, tokens
    ) -> None:
        """Chosen in another order, the same experts with the same weights give the same."""
        model = model_of(family)
        own = own_routes(model, tokens)
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
            with replay_routes(model, own.flip(-1)):
                again = model(input_ids=tokens).logits
        torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)

    def test_the_router_gets_gradients_through_the_replayed_choice(
        self, family: str, model_of, tokens
    ) -> None:
        model = model_of(family)
        routes = other_routes(own_routes(model, tokens).shape[1])
        with replay_routes(model, routes):
            loss = loss_of(model, tokens)
        loss.backward()
        routers = [
            p.grad
            for name, p in model.named_parameters()
            if name.endswith(("gate.weight", "router.weight"))
        ]
        assert len(routers) == routes.shape[1]
        assert all(grad is not None and bool((grad != 0).any()) for grad in routers)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_recomputes_with_the_same_routes(
        self, family: str, reentrant: bool, model_of, tokens
    ) -> None:
        model = model_of(family)
        routes = other_routes(own_routes(model, tokens).shape[1])
        found = []
        for checkpointed in (False, True):
            model.train()
            model.zero_grad()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            with replay_routes(model, routes):
                loss = loss_of(model, tokens)
            loss.backward()
            found.append(gradients(model))
        assert equal(*found)


def test_layers_are_numbered_as_decoder_layers(model_of, tokens) -> None:
    with torch.no_grad(), record_routes(model := model_of("deepseek-v3")) as recorded:
        model(input_ids=tokens)
    assert recorded.layer_ids == (1, 2)
    assert recorded.rows.shape == (TOKENS, 2, TOP_K)


def test_layers_may_come_in_any_order_with_their_numbers(model, tokens) -> None:
    routes = other_routes(3)
    with torch.no_grad():
        with replay_routes(model, routes):
            logits = model(input_ids=tokens).logits
        with replay_routes(model, routes[:, [2, 0, 1]], layer_ids=[2, 0, 1]):
            assert torch.equal(model(input_ids=tokens).logits, logits)


# -- which token a row belongs to ---------------------------------------------------------------


def routed_as(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """What the experts were given, ``[tokens, layers, top_k]``."""
    got = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: got.append(args[1]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(got, dim=1)


def test_the_last_token_without_a_row_is_routed_by_the_model(model, tokens) -> None:
    routes = other_routes(3, TOKENS - 1)
    with replay_routes(model, routes):
        got = routed_as(model, input_ids=tokens)
    assert torch.equal(got[:-1], routes)
    whole = torch.cat([routes, got[-1:]])
    with replay_routes(model, whole):
        assert torch.equal(routed_as(model, input_ids=tokens), whole)


def test_rows_of_minus_one_are_the_models_own_choice(model, tokens) -> None:
    own = own_routes(model, tokens)
    with replay_routes(model, torch.full_like(own, -1)):
        assert torch.equal(routed_as(model, input_ids=tokens), own)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_get_their_rows_by_the_attention_mask(model, side: str) -> None:
    lengths, width = (5, 9, 7), 9
    routes = [other_routes(3, length - 1, seed=length) for length in lengths]
    ids = torch.full((3, width), 0)
    mask = torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = torch.arange(1, length + 1)
        mask[row, place] = 1
    with replay_routes(model, routes, attention_mask=mask):
        got = routed_as(model, input_ids=ids, attention_mask=mask).view(3, width, 3, TOP_K)
    for row, length in enumerate(lengths):
        assert torch.equal(got[row][mask[row].bool()][: length - 1], routes[row])


@pytest.mark.parametrize("with_last", [True, False])
def test_packed_sequences_lie_one_behind_the_other(model, with_last: bool) -> None:
    routes = [other_routes(3, 4, seed=1), other_routes(3, 6, seed=2)]
    lengths = [len(rows) + with_last for rows in routes]
    inputs = {
        "input_ids": torch.arange(1, sum(lengths) + 1)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    with replay_routes(model, routes):
        got = routed_as(model, **inputs)
    assert torch.equal(got[:4], routes[0])
    assert torch.equal(got[lengths[0] : lengths[0] + 6], routes[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64, np.uint64])
def test_rows_may_be_arrays_of_any_integer_dtype(model, tokens, dtype: type) -> None:
    routes = other_routes(3)
    array = routes.numpy().astype(dtype)
    array.setflags(write=False)
    for rows in (array, torch.from_numpy(array.copy())):
        with replay_routes(model, rows):
            assert torch.equal(routed_as(model, input_ids=tokens), routes)


def layout_of(num_experts: int) -> RouteLayout:
    return RouteLayout(num_experts, TOP_K, layer_ids=range(3), model="tiny")


@pytest.fixture
def arena(make_arena: Callable[[RouteLayout], shmroute.Arena]) -> shmroute.Arena:
    return make_arena(layout_of(EXPERTS))


def write(arena: shmroute.Arena, rid: str, rows: torch.Tensor, start: int = 0) -> bytes:
    with arena.reserve(rid, tokens=len(rows), start=start) as slot:
        slot.rows[...] = rows.numpy()
    return slot.ticket


def test_a_record_and_a_batch_of_records_are_replayed_as_they_are_read(model, arena) -> None:
    routes = [other_routes(3, length, seed=length) for length in (4, 6)]
    tickets = [write(arena, f"rid-{i}", rows) for i, rows in enumerate(routes)]
    ids = torch.arange(1, 8)[None]
    with ShmRouteReader("rid-1", arena=arena.name) as record, replay_routes(model, record):
        assert torch.equal(routed_as(model, input_ids=ids)[:6], routes[1])
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    with replay_routes(model, shmroute.read_batch(tickets), attention_mask=mask):
        got = routed_as(model, input_ids=ids.expand(2, -1), attention_mask=mask)
    assert torch.equal(got[:4], routes[0])
    assert torch.equal(got[7:13], routes[1])


@pytest.mark.parametrize("read", [shmroute.read_batch, ShmRouteReader], ids=["batch", "record"])
def test_records_of_layers_with_another_number_of_experts_are_refused(
    model, make_arena, read
) -> None:
    arena = make_arena(layout_of(2 * EXPERTS))
    ticket = write(arena, "rid", other_routes(3))  # whose ids all exist in this model, too
    with pytest.raises(ReplayError, match=rf"with {2 * EXPERTS} experts, .* have \[{EXPERTS}\]"):
        with replay_routes(model, read(ticket)):
            pass


@pytest.mark.parametrize(
    "padded", [{"pad": "mask"}, {"pad": "minus_one", "dtype": torch.int64}], ids=lambda p: p["pad"]
)
def test_padding_of_a_batch_is_the_models_own_choice(model, arena, padded: dict) -> None:
    routes = [other_routes(3, length, seed=length) for length in (4, 6)]
    tickets = [write(arena, f"rid-{i}", rows) for i, rows in enumerate(routes)]
    ids = torch.arange(1, 13)[None]
    with replay_routes(model, shmroute.read_batch(tickets)):
        expected = routed_as(model, input_ids=ids)
    with replay_routes(model, shmroute.read_batch(tickets, **padded)):
        assert torch.equal(routed_as(model, input_ids=ids), expected)


def test_missing_rows_of_a_record_are_the_models_own_choice(model, arena, tokens) -> None:
    routes = other_routes(3)
    slot = arena.reserve("gap", tokens=TOKENS)
    slot.rows[...] = routes.numpy()
    slot.seal(missing=[(4, 6)])
    own = own_routes(model, tokens)
    with ShmRouteReader("gap", arena=arena.name, allow_missing=True) as record:
        with replay_routes(model, record):
            got = routed_as(model, input_ids=tokens)
    assert torch.equal(got[:4], routes[:4])
    assert torch.equal(got[6:], routes[6:])
    assert torch.equal(got[4:6, 0], own[4:6, 0])


# -- recomputations -----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_micro_batches_in_flight_are_recomputed_with_their_own_routes(
    model, tokens, reentrant: bool
) -> None:
    every = [other_routes(3, seed=seed) for seed in (1, 2, 3)]
    expected = []
    for routes in every:
        with replay_routes(model, routes):
            loss_of(model, tokens).backward()
        expected.append(gradients(model))
        model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    losses = []
    for routes in every:
        with replay_routes(model, routes):
            losses.append(loss_of(model, tokens))
    for loss, before in reversed(list(zip(losses, expected, strict=True))):
        loss.backward()
        assert equal(gradients(model), before)
        model.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_micro_batch_is_recomputed_with_its_own_routes_in_the_with_of_the_next(
    model, tokens, reentrant: bool
) -> None:
    first, second = other_routes(3, seed=1), other_routes(3, seed=2)
    with replay_routes(model, first):
        loss_of(model, tokens).backward()
    expected = gradients(model)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with replay_routes(model, first):
        loss = loss_of(model, tokens)
    with replay_routes(model, second):
        loss_of(model, tokens)
        loss.backward()
    assert equal(gradients(model), expected)


@pytest.mark.parametrize("within", [True, False])
def test_torchs_checkpoint_wrapper_is_recomputed_with_the_same_routes(
    model, tokens, within: bool
) -> None:
    routes = other_routes(3)
    with replay_routes(model, routes):
        loss_of(model, tokens).backward()
    expected = gradients(model)
    model.zero_grad()
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(
            checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT
        ),
        check_fn=lambda module: module in set(model.model.layers),
    )
    assert isinstance(model.model.layers[0], CheckpointWrapper)
    with replay_routes(model, routes):
        loss = loss_of(model, tokens)
        if within:
            loss.backward()
    if not within:
        loss.backward()
    assert list(expected.values())[3].equal(list(gradients(model).values())[3])
    unwrapped = {
        name.replace("_checkpoint_wrapped_module.", ""): grad
        for name, grad in gradients(model).items()
    }
    assert equal(unwrapped, expected)


def test_a_checkpoint_of_another_kind_is_refused_after_the_with(model, tokens) -> None:
    routes = other_routes(3)
    with replay_routes(model, routes):
        loss = checkpoint(loss_of, model, tokens, use_reentrant=False)
    with pytest.raises(ReplayError, match=r"call backward\(\) within the `with`"):
        loss.backward()


def test_a_checkpoint_of_another_kind_is_refused_after_an_exception_in_the_with(
    model, tokens
) -> None:
    def embedded_loss(embedded: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embedded, labels=tokens).loss

    embedded = model.model.embed_tokens(tokens)
    losses = []

    def step() -> None:
        with replay_routes(model, other_routes(3)):
            losses.append(checkpoint(embedded_loss, embedded, use_reentrant=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    with pytest.raises(ReplayError, match=r"call backward\(\) within the `with`"):
        losses[0].backward()


def test_a_checkpoint_of_another_kind_is_right_within_the_with(model, tokens) -> None:
    routes = other_routes(3)
    with replay_routes(model, routes):
        loss_of(model, tokens).backward()
    expected = gradients(model)
    model.zero_grad()
    with replay_routes(model, routes):
        checkpoint(loss_of, model, tokens, use_reentrant=False).backward()
    assert equal(gradients(model), expected)


@pytest.mark.parametrize("forward_first", [True, False])
def test_a_checkpoint_of_another_kind_is_refused_in_the_with_of_the_next(
    model, tokens, forward_first: bool
) -> None:
    def step() -> None:
        with replay_routes(model, other_routes(3, seed=1)):
            loss = checkpoint(loss_of, model, tokens, use_reentrant=False)
        with replay_routes(model, other_routes(3, seed=2)):
            if forward_first:
                loss = loss + checkpoint(loss_of, model, tokens, use_reentrant=False)
            loss.backward()

    with pytest.raises(ReplayError, match=r"computed again more often .* own `with`"):
        step()


def test_an_ordinary_step_after_a_replayed_one_is_not_disturbed(model, tokens) -> None:
    checkpoint(loss_of, model, tokens, use_reentrant=False).backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.no_grad(), replay_routes(model, other_routes(3)):
        loss_of(model, tokens)
    checkpoint(loss_of, model, tokens, use_reentrant=False).backward()
    assert equal(gradients(model), expected)


def test_the_model_is_left_as_it_was(model, tokens) -> None:
    model.gradient_checkpointing_enable()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        with replay_routes(model, other_routes(3)):
            model(input_ids=tokens)
        model(input_ids=tokens)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- models that others have wrapped ------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_peft_model_is_replayed(model, tokens) -> None:
    routes = other_routes(3)
    with torch.no_grad(), replay_routes(model, routes):
        logits = model(input_ids=tokens).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad(), replay_routes(adapted, routes):
        assert torch.equal(adapted(input_ids=tokens).logits, logits)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_ddp_and_fsdp_models_are_replayed(model, tokens, process_group: None, wrap) -> None:
    routes = other_routes(3)
    with replay_routes(model, routes):
        loss_of(model, tokens).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = wrap(model)
    with replay_routes(wrapped, routes):
        loss = loss_of(wrapped, tokens)
    loss.backward()
    for parameter, before in zip(wrapped.parameters(), expected, strict=True):
        grad = parameter.grad.full_tensor() if wrap is fully_shard else parameter.grad
        torch.testing.assert_close(grad, before)


# -- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "a path"], ids=repr)
def test_what_is_no_model_is_refused_by_its_type(model: object) -> None:
    with pytest.raises(ReplayError, match=f"the model is a {type(model).__name__}"):
        with replay_routes(model, other_routes(3)):
            pass


def test_a_mask_that_is_no_tensor_is_refused(model, tokens) -> None:
    mask = [[1] * TOKENS]
    refused(model, tokens, other_routes(3), "attention_mask is a list", attention_mask=mask)


def refused(
    model: nn.Module, tokens: torch.Tensor, routes: object, match: str, **settings: object
) -> None:
    with pytest.raises(ReplayError, match=match):
        with torch.no_grad(), replay_routes(model, routes, **settings):
            model(input_ids=tokens)


def test_rows_of_other_tokens_are_refused(model, tokens) -> None:
    match = r"forward has 12 tokens, the routes are of 10 or 11 with each sequence's last"
    refused(model, tokens, other_routes(3, 10), match)
    match = r"forward has 12 tokens, the routes are of 11 or 13 with"
    refused(model, tokens, [other_routes(3, 5), other_routes(3, 6)], match)


def test_rows_of_other_layers_are_refused(model, tokens) -> None:
    refused(model, tokens, other_routes(2), r"of 2 layers .*MoE layers are 3: \[0, 1, 2\]")
    refused(model, tokens, other_routes(3), r"\[1, 2, 3\], the model's", layer_ids=[1, 2, 3])
    refused(model, tokens, other_routes(3), r"2 layer_ids for rows of 3", layer_ids=[0, 1])


def test_rows_of_another_top_k_are_refused(model, tokens) -> None:
    refused(model, tokens, other_routes(3)[..., :2], r"top-2, the model's routers are top-\[4\]")


def test_ids_that_are_no_experts_are_refused(model, tokens) -> None:
    routes = other_routes(3)
    for wrong in (EXPERTS, -2, 1 << 40):
        faulty = routes.clone()
        faulty[3, 1, 2] = wrong
        refused(model, tokens, faulty, rf"{wrong}.*the model has {EXPERTS} experts")


def test_an_expert_twice_in_a_row_is_refused(model, tokens) -> None:
    routes = other_routes(3)
    routes[3, 1] = torch.tensor([1, 2, 2, 3])
    refused(model, tokens, routes, r"of token 3 and layer position 1: \[1, 2, 2, 3\]")
    routes[3, 1] = torch.tensor([1, 2, -1, 3])
    refused(model, tokens, routes, r"or are -1 in part")


def test_rows_that_are_no_integers_are_refused(model, tokens) -> None:
    refused(model, tokens, other_routes(3).float(), "expert ids are integers")
    refused(model, tokens, other_routes(3).numpy().astype(np.float32), "expert ids are integers")


def test_what_rows_are_read_from_is_no_rows(model, tokens, arena) -> None:
    ticket = write(arena, "unread", other_routes(3, TOKENS - 1))
    for source in (ticket, [ticket], "unread", None, other_routes(3).tolist()):
        refused(model, tokens, source, r"is no rows: give tickets, .* to shmroute\.read_batch")


def test_a_mask_that_does_not_fit_the_routes_is_refused(model, tokens) -> None:
    mask = torch.ones(1, TOKENS)
    match = r"sequence 0 has 12 tokens in attention_mask and 8 rows"
    refused(model, tokens, other_routes(3, 8), match, attention_mask=mask)
    match = r"attention_mask of shape \[1, 12\] for the routes of 2"
    refused(model, tokens, [other_routes(3)] * 2, match, attention_mask=mask)


def test_a_record_that_begins_later_is_refused(model, tokens, arena) -> None:
    write(arena, "late", other_routes(3, 5), start=7)
    with ShmRouteReader("late", arena=arena.name) as record:
        refused(model, tokens, record, "begins at token 7")


def test_padding_that_looks_like_routes_is_refused(model, tokens, arena) -> None:
    ticket = write(arena, "padded", other_routes(3, TOKENS - 1))
    batch = shmroute.read_batch([ticket], pad="distinct")
    refused(model, tokens, batch, r"12 tokens and 12 rows, of which padding cannot be told")


def test_a_ranks_share_of_a_batch_is_refused(model, tokens, arena) -> None:
    ticket = write(arena, "cut", other_routes(3, TOKENS - 1))
    share = shmroute.Partition(cp_rank=0, cp_size=2)
    batch = shmroute.read_batch([ticket], tokens=share, pad="mask")
    refused(model, tokens, batch, "without a Partition")


def test_a_model_without_experts_is_refused(tokens) -> None:
    settings = {name: value for name, value in COMMON.items() if name != "num_experts_per_tok"}
    dense = LlamaForCausalLM(LlamaConfig(**settings))
    refused(dense, tokens, other_routes(3), "LlamaForCausalLM has no module with `experts`")


def test_a_router_that_masks_its_scores_first_is_refused(tokens) -> None:
    masked = deepseek(DeepseekV2ForCausalLM, DeepseekV2Config, topk_method="group_limited_greedy")
    refused(masked, tokens, other_routes(2), "group_limited_greedy")


def test_a_router_without_a_topk_of_its_width_is_refused(model, tokens) -> None:
    def argsort(router: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(hidden, router.weight)
        indices = logits.argsort(dim=-1, descending=True)[:, :TOP_K]
        return logits, logits.gather(1, indices), indices

    gate = model.model.layers[1].mlp.gate
    gate.forward = functools.partial(argsort, gate)
    refused(model, tokens, other_routes(3), r"layers\.1\.mlp .* 0 times in one forward")


def test_a_second_forward_in_one_with_is_refused(model, tokens) -> None:
    def twice() -> None:
        with torch.no_grad(), replay_routes(model, other_routes(3)):
            model(input_ids=tokens)
            model(input_ids=tokens)

    with pytest.raises(ReplayError, match="ran a second time"):
        twice()


def test_a_with_within_another_is_refused(model, tokens) -> None:
    with torch.no_grad(), record_routes(model) as recorded:
        with pytest.raises(ReplayError, match="one `with` at a time"):
            with replay_routes(model, other_routes(3)):
                raise AssertionError("entered")
        model(input_ids=tokens)
    assert torch.equal(recorded.rows, own_routes(model, tokens))


def test_a_with_without_a_forward_is_refused(model) -> None:
    with pytest.raises(ReplayError, match=r"\[0, 1, 2\] \(3 of 3 with experts\) did not run"):
        with replay_routes(model, other_routes(3)):
            pass


def test_another_error_within_is_not_hidden(model) -> None:
    with pytest.raises(ZeroDivisionError), replay_routes(model, other_routes(3)), nullcontext():
        raise ZeroDivisionError
