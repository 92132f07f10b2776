"""Rollout Routing Replay with routes out of shared memory: what it does to a trainer's policy.

    make demo-r3                   (or: python bench/r3.py [--quick] [--json PATH] [--plot PATH])

For each seed a random MoE of other weights is served by the real SGLang server in bfloat16, on the
CPU, by a weight update from disk. Rollouts are sampled at temperature 1 with the engine's own
log-probabilities. Then a trainer process (``r3_trainer.py``) loads the same weights in
transformers, in float32, and computes the sampled tokens again, with its own routing and with the
rollout's, which it reads by rid. What is compared is defined in ``r3_metrics``.

The weights are random, so the size of a figure says nothing about a trained model; what differs
between its two columns is the routing and nothing else. How near a router's eighth and ninth
expert lie is left to chance, too. ``LOGITS_STD`` makes answers more certain than such a model's
would be (about 2 nats a token in place of nearly 7): differences of policies grow with it.

The exit code is 1 unless KL is lower with replay for every seed and no replayed router disagrees.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import r3_plot
import r3_report
from bench_command import end_in_good_order
from demo_steps import Steps
from engine_process import ServerProcess
from r3_metrics import Comparison
from r3_process import sample_and_compare
from result_file import exit_code, write
from small_models import qwen3_moe
from transformers.utils import logging as transformers_logging

import shmroute

LAYERS, EXPERTS, TOP_K = 24, 128, 8
LOGITS_STD = 4.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Seeds, and what is sampled for each."""

    seeds: int
    requests: int
    new_tokens: int


FULL = Scale(seeds=8, requests=32, new_tokens=96)
QUICK = Scale(seeds=1, requests=8, new_tokens=24)


def model_of(seed: int, folder: Path) -> Path:
    return qwen3_moe(
        folder / f"seed-{seed}",
        num_experts=EXPERTS,
        top_k=TOP_K,
        layers=LAYERS,
        hidden=128,
        expert_width=32,
        logits_std=LOGITS_STD,
        seed=seed,
    )


@contextmanager
def serving(model: Path, arena: str, log: Path) -> Iterator[ServerProcess]:
    """The SGLang server with an arena, which is removed behind it."""
    server = ServerProcess(
        model,
        f"--shmroute-arena={arena}",
        "--shmroute-capacity=64MiB",
        "--random-seed=1",
        "--sleep-on-idle",  # or its scheduler takes a core from the trainer
        log=log,
    )
    try:
        with server:
            yield server
    finally:
        shmroute.reap(arena, force=True)


def run(scale: Scale, steps: Steps, folder: Path) -> list[Comparison]:
    """One comparison a seed."""
    arena = f"r3-{os.getpid()}"
    with steps.step(f"making {scale.seeds} MoEs: {LAYERS} layers, top-{TOP_K} of {EXPERTS}"):
        models = [model_of(seed, folder) for seed in range(scale.seeds)]
    comparisons = []
    with ExitStack() as stack:
        with steps.step("starting the SGLang server, with an arena"):
            server = stack.enter_context(serving(models[0], arena, folder / "server.log"))
        for seed, model in enumerate(models):
            answer = server.post("/update_weights_from_disk", {"model_path": str(model)})
            if not answer["success"]:
                raise RuntimeError(f"SGLang did not load the weights of seed {seed}: {answer}")
            comparisons.append(
                sample_and_compare(
                    steps,
                    server.url,
                    arena,
                    model,
                    requests=scale.requests,
                    new_tokens=scale.new_tokens,
                    seed=seed,
                )
            )
    return comparisons


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, few tokens")
    parser.add_argument(
        "--json", type=Path, default="r3-report.json", help="result file (%(default)s)"
    )
    parser.add_argument("--plot", type=Path, default="r3-report.png", help="PNG (%(default)s)")
    arguments = parser.parse_args()
    for path in (arguments.json, arguments.plot):
        if not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    end_in_good_order()
    transformers_logging.disable_progress_bar()
    steps = Steps()
    with tempfile.TemporaryDirectory(prefix="shmroute-r3-") as folder:
        comparisons = run(QUICK if arguments.quick else FULL, steps, Path(folder))
    rows = r3_report.result_rows(comparisons)
    command = "python bench/r3.py" + (" --quick" if arguments.quick else "")
    write(arguments.json, "r3", command, rows)
    shape = f"{LAYERS} layers, top-{TOP_K} of {EXPERTS} experts, random weights"
    r3_plot.draw(arguments.plot, comparisons, f"Rollout Routing Replay: {shape}")
    for table in (r3_report.layer_table(comparisons), r3_report.table(comparisons)):
        steps.console.print(table)
    steps.console.print(r3_report.closing(comparisons))
    steps.console.print(f"Figures in {arguments.json}, drawn in {arguments.plot}.")
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
