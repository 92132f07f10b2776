"""What test_verl.py has done where verl is: in verl's own code, by ticket and natively.

Both ways begin at SGLang's output in ``SGLangHttpServer.generate`` and end in the routers of
Megatron: rollout server, agent loop, batch, micro-batch, ``set_router_replay_data``.
"""

from __future__ import annotations

import driverless  # noqa: F401 - first

# isort: split

import asyncio
import base64
import pickle
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import ray.cloudpickle
import torch
import torch.distributed as dist
import verl as verl_package
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from peer_process import serve
from rollouts import NUM_LAYERS, TOP_K
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from verl import DataProto
from verl.experimental.agent_loop import AgentLoopOutput, AgentLoopWorker
from verl.utils import tensordict_utils
from verl.utils.megatron import router_replay_utils
from verl.utils.megatron.router_replay_patch import RouterReplay, RouterReplayAction
from verl.utils.megatron.router_replay_utils import (
    align_r3_router_replay_data,
    build_r3_replay_mask,
    set_router_replay_data,
)
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer
from verl.workers.utils.padding import left_right_2_no_padding

from shmroute import ShmRouteReader
from shmroute.errors import ShmRouteError
from shmroute.replay import row_ranges, verl, verl_engine
from shmroute.replay.verl_agent_loop import HandedOn, TicketAgentLoopManager, put_tickets_aside
from shmroute.replay.verl_engine import RoutedMegatronEngine

router_replay_utils.device_name = "cpu"  # without a GPU verl says "cuda"

PROMPT, PROMPT_LENGTH, RESPONSE_LENGTH = 3, 5, 24
MOE_LAYERS = [0, 1, 1, 0, 1, 0]


def served(tokens: int, routed: Any) -> Any:
    """verl's ``TokenOutput`` of a response, as its rollout server makes it."""
    server = object.__new__(SGLangHttpServer)

    class Engine:
        async def generate_request(self, *args: Any) -> AsyncIterator[dict[str, Any]]:
            reason = {"finish_reason": {"type": "stop"}, "routed_experts": routed}
            yield {"output_ids": [7] * (tokens - PROMPT), "meta_info": reason}

    server._disaggregation_role = "null"
    server.replica_rank = server.global_steps = 0
    server.config = Namespace(
        max_model_len=4096,
        enable_rollout_routing_replay=True,
        skip_tokenizer_init=False,
        mtp=None,
    )
    server.model_config = Namespace(
        hf_config=Namespace(num_hidden_layers=NUM_LAYERS, num_experts_per_tok=TOP_K),
        lora_rank=0,
        lora={},
    )
    server.tokenizer_manager = Engine()
    return asyncio.run(server.generate([1] * PROMPT, {"max_tokens": tokens}, "r"))


def agent_loop_worker() -> Any:
    worker = object.__new__(AgentLoopWorker)
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    worker.tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>")
    worker.processor = worker.reward_loop_worker_handles = worker.mm_processor_kwargs = None
    worker.distillation_enabled = False
    worker.rollout_config = Namespace(prompt_length=PROMPT_LENGTH, response_length=RESPONSE_LENGTH)
    return worker


def looped(token_output: Any) -> Any:
    """What the agent loop makes of it."""
    return AgentLoopOutput(
        prompt_ids=[1] * PROMPT,
        response_ids=token_output.token_ids,
        response_mask=[1] * len(token_output.token_ids),
        routed_experts=token_output.routed_experts[: PROMPT + RESPONSE_LENGTH],
        num_turns=2,
        metrics={},
        extra_fields=dict(token_output.extra_fields),
    )


def batch_of(outputs: list[Any]) -> DataProto:
    worker = agent_loop_worker()

    async def postprocessed() -> list[Any]:
        return [
            await worker._agent_loop_postprocess(output, False, raw_prompt="x")
            for output in outputs
        ]

    return worker._postprocess(asyncio.run(postprocessed()))


def arrived(token_output: Any) -> Any:
    """Through Ray's pickle."""
    return pickle.loads(ray.cloudpickle.dumps(token_output))


