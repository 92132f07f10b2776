"""verl 0.9.1: the same routes by ticket as natively, in verl's own rollout server, agent loop,
batch and router replay.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from peer_process import ROOT, PeerProcess
from processes import Processes
from rollouts import TOP_K, rollout


def start_verl(folder: Path) -> PeerProcess:
    return PeerProcess(Path(sys.executable), "verl_cases.py", folder / "errors")


@pytest.fixture(scope="module")
def verl(processes: Processes) -> Iterator[PeerProcess]:
    process = processes.done(start_verl)
    yield process
    process.end()


@pytest.mark.parametrize("tokens", [4, 27])
def test_a_response_travels_as_its_ticket_and_is_padded_as_verl_has_it(
    verl, make_arena, layout, tokens
):
    sent = rollout(make_arena(layout), "r", [tokens], layout=layout)
    assert verl.ask("agent_loop_has_its_rows", rollout=sent.facts()) < 350


def test_the_trainer_replays_the_same(verl, make_arena, layout):
    arena = make_arena(layout)
    sequences = [
        rollout(arena, f"r{i}", [n], layout=layout, seed=i) for i, n in enumerate((20, 9, 14))
    ]
    found = verl.ask(
        "trainer_replays_the_same",
        rollouts=[each.facts() for each in sequences],
        num_experts=layout.num_experts,
    )
    assert found["rows"] == 3 * sum(each.tokens for each in sequences)
    padded_rows = 3 * (5 + 24) * layout.num_layers * TOP_K * 2
    assert found["natively"] - found["tickets"] > padded_rows - 3 * 350


@pytest.mark.parametrize("ends", [[20], [8, 20]], ids=str)
def test_tokens_behind_the_last_turn_get_sets_of_experts(verl, arena, ends):
    sent = rollout(arena, "r", ends)
    found = verl.ask("rows_behind_the_last_turn_are_sets", rollout=sent.facts(), tool_tokens=3)
    assert found == [[list(range(TOP_K))] * 3]


def test_the_agent_loop_releases_what_it_has(verl, arena):
    sent = rollout(arena, "r", [20])
    assert verl.ask("agent_loop_releases", rollout=sent.facts()) == [["there"], ["RouteGone"]]
    assert arena.writer.reclaim() == 1


def test_the_manager_releases_a_batch_with_the_second_after_it(verl, arena):
    sent = [rollout(arena, f"r{i}", [9], seed=i).facts() for i in range(5)]
    there, gone = "there", "RouteGone"
    assert verl.ask("manager_releases", rollouts=sent) == [
        [there, there, there, there, there],
        [there, there, there, there, there],
        [gone, there, there, there, there],
        [gone, gone, there, there, there],
        [gone, gone, there, there, there],
        [gone, gone, there, there, gone],
    ]


def test_verl_takes_the_engine_that_reads_tickets(verl):
    assert verl.ask("engine_of_nvidia") == "RoutedMegatronEngine"


def test_verls_configuration_takes_the_settings_as_they_are_documented(verl):
    page = (ROOT / "docs/trainers/verl.md").read_text()
    first, second = (block.split("```")[0].split() for block in page.split("```text\n")[1:])
    assert first[-1].startswith("actor_rollout_ref.model.external_lib=")
    for settings in (first, first[:-1] + second):
        verl.ask("settings_taken", settings=settings)


def test_responses_that_do_not_fit_are_named(verl, arena):
    """Deltas among them: verl's own code cannot ask for any, and would keep the last alone."""
    delta = rollout(arena, "r", [8, 20]).turns[1][1]
    gap = verl.ask("refused", ticket=delta)
    assert gap.startswith("ReplayError")
    assert "from token 7 on" in gap
    assert "send the request without routed_experts_start_len" in gap
    other = verl.ask("refused", ticket=delta, top_k=8)
    assert f"routes of top-{TOP_K}, the trainer replays top-8" in other
    assert verl.ask("refused", ticket=None) == ""
    native = verl.ask("refused", ticket=rollout(arena, "n", [8]).native)
    assert "--shmroute-arena" in native


def test_another_verl_is_refused(verl):
    assert "knows how verl 0.0.1 decodes routes, not verl 0.9.1" in verl.ask(
        "other_verl_is_refused"
    )


def test_verl_cannot_ask_for_deltas():
    """So that the newest turn's rows are the whole sequence's; should verl learn it, see
    ``CapturedRoutes``.
    """
    verl = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
    files = [verl / "experimental/agent_loop", verl / "workers/rollout"]
    sources = [file.read_text() for folder in files for file in folder.rglob("*.py")]
    assert any("return_routed_experts" in source for source in sources)
    assert not any("routed_experts_start_len" in source for source in sources)


def test_an_sglang_that_has_the_module_is_refused(tmp_path):
    module = tmp_path / "sglang/srt/layers/moe/routed_experts_capturer.py"
    module.parent.mkdir(parents=True)
    for file in (module, tmp_path / "sglang/__init__.py"):
        file.touch()
    done = subprocess.run(
        [sys.executable, "-c", "import shmroute.replay.verl"],
        env=dict(os.environ, PYTHONPATH=f"{tmp_path}:{ROOT}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"ReplayError: {module} exists" in done.stderr
