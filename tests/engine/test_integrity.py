"""Faults that mix up routes, made in a real engine: they end as right rows or as missing ones.

Engine start 13: Qwen3-MoE of 32 experts whose routes depend on the KV location, too, so that the
row of the same token at another location is a wrong one. Its KV pool is so small that requests
are retracted, and prompts are not cut into chunks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import Engines
from faults_support import FaultPlugin
from traffic import EveryConfiguration, Reply, Traffic, native_request

from shmroute import IncompleteRoutes, RouteNotFound, ShmRouteReader, WeightRun

pytestmark = pytest.mark.engine

EXPERTS, POOL, PREFILL, SHORT_BUFFER = 32, 2048, 512, 400


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> FaultPlugin:
    return FaultPlugin(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def served(
    engines: Engines, checkpoint: Callable[[str], Path], faults: FaultPlugin
) -> Iterator[Traffic]:
    arguments = (
        f"--max-total-tokens={POOL}",
        f"--max-prefill-tokens={PREFILL}",
        "--chunked-prefill-size=-1",
        "--schedule-conservativeness=0.1",
    )
    env = faults.env(
        "perturbed",
        "lost",
        "unfenced",
        "short",
        FAULT_EXPERTS=str(EXPERTS),
        FAULT_ROWS=str(SHORT_BUFFER),
        # More requests are let in than the pool can hold to their ends.
        SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION="16",
    )
    model = checkpoint("qwen3-32")
    with engines.serve("integrity", model, *arguments, ending="kill", env=env) as traffic:
        yield traffic


# -- weights that change under requests ------------------------------------------------------------


class TestWeightsChangeUnderRequests:
    """Five requests across two updates, the second without a label.

    ``meta_info["weight_versions"]`` counts output tokens and knows labels only: of an update
    without one, and of what was computed again, the rows alone tell.
    """

    def across_updates(
        self, served: Traffic, mode: str, updates: Sequence[tuple[Path, str | None]]
    ) -> list[Reply]:
        """Answers of requests that were in flight each time generation was paused."""
        all_have_begun = threading.Barrier(6)

        def send(prompt: list[int]) -> Reply:
            with served.stream("/generate", native_request(prompt, max_new_tokens=150)) as chunks:
                received = [next(chunks) for _ in range(4)]
                all_have_begun.wait(60.0)
                received.extend(chunks)
            return Reply(prompt, received[-1])

        prompts = [served.prompt(20 + 5 * i) for i in range(5)]
        with ThreadPoolExecutor(5) as senders:
            sent = [senders.submit(send, prompt) for prompt in prompts]
            all_have_begun.wait(60.0)
            for model, label in updates:
                self.update_paused(served, mode, model, label)
                # Once this one has ended, the others have gone on under the new weights.
                served.routes(served.generate(served.prompt(10), max_new_tokens=8))
            assert not any(one.done() for one in sent)
            return [one.result() for one in sent]

    def update_paused(self, served: Traffic, mode: str, model: Path, label: str | None) -> None:
        body: dict[str, Any] = {"model_path": str(model), "flush_cache": False}
        if label is not None:
            body["weight_version"] = label
        served.post("/pause_generation", {"mode": mode})
        assert served.post("/update_weights_from_disk", body).json()["success"]
        served.post("/continue_generation", {})

    def runs(self, served: Traffic, reply: Reply, label: str) -> tuple[WeightRun, ...]:
        """Its three runs: of older weights, of those with the label, of those without one."""
        runs = served.routes(reply).weight_versions
        assert [run.label for run in runs[1:]] == [label, f"epoch-{runs[2].epoch}"]
        assert [run.epoch - runs[0].epoch for run in runs] == [0, 1, 2]
        return runs

    def output_before(self, reply: Reply, label: str) -> int:
        """Output tokens that the engine had counted when that label came."""
        before, after = reply.meta["weight_versions"]
        assert (before["start"], after["version"], after["end"]) == (0, label, 150)
        assert before["end"] == after["start"] > 0
        end: int = before["end"]
        return end

    def test_paused_in_place_the_rows_go_on_in_the_next_epoch(
        self, served: Traffic, checkpoint: Callable[[str], Path]
    ) -> None:
        updates = [(checkpoint("qwen3-32-trained"), "in-place"), (checkpoint("qwen3-32"), None)]
        for reply in self.across_updates(served, "in_place", updates):
            old, labelled, unlabelled = self.runs(served, reply, "in-place")
            assert old.label == "default"
            # The forward of row i samples token i + 1; one more was in flight when the engine
            # counted, and its token came out later, of the older weights all the same.
            counted = len(reply.prompt) + self.output_before(reply, "in-place")
            assert labelled.first in (counted - 1, counted)
            assert unlabelled.first > labelled.first

    def test_retracted_the_cached_prefix_keeps_its_epoch_and_the_rest_is_of_the_next(
        self, served: Traffic, checkpoint: Callable[[str], Path]
    ) -> None:
        """Each resumed request is prefilled again, behind what the prefix cache has of it.

        First that is its prompt, then also the output that was prefilled in between.
        """
        updates = [(checkpoint("qwen3-32-trained"), "retracted"), (checkpoint("qwen3-32"), None)]
        for reply in self.across_updates(served, "retract", updates):
            assert reply.meta["num_retractions"] == 2
            prompt = len(reply.prompt)
            counted = prompt + self.output_before(reply, "retracted")
            firsts = [run.first for run in self.runs(served, reply, "retracted")]
            assert firsts == [0, prompt, counted]


# -- aborts and retractions ------------------------------------------------------------------------


class TestAbortsAmidRetractions:
    """Sixteen requests into a pool for half of them; every second one is aborted at the first
    retraction, also the one with the longest prompt, which is retracted first and waits."""

    @pytest.fixture(scope="class")
    @classmethod
    def before(cls, served: Traffic) -> dict[str, int]:
        return served.counters()

    @pytest.fixture(scope="class")
    @classmethod
    def replies(cls, served: Traffic, before: dict[str, int]) -> list[Reply]:
        retractions = served.log().count("Retract requests")
        prompts = [served.prompt(40 + 2 * i) for i in range(16)]

        def send(i: int) -> Reply:
            body = native_request(prompts[i], rid=f"amid-{i:02}", max_new_tokens=250)
            return Reply(prompts[i], served.post("/generate", body).json())

        with ThreadPoolExecutor(16) as senders:
            sent = [senders.submit(send, i) for i in range(16)]
            while served.log().count("Retract requests") == retractions:
                assert not all(one.done() for one in sent), "nothing was retracted"
                time.sleep(0.01)
            for i in range(1, 16, 2):
                served.post("/abort_request", {"rid": f"amid-{i:02}"})
            return [one.result() for one in sent]

    def test_those_that_go_on_have_every_row_once_also_after_a_retraction(
        self, served: Traffic, replies: list[Reply]
    ) -> None:
        for reply in replies[::2]:
            assert len(served.routes(reply).rows) == len(reply.prompt) + 250 - 1
        assert any(reply.meta["num_retractions"] > 0 for reply in replies[::2])

    def test_an_aborted_one_has_the_rows_made_so_far_or_none(
        self, served: Traffic, replies: list[Reply]
    ) -> None:
        waiting = 0
        for reply in replies[1::2]:
            assert reply.meta["finish_reason"]["type"] == "abort"
            if reply.meta.get("routed_experts"):
                served.routes(reply)
                continue
            waiting += 1
            assert reply.meta["completion_tokens"] > 0, "it was not retracted"
            with pytest.raises(RouteNotFound):
                ShmRouteReader(reply.rid, arena=served.arena, timeout=0)
        assert 0 < waiting < 8

    def test_each_is_counted_once(
        self, served: Traffic, replies: list[Reply], before: dict[str, int]
    ) -> None:
        after = served.counters()
        with_routes = sum("routed_experts" in reply.meta for reply in replies)
        assert after["finished"] - before["finished"] == 16
        assert after["ticketed"] - before["ticketed"] == with_routes
        assert after["no_routes"] - before["no_routes"] == 16 - with_routes


def test_a_prompt_longer_than_sglang_s_own_bound_of_a_prefill_has_every_row(
    served: Traffic,
) -> None:
    reply = served.generate(served.prompt(900))
    assert "#new-token: 900," in served.log()
    assert len(served.routes(reply).rows) == 900 + 24 - 1


class TestAfterAllOfThese(EveryConfiguration):
    pass


# -- faults that make rows missing -----------------------------------------------------------------


@contextmanager
def no_row_is_wrong(served: Traffic, *, missing: int) -> Iterator[None]:
    """So many rows are missing of what is served within, and the others are the native path's."""
    before = served.counters()
    yield
    after = served.counters()
    assert after["rows_missing"] - before["rows_missing"] == missing
    assert after["shadow_rows_incomparable"] - before["shadow_rows_incomparable"] == missing
    assert after["shadow_mismatches"] == before["shadow_mismatches"] == 0
    kinds = ("ticketed", "inline", "failed_requests", "no_routes")
    assert after["finished"] == sum(after[kind] for kind in kinds)