def agent_loop_has_its_rows(rollout: dict[str, Any]) -> int:
    """Bytes of a response's pickled routes, of which verl makes what it has natively."""
    response = served(rollout["tokens"], rollout["turns"][-1][1])
    both = [each[0] for each in outputs([rollout], keep_tickets=False)]
    fields = [each.as_dict()["routed_experts"] for each in both]
    padded = [batch_of([each]).batch["routed_experts"] for each in both]
    for mine, reference in (fields, padded):
        assert mine.dtype == reference.dtype == torch.int16
        assert torch.equal(mine, reference)
    return len(ray.cloudpickle.dumps(response.routed_experts))


def ranks() -> None:
    """This process is the only rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mpu.initialize_model_parallel()


class Model(torch.nn.Module):
    """Megatron's routers, of all layers that have one."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.config = TransformerConfig(
            num_layers=NUM_LAYERS,
            hidden_size=8,
            num_attention_heads=1,
            num_moe_experts=num_experts,
            moe_router_topk=TOP_K,
            moe_layer_freq=MOE_LAYERS,
            use_cpu_initialization=True,
        )
        self.decoder = torch.nn.ModuleList()
        for layer, routed in enumerate(MOE_LAYERS):
            if routed:
                router = TopKRouter(self.config, ProcessGroupCollection.use_mpu_process_groups())
                router.set_layer_number(layer + 1)
                router.router_replay = RouterReplay()
                self.decoder.append(router)


def replayed(batch: DataProto, engine_class: type, num_experts: int) -> list[torch.Tensor]:
    """What each layer's router chooses in two micro-batches of the batch."""
    ranks()
    data = left_right_2_no_padding(pickle.loads(pickle.dumps(batch)).to_tensordict())
    engine = object.__new__(engine_class)
    found = []
    for chosen in ([1, 0], [2]):
        micro_batch = tensordict_utils.index_select_tensor_dict(data, chosen)
        inputs = engine.prepare_model_inputs(micro_batch)
        model = Model(num_experts)
        routed = align_r3_router_replay_data(inputs["routed_experts"], inputs["input_ids"])
        mask = build_r3_replay_mask(inputs["input_ids"], micro_batch["response_mask"])
        set_router_replay_data(routed, None, model.config, replay_mask=mask, model=model)
        tokens = len(inputs["input_ids"].values())
        scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1))
        for router in model.decoder:
            router.router_replay.router_replay_action = RouterReplayAction.REPLAY_FORWARD
            probs, experts = router.router_replay.get_replay_topk(
                scores, TOP_K, default_compute_topk=natural
            )
            assert torch.equal(probs, scores.gather(1, experts))
            found.append(experts)
    return found


