"""A full arena, perturbed routes, and deaths: of the engine, and of readers.

Three engines that start:

X1  offline (``sglang_bridge.Engine`` in a process of its own), four slots, shadow mode, a
    changed id: full arena, both ways of generating, shadow mode's report
X2  HTTP server whose routes depend on the KV location, shadow mode: identical prompts at the
    same time, and the same with locations read too late; then SIGKILL of its whole tree
X3  HTTP server of the same arena name with two slots, started by a "trainer" (from Python in a
    child process, settings from the environment): the successor of X2, and a reader's death
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from engine_process import SHARED_MEMORY, ServerProcess
from faults_support import CALM, FaultPlugin, OfflineEngine, TrainerServer

import shmroute
from shmroute import RouteFailed, RouteGone, ShmRouteReader, WriterDied, inspection

pytestmark = pytest.mark.engine

EXPERTS = 32
Counters = dict[str, int]


def counters(arena: str) -> Counters:
    """Counters of the live engine of that arena."""
    live = [report for report in inspection.inspect_all(arena) if report.state == "live"]
    assert len(live) == 1
    return live[0].counters


def settled(arena: str) -> Counters:
    """The same, once no record is in flight."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        now = counters(arena)
        if now["reserved"] == now["sealed"] + now["failed"]:
            return now
        time.sleep(0.02)
    raise AssertionError(f"records stay in flight: {now}")


def sums_hold(now: Counters) -> bool:
    ends = now["ticketed"] + now["inline"] + now["failed_requests"] + now["no_routes"]
    return now["finished"] == ends


def prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(6, 1000, tokens + i).tolist() for i in range(count)]


def files_of(arena: str) -> list[str]:
    return [name for name in os.listdir(SHARED_MEMORY) if f"-{arena}-" in name]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> FaultPlugin:
    return FaultPlugin(tmp_path_factory.mktemp("faults"))


def arena_of_its_own() -> Iterator[str]:
    name = f"faults-{secrets.token_hex(4)}"
    yield name
    shmroute.reap(name, force=True)
    assert files_of(name) == []


# -- X1 --------------------------------------------------------------------------------------------

X1_SLOTS = 4


@pytest.fixture(scope="module")
def x1_arena() -> Iterator[str]:
    yield from arena_of_its_own()


@pytest.fixture(scope="module")
def offline(
    x1_arena: str,
    faults: FaultPlugin,
    checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OfflineEngine]:
    """X1: an offline engine with SGLang's own log level, which is ``error``."""
    arguments = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "cuda_graph_backend_decode": "disabled",
        "cuda_graph_backend_prefill": "disabled",
        "mem_fraction_static": 0.2,
        "max_total_tokens": 8192,
        "max_running_requests": 32,
        "skip_tokenizer_init": True,
        "shmroute_arena": x1_arena,
        "shmroute_capacity": "256KiB",
        "shmroute_slots": X1_SLOTS,
        "shmroute_shadow": True,
    }
    with OfflineEngine(
        checkpoint("qwen3-32"),
        arguments,
        env=faults.env("altered"),
        log=tmp_path_factory.mktemp("x1") / "engine.log",
    ) as engine:
        yield engine


@pytest.mark.parametrize("api", ["generate", "async"])
def test_an_offline_engine_hands_its_routes_to_another_process_by_rid(
    offline: OfflineEngine, x1_arena: str, api: str
) -> None:
    asked = prompts(3, 40, seed=1)
    answers = offline.ask(prompts=asked, tokens=8, api=api)
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer["carried"] == "str"  # which is pickled on without the bridge
        rid = answer["meta_info"]["id"]
        with ShmRouteReader(rid, arena=x1_arena) as by_rid, ShmRouteReader(answer) as by_ticket:
            assert by_rid.tokens == len(prompt) + 8 - 1
            assert by_rid.prompt_tokens == len(prompt)
            assert not by_rid.inline
            np.testing.assert_array_equal(by_rid.numpy(), by_ticket.numpy())
            by_rid.release()
    now = settled(x1_arena)
    assert now["shadow_mismatches"] == now["tags_wrong"] == 0
    assert sums_hold(now)


def test_the_engine_s_own_process_may_be_the_trainer(offline: OfflineEngine, x1_arena: str) -> None:
    (answer,) = offline.ask(prompts=prompts(1, 30, seed=5), tokens=4, api="generate")
    with ShmRouteReader(answer) as routes:
        expected = int(routes.numpy().sum())
    assert offline.ask(read=answer["meta_info"]["id"]) == expected
    with pytest.raises(RouteGone):
        ShmRouteReader(answer)


@pytest.fixture(scope="module")
def full(offline: OfflineEngine, x1_arena: str) -> tuple[Counters, list[Any], Counters]:
    """Twelve requests, none released, into four slots: counters before, answers, counters after."""
    before = settled(x1_arena)
    answers = offline.ask(prompts=prompts(12, 60, seed=2), tokens=6, api="generate")
    return before, answers, settled(x1_arena)


