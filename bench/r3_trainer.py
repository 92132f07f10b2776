"""The trainer of the R3 demonstration: transformers in float32, with and without replay.

    python bench/r3_trainer.py ARENA MODEL COMPARISON.npz < ROLLOUTS.json

A process of its own that knows the arena's name, the model's folder and, of each rollout, its
rid, its tokens and the engine's log-probabilities (``r3_rollouts.Rollout``). It reads the routes
by rid, a padded micro-batch at a time, and computes the micro-batch twice: with the routers' own
choice and with the rollout's replayed. Records are released behind that, as a trainer does.

What the routers decided is not taken from the code that replays: forward hooks note what each
layer's experts are handed.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from r3_metrics import Comparison, Pass, differing_sets
from r3_rollouts import Rollout
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import shmroute
from shmroute import RouteBatch
from shmroute.replay.transformers import replay_routes

MICRO_BATCH = 8  # sequences


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """One rollout in one forward of the trainer.

    Attributes
    ----------
    log_probs
        ``float64 [tokens - 1]``: of each token but the first.
    experts
        ``int64 [tokens - 1, moe_layers, top_k]``: what the experts were handed, of each token but
        the last, as rows of routes are.
    """

    log_probs: npt.NDArray[np.float64]
    experts: npt.NDArray[np.int64]


class Trainer:
    """A checkpoint of ``small_models.qwen3_moe`` in transformers, float32, on the CPU."""

    def __init__(self, model: Path) -> None:
        transformers_logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._handed: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(self._note)

    def _note(self, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._handed.append(arguments[1])

    def own(self, rollouts: Sequence[Rollout]) -> list[Computed]:
        """Compute a micro-batch with the routers' own choice."""
        return self._compute(rollouts, *_padded(rollouts))

    def replayed(self, rollouts: Sequence[Rollout], routes: RouteBatch) -> list[Computed]:
        """Compute a micro-batch with the rollout's routes."""
        ids, mask = _padded(rollouts)
        with replay_routes(self.model, routes, attention_mask=mask):
            return self._compute(rollouts, ids, mask)

    @torch.no_grad()
    def _compute(
        self, rollouts: Sequence[Rollout], ids: torch.Tensor, mask: torch.Tensor
    ) -> list[Computed]:
        self._handed.clear()
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        chosen = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).numpy()
        experts = torch.stack(self._handed, dim=1).unflatten(0, ids.shape).numpy()
        ends = [len(rollout.tokens) - 1 for rollout in rollouts]
        return [Computed(chosen[i, :end], experts[i, :end]) for i, end in enumerate(ends)]


def compare(trainer: Trainer, arena: str, rollouts: Sequence[Rollout]) -> Comparison:
    """Compute all rollouts twice and hold both against what the engine did."""
    rows: list[npt.NDArray[Any]] = []
    own: list[Computed] = []
    replayed: list[Computed] = []
    for first in range(0, len(rollouts), MICRO_BATCH):
        group = rollouts[first : first + MICRO_BATCH]
        rids = [rollout.rid for rollout in group]
        batch = shmroute.read_batch(rids, arena=arena)
        rows += [each.numpy() for each in batch.rows.split(batch.cu_seqlens.diff().tolist())]
        own += trainer.own(group)
        replayed += trainer.replayed(group, batch)
        shmroute.release(rids, arena=arena)
    return Comparison(
        log_probs=np.concatenate([rollout.log_probs for rollout in rollouts]),
        own=_held_against(rollouts, rows, own),
        replayed=_held_against(rollouts, rows, replayed),
        expert_use=_expert_use(np.concatenate(rows), trainer.model.config.num_experts),
    )


def _padded(rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, ``int64 [batch, seq]``, padded on the right."""
    sequences = [torch.tensor(rollout.tokens) for rollout in rollouts]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _held_against(
    rollouts: Sequence[Rollout], rows: Sequence[npt.NDArray[Any]], computed: Sequence[Computed]
) -> Pass:
    ratios = [
        one.log_probs[-len(rollout.log_probs) :] - np.array(rollout.log_probs)
        for rollout, one in zip(rollouts, computed, strict=True)
    ]
    differs = [differing_sets(each, one.experts) for each, one in zip(rows, computed, strict=True)]
    return Pass(np.concatenate(ratios), np.concatenate(differs))


def _expert_use(rows: npt.NDArray[Any], num_experts: int) -> npt.NDArray[np.int64]:
    layers = range(rows.shape[1])
    return np.stack([np.bincount(rows[:, i].ravel(), minlength=num_experts) for i in layers])


def main() -> None:
    # Ctrl-C in a terminal reaches this process, too; its parent ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Beside an engine that takes a core, threads would only wait for one another.
    torch.set_num_threads(1)
    arena, model, out = sys.argv[1:]
    rollouts = [Rollout(**each) for each in json.load(sys.stdin)]
    compare(Trainer(Path(model)), arena, rollouts).save(out)


if __name__ == "__main__":
    main()
