"""What test_miles.py has done where miles is: in miles's own code, by ticket and natively."""

from __future__ import annotations

import driverless  # noqa: F401 - first

# isort: split
import asyncio
import copy
import http.server
import json
import pickle
import threading
from argparse import Namespace
from typing import Any

import ray.cloudpickle
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from miles.backends.megatron_utils.actor import MegatronTrainRayActor
from miles.backends.megatron_utils.replay_utils import get_register_replay_list_func
from miles.backends.training_utils.data import DataIterator
from miles.backends.training_utils.parallel import GroupInfo, ParallelState, set_parallel_state
from miles.rollout.base_types import GenerateFnInput
from miles.rollout.generate_utils.generate_endpoint_utils import update_sample_from_response
from miles.rollout.inference_rollout.compatibility import load_generate_function
from miles.utils import http_utils
from miles.utils.distributed_utils import init_gloo_group
from miles.utils.replay_base import routing_replay_manager
from miles.utils.types import Sample
from peer_process import serve
from rollouts import NUM_LAYERS, TOP_K

from shmroute import ShmRouteReader
from shmroute.errors import ShmRouteError
from shmroute.replay import miles

ARGS = Namespace(
    num_layers=NUM_LAYERS,
    moe_router_topk=TOP_K,
    use_rollout_routing_replay=True,
    use_miles_router=False,
    sglang_speculative_algorithm=None,
    rollout_max_context_len=None,
    rollout_max_response_len=8,
    data_pad_size_multiplier=4,
    qkv_format="thd",
)
PROMPT = 3  # tokens of each sequence's prompt


def answer(tokens: int, routed: str | None, meta: dict[str, Any] | None = None) -> dict[str, Any]:
    """SGLang's output of so many new tokens."""
    reason = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[0.0, 7]] * tokens}
    return {"text": "x" * tokens, "meta_info": {**reason, "routed_experts": routed}}


def by_ticket(turns: list[tuple[int, str]]) -> Sample:
    """A sample that was generated in these turns."""
    sample, payload = Sample(index=5), {"input_ids": [1] * PROMPT, "return_routed_experts": True}
    have = PROMPT
    for end, ticket in turns:
        asyncio.run(miles.update_sample(ARGS, sample, payload, answer(end - have, ticket)))
        have = end
    return sample


def natively(tokens: int, native: str) -> Sample:
    """The same in one turn, by miles alone."""
    sample, payload = Sample(), {"input_ids": [1] * PROMPT}
    asyncio.run(update_sample_from_response(ARGS, sample, payload, answer(tokens - PROMPT, native)))
    return sample


def samples(rollouts: list[dict[str, Any]]) -> tuple[list[Sample], list[Sample]]:
    ours = [by_ticket(each["turns"]) for each in rollouts]
    return ours, [natively(each["tokens"], each["native"]) for each in rollouts]


def sample_has_its_rows(rollout: dict[str, Any]) -> int:
    """Bytes of a sample's pickled routes, which are where they arrive what miles has natively."""
    (ours,), (theirs,) = samples([rollout])
    ours.validate()
    assert copy.deepcopy(ours).rollout_routed_experts is ours.rollout_routed_experts
    assert ours.rollout_routed_experts.shape == theirs.rollout_routed_experts.shape
    travelling = ray.cloudpickle.dumps(ours.rollout_routed_experts)
    arrived, expected = pickle.loads(travelling), theirs.rollout_routed_experts
    assert arrived.dtype == expected.dtype
    assert (arrived == expected).all()
    assert torch.from_numpy(arrived).dtype == torch.int32
    return len(travelling)


def stripped_sample_has_its_rows(rollout: dict[str, Any], strip: int) -> None:
    (ours,), (theirs,) = samples([rollout])
    tokenizer = Namespace(decode=lambda ids: "x" * len(ids))
    for sample in (ours, theirs):
        sample.strip_last_output_tokens(strip, tokenizer)
        sample.validate()
    arrived = pickle.loads(pickle.dumps(ours.rollout_routed_experts))
    assert (arrived == theirs.rollout_routed_experts).all()


def continued_after_a_pickle(turns: list[tuple[int, str]]) -> dict[str, Any]:
    """What the second turn of a sample that was unpickled is asked for; its rows, or why none."""
    end, second = turns[1]
    sample = pickle.loads(pickle.dumps(by_ticket(turns[:1])))
    asked = miles.routes_wanted(sample)
    payload = {"return_routed_experts": True}
    output = answer(end - len(sample.tokens), second)
    try:
        asyncio.run(miles.update_sample(ARGS, sample, payload, output))
    except ShmRouteError as error:
        return {"asked": asked, "refused": f"{type(error).__name__}: {error}"}
    rows = pickle.loads(pickle.dumps(sample.rollout_routed_experts))
    return {"asked": asked, "rows": rows.tolist()}


class Recorder:
    """Takes what a layer's replay is given; miles's own copies it into page-locked memory."""

    def __init__(self) -> None:
        self.taken: list[torch.Tensor] = []

    def record(self, top_indices: torch.Tensor) -> None:
        self.taken.append(top_indices.clone())


