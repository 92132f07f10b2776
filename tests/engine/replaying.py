"""A trainer that computes an engine's requests again, routed as the engine routed them.

transformers loads the checkpoint that the engine serves. What its experts are handed is noted by
forward hooks, not by the code that replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from traffic import Reply
from transformers import AutoModelForCausalLM

import shmroute
from shmroute.replay.transformers import replay_routes


def handed_to_experts(model: Path, replies: Sequence[Reply], arena: str) -> list[npt.NDArray[Any]]:
    """Replay the routes of some replies, read by rid, in one padded forward.

    Returns what the experts were handed: ``[tokens - 1, moe_layers, top_k]`` of each reply, without
    the last token, which has no routes.
    """
    trainer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    handed: list[torch.Tensor] = []
    for layer in trainer.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(lambda _, args: handed.append(args[1]))
    sequences = [torch.tensor(reply.tokens) for reply in replies]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    batch = shmroute.read_batch([reply.rid for reply in replies], arena=arena)
    with torch.no_grad(), replay_routes(trainer, batch, attention_mask=mask):
        trainer(input_ids=ids, attention_mask=mask)
    experts = torch.stack(handed, dim=1).unflatten(0, ids.shape).numpy()
    return [experts[index, : len(reply.tokens) - 1] for index, reply in enumerate(replies)]
