"""One run of the R3 demonstration: rollouts of an engine, handed to a trainer process.

``r3_trainer.py`` is a process of its own, which is given the arena's name, the model's folder and
the rollouts (rids, tokens, the engine's log-probabilities); routes never pass through here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo_steps import Steps
from r3_metrics import Comparison
from r3_rollouts import Rollout, make_prompts, sample
from trainer_process import TrainerError

SCRIPT = Path(__file__).with_name("r3_trainer.py")


def sample_and_compare(
    steps: Steps, url: str, arena: str, model: Path, *, requests: int, new_tokens: int, seed: int
) -> Comparison:
    """Sample ``requests`` answers of ``new_tokens`` each and have a trainer compute them again."""
    prompts = make_prompts(model, requests, seed)
    with steps.step(f"seed {seed}: sampling {requests} rollouts", requests) as count:
        rollouts = sample(
            url, prompts, name=f"r3-seed-{seed}", new_tokens=new_tokens, on_finished=count
        )
    with steps.step(f"seed {seed}: in a trainer, without and with replay"):
        return compare(arena, model, rollouts)


def compare(arena: str, model: Path, rollouts: Sequence[Rollout]) -> Comparison:
    """Have a trainer compute the rollouts with its own routing and with replay.

    Raises
    ------
    TrainerError
        The process failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="shmroute-r3-") as folder:
        out = Path(folder, "comparison.npz")
        done = subprocess.run(
            [sys.executable, str(SCRIPT), arena, str(model), str(out)],
            input=json.dumps([rollout.as_json() for rollout in rollouts]),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stderr.splitlines()[-20:])
            raise TrainerError(f"{SCRIPT.name} failed (exit {done.returncode}):\n{tail}")
        return Comparison.load(out)
