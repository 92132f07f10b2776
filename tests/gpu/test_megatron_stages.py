"""Replay in Megatron-core's interleaved pipeline schedule: two stages, a GPU and a process each.

The backward passes run in autograd's own threads here, which they do not on a CPU.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shmroute import RouteLayout

pytestmark = pytest.mark.gpu

STAGE = Path(__file__).with_name("megatron_stage.py")
EXPERTS, TOP_K, MICRO_BATCHES, TOKENS = 16, 4, 4, 8
#: Pipeline rank to the layer numbers of its two chunks; layer 1 of 8 is dense.
LAYERS = {0: [2, 5, 6], 1: [3, 4, 7, 8]}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def rows(make_arena: Any, arena_name: str) -> np.ndarray[Any, Any]:
    """``[micro-batches, tokens, moe_layers, top_k]``, written as records ``r0`` to ``r3``."""
    random = np.random.default_rng(0).random((MICRO_BATCHES, TOKENS, 7, EXPERTS))
    ids = random.argsort(-1)[..., :TOP_K]
    ids[:, -1] = np.arange(TOP_K)  # the last token has no row
    arena = make_arena(RouteLayout(EXPERTS, TOP_K, range(1, 8), num_layers=8))
    for number, of_sequence in enumerate(ids):
        with arena.reserve(f"r{number}", tokens=TOKENS - 1) as slot:
            slot.rows[...] = of_sequence[:-1]
    return ids


def test_the_interleaved_schedule_replays_forward_and_recomputation(cuda, arena_name, rows):
    pytest.importorskip("megatron.core")
    if cuda.cuda.device_count() < 2:
        pytest.skip("two pipeline stages want a GPU each")
    port = free_port()
    stages = [
        subprocess.Popen(
            [sys.executable, str(STAGE), arena_name, str(rank), "2", port],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in LAYERS
    ]
    try:
        answers = [stage.communicate(timeout=240)[0] for stage in stages]
    finally:
        for stage in stages:
            stage.kill()
            stage.wait()
    for (rank, layers), answer in zip(LAYERS.items(), answers, strict=True):
        assert stages[rank].returncode == 0
        seen = json.loads(answer.splitlines()[-1])
        assert seen["finite"]
        assert seen["held"] == 0
        assert [int(layer) for layer in seen["layers"]] == layers
        for layer in layers:
            expected = np.sort(rows[:, :, layer - 2]).tolist()
            for again in (False, True):
                # Each chunk has its micro-batches in order, in the backward as in the forward.
                calls = [ids for which, ids in seen["layers"][str(layer)] if which is again]
                assert calls == expected