def natural(scores: torch.Tensor, topk: int, **groups: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.topk(scores, topk)


def outputs(rollouts: list[dict[str, Any]], *, keep_tickets: bool) -> tuple[list[Any], list[Any]]:
    """Agent loops' outputs by ticket and natively."""
    ours, theirs = [], []
    for each in rollouts:
        verl._keeps_tickets = keep_tickets
        ours.append(looped(arrived(served(each["tokens"], each["turns"][-1][1]))))
        verl._keeps_tickets = False
        native = served(each["tokens"], None)
        native.routed_experts = np.frombuffer(base64.b64decode(each["native"]), np.int32).reshape(
            -1, NUM_LAYERS, TOP_K
        )
        theirs.append(looped(arrived(native)))
    return ours, theirs


def trainer_replays_the_same(rollouts: list[dict[str, Any]], num_experts: int) -> dict[str, int]:
    """Bytes of the batch by ticket and natively; what routers choose is the same."""
    ours, theirs = outputs(rollouts, keep_tickets=True)
    for output in ours:
        put_tickets_aside(output)
    batches = [batch_of(each) for each in (ours, theirs)]
    assert "routed_experts" not in batches[0].batch
    mine = replayed(batches[0], RoutedMegatronEngine, num_experts)
    reference = replayed(batches[1], MegatronEngineWithLMHead, num_experts)
    for one, other in zip(mine, reference, strict=True):
        assert torch.equal(one, other)
    sizes = [len(pickle.dumps(each)) for each in batches]
    return {"tickets": sizes[0], "natively": sizes[1], "rows": sum(map(len, mine))}


def rows_behind_the_last_turn_are_sets(rollout: dict[str, Any], tool_tokens: int) -> list[Any]:
    """A sample to which a tool added tokens: its routes behind the engine's."""
    tokens = rollout["tokens"]
    ranges: tuple[row_ranges.RowRange, ...] = ()
    for end, ticket in rollout["turns"]:
        turn, start = row_ranges.rows_of(ticket, top_k=TOP_K)
        ranges = row_ranges.joined(ranges, turn, start, tokens=end)
    input_ids = torch.nested.as_nested_tensor(
        [torch.zeros(tokens + tool_tokens, dtype=torch.long)], layout=torch.jagged
    )
    routed = verl_engine.read_jagged([ranges], input_ids)
    native = np.frombuffer(base64.b64decode(rollout["native"]), np.int32)
    native = native.reshape(-1, NUM_LAYERS, TOP_K)[:, [1, 2, 4]]
    assert routed.dtype == torch.int16
    assert (routed.values()[: tokens - 1].numpy() == native).all()
    return routed.values()[tokens - 1 :].unique(dim=0).tolist()


def state(tickets: list[str]) -> list[str]:
    """What opening each record gives."""
    found = []
    for ticket in tickets:
        try:
            ShmRouteReader(ticket, timeout=0).close()
            found.append("there")
        except ShmRouteError as error:
            found.append(type(error).__name__)
    return found


def agent_loop_releases(rollout: dict[str, Any]) -> list[list[str]]:
    """Of a response's record, before and after an agent loop has its rows."""
    tickets = [ticket for _, ticket in rollout["turns"]]
    sent = ray.cloudpickle.dumps(served(rollout["tokens"], tickets[0]))
    before = state(tickets)
    pickle.loads(sent)
    return [before, state(tickets)]


def manager_releases(rollouts: list[dict[str, Any]]) -> list[list[str]]:
    """Of batches of one sample each, when each of them is generated; the last is a validation."""
    tickets = [each["turns"][0][1] for each in rollouts]
    ours, _ = outputs(rollouts, keep_tickets=True)
    for output in ours:
        put_tickets_aside(output)
    batches = iter([batch_of([each]) for each in ours])
    manager, found = object.__new__(TicketAgentLoopManager), []

    class Worker:
        """Generates the next batch, as a worker's Ray handle would."""

        @property
        def generate_sequences(self) -> Worker:
            return self

        async def remote(self, prompts: DataProto) -> DataProto:
            found.append(state(tickets))
            return next(batches)

    manager.trained_on, manager.agent_loop_workers = HandedOn(), [Worker()]
    for validate in [False] * (len(ours) - 1) + [True]:
        prompts = DataProto.from_single_dict({"prompts": torch.zeros(1, 1)})
        prompts.meta_info["validate"] = validate
        batch = manager.generate_sequences(prompts)
        assert ("shmroute" in batch.non_tensor_batch) != validate
    return [*found, state(tickets)]


def refused(ticket: str | None, top_k: int = TOP_K) -> str:
    """Why verl's rollout server does not get this response's routes."""
    try:
        verl.from_meta_info({"meta_info": {"routed_experts": ticket}}).reshape(-1, 6, top_k)
    except ShmRouteError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def other_verl_is_refused() -> str:
    known, verl.KNOWN_VERL = verl.KNOWN_VERL, ("0.0.1",)
    try:
        verl.fill_missing_module()
    except ShmRouteError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        verl.KNOWN_VERL = known
    return ""


def settings_taken(settings: list[str]) -> None:
    """Hydra refuses what verl's configuration for Megatron does not have."""
    folder = Path(verl_package.__file__).parent / "trainer/config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        hydra.compose("ppo_megatron_trainer", settings)


def engine_of_nvidia() -> str:
    """Which engine verl takes on NVIDIA's GPUs."""
    return EngineRegistry.get_engine_cls("language_model", "megatron").__name__


if __name__ == "__main__":
    serve(globals())