def missing_rows(served: Traffic, reply: Reply) -> tuple[tuple[int, int], ...]:
    with pytest.raises(IncompleteRoutes):
        ShmRouteReader(reply.rid, arena=served.arena, timeout=30.0)
    with ShmRouteReader(reply.rid, arena=served.arena, allow_missing=True) as routes:
        return routes.missing


def test_rows_that_a_later_occupant_overwrote_before_the_gather_are_missing(
    served: Traffic, faults: FaultPlugin
) -> None:
    """Forwards do not wait for gathers here. No token of the former is one of the latter."""
    former = [[token & ~1 for token in served.prompt(60)] for _ in range(3)]
    later = [[token | 1 for token in served.prompt(400)] for _ in range(4)]
    with no_row_is_wrong(served, missing=3 * 60):
        served.post("/flush_cache?timeout=30", {})
        faults.turn_on("unfenced")
        try:
            overwritten = [served.generate(prompt, max_new_tokens=1) for prompt in former]
            served.post("/flush_cache?timeout=30", {})
            replies = [served.generate(prompt, max_new_tokens=1) for prompt in later]
        finally:
            faults.turn_off("unfenced")
        for reply in replies:
            assert len(served.routes(reply).rows) == 400
        for reply in overwritten:
            assert missing_rows(served, reply) == ((0, 60),)


