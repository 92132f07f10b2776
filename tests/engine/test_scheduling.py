"""The scheduler's other ways: without overlap and prefix cache, and with retraction.

Engine starts:

6  Qwen3-MoE of 32 experts, ``--disable-radix-cache --disable-overlap-schedule``
7  the same model with overlap; every third step retracts a request (``SGLANG_TEST_RETRACT``)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import Engines
from traffic import EveryConfiguration, Reply, Traffic, native_request

pytestmark = pytest.mark.engine


class TestWithoutRadixCacheAndOverlap(EveryConfiguration):
    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, engines: Engines, checkpoint: Callable[[str], Path]) -> Iterator[Traffic]:
        arguments = ("--disable-radix-cache", "--disable-overlap-schedule")
        model = checkpoint("qwen3-32")
        with engines.serve("no-overlap", model, *arguments, ending="kill") as traffic:
            yield traffic

    def test_requests_of_different_lengths_at_once(self, served: Traffic) -> None:
        prompts = [served.prompt(15 + 5 * i) for i in range(24)]
        replies = served.together(
            [lambda prompt=prompt: served.generate(prompt) for prompt in prompts]
        )
        for prompt, reply in zip(prompts, replies, strict=True):
            assert len(served.routes(reply).rows) == len(prompt) + 24 - 1

    def test_a_prompt_sent_twice_is_computed_twice(self, served: Traffic) -> None:
        prompt = served.prompt(60)
        for reply in served.together(2 * [lambda: served.generate(prompt)]):
            assert reply.meta["cached_tokens"] == 0
            served.routes(reply)

    def test_an_abort_in_mid_generation_keeps_the_rows_made_so_far(self, served: Traffic) -> None:
        prompt = served.prompt(30)
        body = native_request(prompt, rid="aborted", max_new_tokens=4000)
        with served.stream("/generate", body) as chunks:
            received = [next(chunks) for _ in range(5)]
            served.post("/abort_request", {"rid": "aborted"})
            received.extend(chunks)
        reply = Reply(prompt, received[-1])
        assert reply.meta["finish_reason"]["type"] == "abort"
        assert len(served.routes(reply).rows) == 30 + reply.meta["completion_tokens"] - 1


class TestRetraction(EveryConfiguration):
    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, engines: Engines, checkpoint: Callable[[str], Path]) -> Iterator[Traffic]:
        model, env = checkpoint("qwen3-32"), {"SGLANG_TEST_RETRACT": "1"}
        with engines.serve("retraction", model, ending="terminate", env=env) as traffic:
            yield traffic

    def test_a_retracted_request_has_every_row_once(self, served: Traffic) -> None:
        prompts = [served.prompt(40 + 4 * i) for i in range(24)]
        replies = served.together(
            [lambda prompt=prompt: served.generate(prompt, max_new_tokens=40) for prompt in prompts]
        )
        for prompt, reply in zip(prompts, replies, strict=True):
            assert len(served.routes(reply).rows) == len(prompt) + 40 - 1
        assert any(reply.meta["num_retractions"] > 0 for reply in replies)
