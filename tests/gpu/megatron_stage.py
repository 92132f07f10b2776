"""One stage of Megatron-core's interleaved pipeline schedule, on a GPU of its own.

    megatron_stage.py ARENA RANK STAGES PORT

Replays the records ``r0`` to ``r3`` of the arena as its micro-batches, under full recomputation,
and prints one JSON object::

    {"layers": {layer_number: [[again, experts], ...]}, "held": bytes, "finite": bool}

``experts`` are the ids ``[tokens][top_k]``, sorted, that the router chose in a forward, or with
``again`` in a recomputation, call by call.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "replay"))

import megatron_models as megatron
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from shmroute.replay.megatron import RouteReplay

MICRO_BATCHES, TOKENS, CHUNKS = 4, 8, 2


def main(arena: str, rank: int, stages: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", rank=rank, world_size=stages)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=CHUNKS
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = [chunk_of(rank, stages, stage) for stage in range(CHUNKS)]
    calls: dict[int, list[Any]] = {}
    for chunk in chunks:
        for router in megatron.routers(chunk):
            router.register_forward_hook(partial(note, calls.setdefault(router.layer_number, [])))
    replay = RouteReplay(chunks, arena=arena)
    with replay.schedule():
        losses = get_forward_backward_func()(
            forward_step_func=partial(forward_step, replay),
            data_iterator=[iter(range(MICRO_BATCHES)) for _ in chunks],
            model=chunks,
            num_microbatches=MICRO_BATCHES,
            seq_length=TOKENS,
            micro_batch_size=1,
            forward_only=False,
        )
        held = replay.held_bytes
    finite = all(bool(loss["loss"].isfinite()) for loss in losses)
    print(json.dumps({"layers": calls, "held": held, "finite": finite}))
    torch.distributed.destroy_process_group()


def chunk_of(rank: int, stages: int, vp_stage: int) -> Any:
    settings = megatron.pipelined(
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        deallocate_pipeline_outputs=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    chunk = megatron.gpt(
        settings,
        vp_stage=vp_stage,
        first=rank == 0 and vp_stage == 0,
        last=rank == stages - 1 and vp_stage == CHUNKS - 1,
    )
    return Float16Module(settings, chunk.cuda())


def forward_step(replay: RouteReplay, data: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
    micro_batch = next(data)
    tokens = torch.arange(TOKENS, device="cuda")[None] + micro_batch
    with replay.micro_batch([f"r{micro_batch}"], chunk=chunk):
        output = chunk(tokens, torch.arange(TOKENS, device="cuda")[None], None, labels=tokens)
    return output, loss_of


def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.mean()
    return loss, {"loss": loss.detach()}


def note(calls: list[Any], _: Any, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    routing_map = output[1]
    experts = routing_map.nonzero()[:, 1].view(len(routing_map), -1)
    calls.append([torch.is_grad_enabled(), experts.tolist()])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