def test_when_the_arena_is_full_every_request_still_gets_its_rows(
    full: tuple[Counters, list[Any], Counters],
) -> None:
    _, answers, _ = full
    inline = 0
    for i, answer in enumerate(answers):
        with ShmRouteReader(answer) as routes:
            assert routes.complete
            assert routes.tokens == 60 + i + 6 - 1
            inline += routes.inline
    assert inline == len(answers) - X1_SLOTS


def test_rows_that_travel_inline_are_those_of_the_native_path_too(
    full: tuple[Counters, list[Any], Counters],
) -> None:
    before, answers, after = full
    assert after["shadow_records"] - before["shadow_records"] == len(answers)
    assert after["shadow_mismatches"] == after["shadow_rows_incomparable"] == 0


def test_what_went_inline_is_counted_and_shown_by_shmroute_stat(
    full: tuple[Counters, list[Any], Counters], x1_arena: str
) -> None:
    before, answers, after = full
    assert after["inline_full"] - before["inline_full"] == len(answers) - X1_SLOTS
    assert after["ticketed"] - before["ticketed"] == X1_SLOTS
    assert sums_hold(after)
    shown = subprocess.run(
        [sys.executable, "-m", "shmroute.cli", "stat", x1_arena, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (report,) = json.loads(shown.stdout)
    assert report["counters"]["inline_full"] == after["inline_full"]


def test_a_warning_in_the_log_says_what_to_do(
    full: tuple[Counters, list[Any], Counters], offline: OfflineEngine
) -> None:
    """Although the log level of an offline engine is ``error`` where nobody sets it."""
    assert "travel inside its response" in offline.log
    assert "0 of 4 slots. Remedy: release records" in offline.log


def test_released_space_brings_tickets_back(
    full: tuple[Counters, list[Any], Counters], offline: OfflineEngine, x1_arena: str
) -> None:
    _, answers, _ = full
    assert shmroute.release(answers) == X1_SLOTS
    again = offline.ask(prompts=prompts(X1_SLOTS, 30, seed=3), tokens=4, api="generate")
    for answer in again:
        with ShmRouteReader(answer, arena=x1_arena) as routes:
            assert not routes.inline
    with pytest.raises(RouteGone):
        ShmRouteReader(next(one for one in answers if len(ticket_of(one)) < 400))
    shmroute.release(again)


def ticket_of(answer: dict[str, Any]) -> str:
    text: str = answer["meta_info"]["routed_experts"]
    return text


def test_one_changed_id_is_reported_with_rid_token_and_layer_and_counted(
    offline: OfflineEngine, x1_arena: str, faults: FaultPlugin
) -> None:
    before = settled(x1_arena)
    faults.turn_on("alter", rows=77 + 5 - 1, row=70, layer=2)
    (answer,) = offline.ask(prompts=prompts(1, 77, seed=4), tokens=5, api="generate")
    after = settled(x1_arena)
    rid = answer["meta_info"]["id"]
    assert (faults.folder / "altered").read_text() == rid
    assert after["shadow_mismatches"] - before["shadow_mismatches"] == 1
    assert (
        f"SHADOW MISMATCH rid {rid!r}: 1 of 81 rows differ from the native path, first at token "
        "70, layer 2" in offline.log
    )
    shmroute.release(answer)


def test_shutting_down_leaves_nothing_of_an_arena_that_nobody_needs(
    offline: OfflineEngine, x1_arena: str
) -> None:
    """The launcher reaps, since SGLang kills its children where they are."""
    assert files_of(x1_arena)
    assert offline.ask(shutdown=True) == "shut down"
    assert files_of(x1_arena) == []


# -- X2 --------------------------------------------------------------------------------------------

ROUNDS = 6


class Life:
    """X2's arena and what its SIGKILL left."""

    def __init__(self, arena: str, server: ServerProcess, faults: FaultPlugin) -> None:
        self.arena = arena
        self.server = server
        self.faults = faults

    def generate(self, same: list[int], copies: int, tokens: int) -> list[Any]:
        """The same prompt several times in one call."""
        body = {
            "input_ids": [same] * copies,
            "sampling_params": {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True},
            "return_routed_experts": True,
        }
        answers: list[Any] = self.server.post("/generate", body)
        return answers

    def identical_prompts(self, seed: int) -> Counters:
        """Rounds of identical prompts at the same time; what the counters grew by."""
        before = settled(self.arena)
        known = prompts(1, 90, seed=1000 + seed)[0]  # in the prefix cache from round 1 on
        for number in range(ROUNDS):
            fresh = prompts(1, 50 + number, seed=seed + number)[0]
            for same, copies in ((fresh, 2), (known, 4)):
                shmroute.release(self.generate(same, copies, tokens=12))
        after = settled(self.arena)
        return {name: after[name] - before[name] for name in after}


@pytest.fixture(scope="module")
def arena() -> Iterator[str]:
    yield from arena_of_its_own()


@pytest.fixture(scope="module")
def x2(
    arena: str,
    faults: FaultPlugin,
    checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Life]:
    """X2: a server whose routes depend on the KV location."""
    env = faults.env("perturbed", "late", "unsealed", FAULT_EXPERTS=str(EXPERTS))
    with ServerProcess(
        checkpoint("qwen3-32"),
        f"--shmroute-arena={arena}",
        "--shmroute-capacity=64MiB",
        "--shmroute-slots=512",
        "--shmroute-shadow",
        "--skip-tokenizer-init",
        env=env,
        log=tmp_path_factory.mktemp("x2") / "server.log",
    ) as server:
        yield Life(arena, server, faults)


def test_identical_prompts_at_the_same_time_get_the_rows_of_their_own_forwards(x2: Life) -> None:
    grown = x2.identical_prompts(seed=10)
    assert grown["ticketed"] == grown["shadow_records"] == 6 * ROUNDS
    assert grown["shadow_mismatches"] == 0
    assert grown["shadow_rows_incomparable"] == grown["tags_wrong"] == 0


def test_equal_tokens_at_different_locations_really_differ_here(x2: Life) -> None:
    """Without that the test before this one could not fail."""
    same = prompts(1, 64, seed=50)[0]
    first, second = x2.generate(same, 2, tokens=16)
    assert first["output_ids"] == second["output_ids"]
    with ShmRouteReader(first) as one, ShmRouteReader(second) as other:
        assert (one.numpy() != other.numpy()).any()
    shmroute.release([first, second])


def test_locations_that_are_read_late_are_caught(x2: Life) -> None:
    """The negative control: ``req_to_token`` is rewritten right after the hook."""
    x2.faults.turn_on("late")
    try:
        grown = x2.identical_prompts(seed=20)
    finally:
        x2.faults.turn_off("late")
    assert grown["ticketed"] == 6 * ROUNDS
    # Same tokens, same positions: the tags match, and only the shadow sees it.
    assert grown["shadow_mismatches"] > 0
    assert "SHADOW MISMATCH" in x2.server.log


class Killed:
    """What is known of the dead engine: two sealed records, one released, two unsealed."""

    def __init__(
        self, arena: str, sealed: list[Any], rows: list[np.ndarray], unsealed: list[Any]
    ) -> None:
        self.arena = arena
        self.sealed, self.released = sealed[:2], sealed[2]
        self.rows = rows[:2]
        self.unsealed = unsealed
        (self.report,) = inspection.inspect_all(arena)
        self.data = SHARED_MEMORY / self.report.segment.data
        self.blocks = self.data.stat().st_blocks


@pytest.fixture(scope="module")
def killed(x2: Life) -> Killed:
    """X2 after SIGKILL of its whole tree, with requests in flight and records unsealed."""
    sealed = x2.generate(prompts(1, 200, seed=60)[0], 3, tokens=4)
    rows = []
    for answer in sealed:
        with ShmRouteReader(answer) as routes:
            rows.append(routes.numpy().copy())
    shmroute.release(sealed[2:])
    settled(x2.arena)
    x2.faults.turn_on("hold")
    unsealed = x2.generate(prompts(1, 100, seed=61)[0], 2, tokens=4)
    with ThreadPoolExecutor(4) as clients:
        running = [
            clients.submit(x2.generate, prompts(1, 40, seed=70 + i)[0], 1, 3000) for i in range(4)
        ]
        time.sleep(1.0)
        assert not any(one.done() for one in running)
        x2.server.kill9_tree()
        assert all(isinstance(one.exception(60), httpx.HTTPError) for one in running)
    x2.faults.turn_off("hold")
    return Killed(x2.arena, sealed, rows, unsealed)


def test_after_the_engine_was_killed_sealed_records_stay_readable(killed: Killed) -> None:
    assert killed.report.state == "dead"
    for answer, rows in zip(killed.sealed, killed.rows, strict=True):
        with ShmRouteReader(answer["meta_info"]["id"], arena=killed.arena) as routes:
            np.testing.assert_array_equal(routes.numpy(), rows)


def test_its_unsealed_records_are_named_as_lost_and_not_waited_for(killed: Killed) -> None:
    for answer in killed.unsealed:
        for source in (answer, answer["meta_info"]["id"]):
            before = time.monotonic()
            with pytest.raises(WriterDied, match="died before it sealed this record"):
                ShmRouteReader(source, arena=killed.arena, timeout=20)
            assert time.monotonic() - before < 10


# -- X3 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def x3(
    killed: Killed,
    checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """X3: the next engine of the same arena name, as a trainer starts it."""
    with TrainerServer(
        checkpoint("qwen3-32"),
        "--enable-return-routed-experts",
        "--skip-tokenizer-init",
        env={
            **CALM,
            "SHMROUTE_ARENA": killed.arena,
            "SHMROUTE_CAPACITY": "8MiB",
            "SHMROUTE_SLOTS": "2",
            "SHMROUTE_SHADOW": "1",
        },
        log=tmp_path_factory.mktemp("x3") / "server.log",
    ) as server:
        yield server


def ask(server: ServerProcess, seed: int) -> Any:
    body = {
        "input_ids": prompts(1, 50, seed)[0],
        "sampling_params": {"max_new_tokens": 4, "ignore_eos": True},
        "return_routed_experts": True,
    }
    return server.post("/generate", body)


def test_the_next_engine_takes_back_what_the_dead_one_does_not_need(
    x3: ServerProcess, killed: Killed
) -> None:
    left = killed.data.stat().st_blocks
    assert killed.blocks * 512 >= 64 << 20
    assert left * 512 < 2 << 20
    for answer, rows in zip(killed.sealed, killed.rows, strict=True):
        with ShmRouteReader(answer, arena=killed.arena) as routes:
            np.testing.assert_array_equal(routes.numpy(), rows)
    with pytest.raises(RouteGone):
        ShmRouteReader(killed.released)


def test_a_search_by_name_finds_the_records_of_both(x3: ServerProcess, killed: Killed) -> None:
    answer = ask(x3, seed=80)
    with ShmRouteReader(answer["meta_info"]["id"], arena=killed.arena) as routes:
        assert routes.tokens == 53
        routes.release()
    with ShmRouteReader(killed.sealed[0]["meta_info"]["id"], arena=killed.arena) as routes:
        assert routes.tokens == 203


def test_gc_removes_the_dead_arena_once_nobody_reads_it_and_not_before(
    x3: ServerProcess, killed: Killed
) -> None:
    def gc() -> str:
        return subprocess.run(
            [sys.executable, "-m", "shmroute.cli", "gc", killed.arena],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    with ShmRouteReader(killed.sealed[1]) as routes:
        said = gc()
        assert "a reader has records open" in said
        assert "its writer lives" in said
        np.testing.assert_array_equal(routes.numpy(), killed.rows[1])
    (live,) = (r.segment for r in inspection.inspect_all(killed.arena) if r.state == "live")
    assert f"removed {killed.report.segment.data}" in gc()
    assert {name.split(".")[0] for name in files_of(killed.arena)} == {live.base}


@pytest.mark.parametrize("rid", ["\ud800", "x" * 5000], ids=["surrogate", "too long"])
def test_a_rid_that_no_ticket_can_hold_does_not_end_the_engine(
    x3: ServerProcess, killed: Killed, rid: str
) -> None:
    body = {"rid": rid, "input_ids": [7, 8, 9], "return_routed_experts": True}
    body["sampling_params"] = {"max_new_tokens": 2}
    with httpx.Client(base_url=x3.url, trust_env=False, timeout=20) as client:
        try:
            answer = client.post("/generate", content=json.dumps(body).encode())
        except httpx.TimeoutException:
            answer = None  # SGLang itself cannot send every such rid back
    if answer is not None and answer.is_success:
        with pytest.raises(RouteFailed):
            ShmRouteReader(answer.json())
    with ShmRouteReader(ask(x3, seed=85)) as routes:
        assert routes.tokens == 53
        routes.release()
    assert sums_hold(settled(killed.arena))


READER = """
import sys, shmroute
routes = shmroute.ShmRouteReader(sys.argv[1], arena=sys.argv[2])
view = routes.numpy()
routes.release()
print(int(view.sum()), flush=True)
sys.stdin.read()
"""


def test_a_killed_reader_gives_its_slot_back(x3: ServerProcess, killed: Killed) -> None:
    leased, kept = ask(x3, seed=90), ask(x3, seed=91)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, leased["meta_info"]["id"], killed.arena],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert reader.stdout is not None
        assert int(reader.stdout.readline()) > 0
        with pytest.raises(RouteGone):  # released: nobody opens it any more
            ShmRouteReader(leased)
        with ShmRouteReader(ask(x3, seed=92)) as routes:
            assert routes.inline, "a slot under a lease was used again"
    finally:
        reader.send_signal(signal.SIGKILL)
        reader.communicate()
    with ShmRouteReader(ask(x3, seed=93)) as routes:
        assert not routes.inline
        routes.release()
    with ShmRouteReader(kept) as routes:
        assert routes.tokens == 53
        routes.release()
    now = settled(killed.arena)
    assert (now["inline_full"], now["shadow_mismatches"]) == (1, 0)
    assert sums_hold(now)