def start_ranks() -> None:
    """One process that is every rank in turn."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mpu.initialize_model_parallel()
        init_gloo_group()


def filled(sent: bytes, rank: dict[str, int], sequence_parallel: bool) -> list[torch.Tensor]:
    """What miles's trainer gives the routers of one rank, layer by layer."""
    start_ranks()
    arrived = pickle.loads(sent)
    tokens = [torch.zeros(len(each), dtype=torch.long) for each in arrived["tokens"]]
    data = {
        "tokens": tokens,
        "rollout_routed_experts": [
            torch.from_numpy(rows) for rows in arrived["rollout_routed_experts"]
        ],
    }
    one = GroupInfo(0, 1, None)
    cp = GroupInfo(rank["cp_rank"], rank["cp_size"], None)
    tp = GroupInfo(rank["tp_rank"], rank["tp_size"], None)
    set_parallel_state(ParallelState(one, one, cp, tp, one, one, one))
    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=8,
        moe_layer_freq=[0, 1, 1, 0, 1, 0],
    )
    trainer = Namespace(
        args=Namespace(**vars(ARGS), sequence_parallel=sequence_parallel),
        model=[Namespace(module=Namespace(config=config))],
    )
    replays = [Recorder() for _ in range(3)]
    MegatronTrainRayActor._fill_replay_data(
        trainer,
        [DataIterator(data, micro_batch_indices=[[1, 0], [2]])],
        [2],
        data,
        data_key=routing_replay_manager.data_key,
        replay_list=replays,
        register_replay_list_func=get_register_replay_list_func(routing_replay_manager),
    )
    return [torch.cat(replay.taken) for replay in replays]


def trainer_fills_the_same(
    rollouts: list[dict[str, Any]], rank: dict[str, int], sequence_parallel: bool
) -> list[int]:
    """Rows with routes and rows of -1 that each layer's router is given."""
    layers = []
    for each in samples(rollouts):
        sent = {
            "tokens": [sample.tokens for sample in each],
            "rollout_routed_experts": [sample.rollout_routed_experts for sample in each],
        }
        layers.append(filled(ray.cloudpickle.dumps(sent), rank, sequence_parallel))
    for ours, theirs in zip(*layers, strict=True):
        assert torch.equal(ours, theirs)
    padded = (layers[0][0] == -1).all(dim=1)
    return [int((~padded).sum()), int(padded.sum())]


def hook_releases(rollout: dict[str, Any]) -> list[str]:
    """What opening a sample's records gives before and after a rollout's first training step."""
    start_ranks()
    (ours,), _ = samples([rollout])
    pickle.loads(pickle.dumps(ours.rollout_routed_experts))
    found = []
    for step in (1, 0):
        miles.release_loaded(ARGS, 0, step, None, None, None)
        for ticket in rollout["tickets"]:
            try:
                ShmRouteReader(ticket, timeout=0).close()
                found.append("there")
            except ShmRouteError as error:
                found.append(type(error).__name__)
    return found


def refused(turns: list[tuple[int, str | None]], top_k: int = TOP_K) -> str:
    """Why a sample is not made of these turns."""
    try:
        ARGS.moe_router_topk = top_k
        by_ticket(turns)
    except ShmRouteError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        ARGS.moe_router_topk = TOP_K
    return ""


class Tokenizer:
    """One token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]


def generate_in_turns(turns: list[tuple[int, str]], evaluation: bool = False) -> Any:
    """The payloads that ``generate`` sends for a sample that is continued, and its routes."""
    asked: list[dict[str, Any]] = []
    ends = [PROMPT, *(end for end, _ in turns)]

    class Engine(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            turn = len(asked) - 1
            ticket = None if evaluation else turns[turn][1]
            body = json.dumps(answer(ends[turn + 1] - ends[turn], ticket)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    args = Namespace(
        **vars(ARGS),
        sglang_router_ip="127.0.0.1",
        sglang_router_port=server.server_port,
        rollout_num_gpus=1,
        rollout_num_gpus_per_engine=1,
        sglang_server_concurrency=1,
        use_distributed_post=False,
    )
    generate = load_generate_function("shmroute.replay.miles.generate")
    state = Namespace(args=args, tokenizer=Tokenizer(), processor=None)
    sample = Sample(prompt="abc")

    async def all_turns() -> None:
        http_utils._http_client = None
        http_utils.init_http_client(args)
        for _ in turns:
            sampling = {"max_new_tokens": 40}
            output = await generate(GenerateFnInput(state, sample, sampling, evaluation))
            assert output.samples is sample

    asyncio.run(all_turns())
    server.shutdown()
    server.server_close()
    kept = sample.rollout_routed_experts
    return {
        "asked": [
            {
                "tokens": len(each["input_ids"]),
                "max_new_tokens": each["sampling_params"]["max_new_tokens"],
                "start": each.get("routed_experts_start_len"),
                "routes": each["return_routed_experts"],
            }
            for each in asked
        ],
        "rows": None if kept is None else len(kept),
        "status": sample.status.value,
    }


if __name__ == "__main__":
    serve(globals())