def test_the_rows_of_a_prefill_longer_than_the_capture_buffer_are_missing(
    served: Traffic, faults: FaultPlugin
) -> None:
    """So is what the table held by then, and the engine goes on."""
    cached = served.generate(served.prompt(100), max_new_tokens=1)
    served.routes(cached)
    with no_row_is_wrong(served, missing=600 + 100):
        faults.turn_on("short")
        try:
            long = served.generate(served.prompt(600), max_new_tokens=9)
        finally:
            faults.turn_off("short")
        assert missing_rows(served, long) == ((0, 600),)
        turn = served.generate(cached.tokens + served.prompt(20))
        assert turn.meta["cached_tokens"] == 100
        assert missing_rows(served, turn) == ((0, 100),)
        assert len(served.routes(served.generate(served.prompt(600))).rows) == 600 + 24 - 1
    assert "a forward of 600 tokens, and the capture buffer holds 400" in served.log()
    assert served.counters()["hook_errors"] == 1


def test_rows_of_a_former_occupant_with_the_same_tokens_at_the_same_positions_are_not_given(
    served: Traffic, faults: FaultPlugin
) -> None:
    """Its tags would fit: the later one's forward writes its own rows, or none are left."""
    prompt, before = served.prompt(60), served.counters()

    def occupy(salt: int) -> Reply:
        """At the same locations, since the pool is empty; what experts are chosen is the salt's."""
        served.post("/flush_cache?timeout=30", {})
        faults.turn_on("salt", by=salt)
        try:
            return served.generate(prompt, max_new_tokens=1)
        finally:
            faults.turn_off("salt")

    with no_row_is_wrong(served, missing=60):
        former, later = (served.routes(occupy(salt)).rows for salt in (1, 2))
        assert ((later.astype(int) - former) % EXPERTS == 1).all()
        faults.turn_on("lost")
        try:
            last = occupy(3)
        finally:
            faults.turn_off("lost")
        assert missing_rows(served, last) == ((0, 60),)
    assert served.counters()["hook_errors"] == before["hook_errors"] + 1
