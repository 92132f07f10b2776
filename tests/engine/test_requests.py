"""Requests of every kind to one engine: which record each of them gets.

Engine start 1: Qwen3-MoE of 32 experts over HTTP, radix cache and overlap scheduling on.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import Engines
from replaying import handed_to_experts
from traffic import EveryConfiguration, Reply, Traffic, native_request

from shmroute import RouteNotFound, ShmRouteReader

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0.0}
MESSAGES = [{"role": "user", "content": "Which experts does this take?"}]


@pytest.fixture(scope="module")
def served(engines: Engines, checkpoint: Callable[[str], Path]) -> Iterator[Traffic]:
    arguments = "requests", checkpoint("qwen3-32"), "--enable-streaming-session"
    with engines.serve(*arguments, ending="kill") as traffic:
        yield traffic


# -- native /generate ------------------------------------------------------------------------


def test_a_request_has_a_row_for_every_token_but_the_last_sampled(served: Traffic) -> None:
    reply = served.generate(served.prompt(50), max_new_tokens=30)
    assert len(served.routes(reply).rows) == 50 + 30 - 1


def test_rid_ticket_and_response_lead_to_the_same_rows(served: Traffic) -> None:
    reply = served.generate(served.prompt(40))
    by_rid = served.routes(reply).rows
    for source in (reply.ticket, reply.meta["routed_experts"], reply.meta, reply.body):
        np.testing.assert_array_equal(served.read(source).rows, by_rid)


def test_a_process_that_knows_only_the_rid_reads_the_same_rows(served: Traffic) -> None:
    reply = served.generate(served.prompt(40))
    program = (
        "import sys, shmroute\n"
        "with shmroute.ShmRouteReader(sys.argv[1]) as routes:\n"
        "    sys.stdout.buffer.write(routes.numpy().tobytes())\n"
    )
    command = [sys.executable, "-c", program, reply.rid]
    read = subprocess.run(command, check=True, capture_output=True).stdout
    assert read == served.routes(reply).rows.tobytes()


def test_a_rid_of_ones_own_is_the_records_name(served: Traffic) -> None:
    body = native_request(served.prompt(30), rid="sample-7/turn-1")
    reply = Reply(body["input_ids"], served.post("/generate", body).json())
    assert reply.rid == "sample-7/turn-1"
    assert len(served.routes(reply).rows) == 53


def test_a_text_prompt_has_a_row_for_each_of_its_tokens(served: Traffic) -> None:
    body = native_request("The router picks four of thirty-two experts.")
    reply = Reply([], served.post("/generate", body).json())
    assert reply.meta["prompt_tokens"] > 10
    served.routes(reply)


def test_each_request_of_a_batch_has_its_own_record(served: Traffic) -> None:
    prompts = [served.prompt(length) for length in (20, 45, 70)]
    body = native_request([])
    body["input_ids"] = prompts
    replies = [
        Reply(prompt, answer)
        for prompt, answer in zip(prompts, served.post("/generate", body).json(), strict=True)
    ]
    assert len({reply.rid for reply in replies}) == 3
    assert [len(served.routes(reply).rows) for reply in replies] == [43, 68, 93]


def test_a_batch_of_texts_has_a_record_each(served: Traffic) -> None:
    body = native_request("")
    body["text"] = ["one prompt", "and another, longer prompt"]
    for answer in served.post("/generate", body).json():
        served.routes(Reply([], answer))


def test_sixty_four_requests_of_different_lengths_at_once(served: Traffic) -> None:
    prompts = [served.prompt(10 + 3 * i) for i in range(64)]

    def send(i: int) -> Reply:
        return served.generate(prompts[i], max_new_tokens=4 + i % 29)

    replies = served.together([lambda i=i: send(i) for i in range(64)])
    lengths = [len(served.routes(reply).rows) for reply in replies]
    assert lengths == [10 + 3 * i + 4 + i % 29 - 1 for i in range(64)]


def test_two_identical_prompts_at_the_same_time_have_their_own_rows(served: Traffic) -> None:
    prompt = served.prompt(80)
    first, second = served.together(2 * [lambda: served.generate(prompt, top_p=0.95)])
    assert first.rid != second.rid
    assert first.output != second.output
    for reply in (first, second):
        served.routes(reply)


def test_sampled_requests_have_rows_of_the_tokens_that_were_sampled(served: Traffic) -> None:
    """The rows of a continuation that repeats a sampled output come from its very tokens."""
    reply = served.generate(served.prompt(30), temperature=1.5, top_k=50)
    rows = served.routes(reply).rows
    repeated = served.generate(reply.tokens, max_new_tokens=1)
    np.testing.assert_array_equal(served.routes(repeated).rows[:-1], rows)


def test_a_stop_string_ends_the_rows_where_it_ends_the_output(served: Traffic) -> None:
    body = native_request(served.prompt(20), max_new_tokens=200, stop=["a", "e", "i"])
    reply = Reply(body["input_ids"], served.post("/generate", body).json())
    assert reply.meta["finish_reason"]["type"] == "stop"
    served.routes(reply)


def test_a_single_new_token_has_the_rows_of_the_prompt(served: Traffic) -> None:
    assert len(served.routes(served.generate(served.prompt(25), max_new_tokens=1)).rows) == 25


# -- prefix cache and turns --------------------------------------------------------------------


def test_a_second_turn_has_the_first_turns_rows_for_the_shared_prefix(served: Traffic) -> None:
    first = served.generate(served.prompt(60))
    second = served.generate(first.tokens + served.prompt(20))
    shared = second.meta["cached_tokens"]
    assert shared >= 60
    earlier, later = served.routes(first).rows, served.routes(second).rows
    assert len(later) == 60 + 24 + 20 + 24 - 1
    np.testing.assert_array_equal(later[:shared], earlier[:shared])


def test_requests_behind_a_cached_prefix_have_rows_of_the_prefix_too(served: Traffic) -> None:
    prefix = served.prompt(96)
    rows = served.routes(served.generate(prefix + served.prompt(8))).rows
    tails = [served.prompt(5 + i) for i in range(12)]
    replies = served.together([lambda tail=tail: served.generate(prefix + tail) for tail in tails])
    for reply in replies:
        assert reply.meta["cached_tokens"] >= 96
        np.testing.assert_array_equal(served.routes(reply).rows[:96], rows[:96])


@pytest.mark.parametrize("streaming", [False, True], ids=["a tree of turns", "streaming"])
def test_each_turn_of_a_session_has_the_rows_of_all_its_tokens(
    served: Traffic, streaming: bool
) -> None:
    """Only what is new is sent. A streaming session's turns share one array of token ids."""
    session = served.post("/open_session", {"capacity_of_str_len": 4096, "streaming": streaming})
    tokens: list[int] = []
    earlier, rid = None, None
    for turn in range(4):
        body = native_request(served.prompt(20 + turn))
        body["session_params"] = {"id": session.json(), "rid": rid}
        reply = Reply(tokens + body["input_ids"], served.post("/generate", body).json())
        rows = served.routes(reply).rows
        assert len(rows) == len(tokens) + 20 + turn + 24 - 1
        if earlier is not None:
            np.testing.assert_array_equal(rows[: len(earlier)], earlier)
        tokens, earlier, rid = reply.tokens, rows, reply.rid
    served.post("/close_session", {"session_id": session.json()})


@pytest.mark.parametrize("part", ["nothing", "half the prompt", "the whole prompt"])
def test_start_len_leaves_out_the_first_rows(served: Traffic, part: str) -> None:
    prompt = served.prompt(64)
    start = {"nothing": 0, "half the prompt": 32, "the whole prompt": 64}[part]
    reply = served.generate(prompt, start=start)
    tail = served.routes(reply)
    assert tail.start == start
    assert len(tail.rows) == 64 + 24 - 1 - start
    # Served from the cache of the first, so its rows are the very same.
    full = served.routes(served.generate(reply.tokens, max_new_tokens=1))
    np.testing.assert_array_equal(full.rows[start : 64 + 24 - 1], tail.rows)


def test_a_request_with_no_row_left_gets_an_empty_record_inline(served: Traffic) -> None:
    before = served.counters()
    reply = served.generate(served.prompt(10), start=10, max_new_tokens=1)
    with ShmRouteReader(reply.body) as routes:
        assert routes.inline
        assert routes.numpy().shape == (0, 4, 4)
    after = served.counters()
    assert after["inline_empty"] == before["inline_empty"] + 1
    assert after["reserved"] == before["reserved"]


def test_a_start_len_beyond_the_prompt_is_a_400_without_a_record(served: Traffic) -> None:
    before = served.counters()
    served.post("/generate", native_request(served.prompt(10), start=11), expect=400)
    after = served.counters()
    assert after["reserved"] == before["reserved"]
    assert after["no_routes"] - before["no_routes"] == after["finished"] - before["finished"]


# -- several choices ---------------------------------------------------------------------------


def test_four_choices_have_four_ids_and_four_records(served: Traffic) -> None:
    """SGLang's hidden request that warms the prefix cache for them makes none."""
    before = served.counters()
    prompt = served.prompt(48)
    answers = served.post("/generate", native_request(prompt, n=4)).json()
    replies = [Reply(prompt, answer) for answer in answers]
    assert len({reply.rid for reply in replies}) == 4
    assert len({tuple(reply.output) for reply in replies}) == 4
    for reply in replies:
        assert len(served.routes(reply).rows) == 48 + 24 - 1
    after = served.counters()
    assert after["finished"] == before["finished"] + 4
    assert after["reserved"] == before["reserved"] + 4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 2}),
        ("/v1/completions", {"prompt": "one", "n": 2}),
        ("/v1/completions", {"prompt": ["one", "two"]}),
    ],
    ids=["chat n=2", "completions n=2", "completions of two prompts"],
)
def test_openai_with_several_choices_is_a_400_that_names_generate(
    served: Traffic, path: str, body: dict[str, Any]
) -> None:
    asked = {"model": "any", "max_tokens": 4, **body, "return_routed_experts": True}
    refused = served.post(path, asked, expect=400)
    assert "/generate" in refused.json()["message"]
    del asked["return_routed_experts"]
    assert served.post(path, asked).status_code == 200


# -- OpenAI's API ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "Which experts does this take?"}),
    ],
    ids=["chat", "completions"],
)
class TestOpenAI:
    def test_sglext_carries_a_ticket_of_the_record_with_the_responses_id(
        self, served: Traffic, path: str, body: dict[str, Any]
    ) -> None:
        asked = {"model": "any", "max_tokens": 20, "ignore_eos": True, **body}
        answer = served.post(path, {**asked, "return_routed_experts": True}).json()
        by_ticket = served.read(answer["sglext"]["routed_experts"])
        by_rid = served.read(answer["id"])
        np.testing.assert_array_equal(by_ticket.rows, by_rid.rows)
        usage = answer["usage"]
        assert len(by_rid.rows) == usage["prompt_tokens"] + usage["completion_tokens"] - 1

    def test_streamed_the_ticket_comes_once_after_the_text(
        self, served: Traffic, path: str, body: dict[str, Any]
    ) -> None:
        asked = {"model": "any", "max_tokens": 20, "ignore_eos": True, **body}
        asked |= {"return_routed_experts": True, "stream_options": {"include_usage": True}}
        with served.stream(path, asked) as chunks:
            received = list(chunks)
        carrying = [i for i, chunk in enumerate(received) if "sglext" in chunk]
        texts = [i for i, chunk in enumerate(received) if chunk["choices"]]
        assert len(carrying) == 1
        assert carrying[0] > texts[-1]
        routes = served.read(received[carrying[0]]["sglext"]["routed_experts"])
        usage = received[-1]["usage"]
        assert len(routes.rows) == usage["prompt_tokens"] + usage["completion_tokens"] - 1

    def test_without_return_routed_experts_there_is_no_sglext(
        self, served: Traffic, path: str, body: dict[str, Any]
    ) -> None:
        answer = served.post(path, {"model": "any", "max_tokens": 4, **body}).json()
        assert answer.get("sglext") is None


# -- streaming and aborts ----------------------------------------------------------------------


def test_streamed_the_ticket_is_in_the_last_chunk_only(served: Traffic) -> None:
    prompt = served.prompt(30)
    with served.stream("/generate", native_request(prompt)) as chunks:
        received = list(chunks)
    assert len(received) > 1
    assert all(not chunk["meta_info"].get("routed_experts") for chunk in received[:-1])
    assert len(served.routes(Reply(prompt, received[-1])).rows) == 30 + 24 - 1


def test_an_abort_in_mid_generation_keeps_the_rows_made_so_far(served: Traffic) -> None:
    prompt = served.prompt(30)
    body = native_request(prompt, rid="aborted-while-running", max_new_tokens=4000)
    with served.stream("/generate", body) as chunks:
        received = [next(chunks) for _ in range(5)]
        served.post("/abort_request", {"rid": "aborted-while-running"})
        received.extend(chunks)
    reply = Reply(prompt, received[-1])
    assert reply.meta["finish_reason"]["type"] == "abort"
    assert 5 <= reply.meta["completion_tokens"] < 4000
    assert len(served.routes(reply).rows) == 30 + reply.meta["completion_tokens"] - 1


def test_an_abort_of_a_request_that_is_not_streamed_keeps_its_rows(served: Traffic) -> None:
    prompt = served.prompt(30)
    body = native_request(prompt, rid="aborted-unstreamed", max_new_tokens=4000)
    abort = threading.Timer(1.0, served.post, ("/abort_request", {"rid": "aborted-unstreamed"}))
    abort.start()
    reply = Reply(prompt, served.post("/generate", body).json())
    abort.join()
    assert reply.meta["finish_reason"]["type"] == "abort"
    served.routes(reply)


def test_a_client_that_goes_away_leaves_no_request_unaccounted(served: Traffic) -> None:
    before = served.counters()["finished"]
    body = native_request(served.prompt(30), rid="left-alone", max_new_tokens=4000)
    with served.stream("/generate", body) as chunks:
        next(chunks)
    deadline = time.monotonic() + 30.0
    while served.counters()["finished"] == before:
        assert time.monotonic() < deadline, "the engine did not end the request"
        time.sleep(0.05)
    assert served.read("left-alone").prompt_tokens == 30


# -- the same weights in a trainer -----------------------------------------------------------------


def test_replayed_in_transformers_every_layer_and_token_gets_the_engines_experts(
    served: Traffic, checkpoint: Callable[[str], Path]
) -> None:
    prompts = [served.prompt(length) for length in (20, 200, 75)]
    replies = served.together(
        [lambda prompt=prompt: served.generate(prompt, max_new_tokens=40) for prompt in prompts]
    )
    handed = handed_to_experts(checkpoint("qwen3-32"), replies, served.arena)
    for reply, experts in zip(replies, handed, strict=True):
        np.testing.assert_array_equal(experts, served.routes(reply).rows)


# -- requests that ask for no routes -------------------------------------------------------------


def test_without_return_routed_experts_nothing_is_reserved_or_published(served: Traffic) -> None:
    before = served.counters()
    replies = served.together(4 * [lambda: served.generate(served.prompt(40), routes=False)])
    after = served.counters()
    assert after == before
    for reply in replies:
        assert "routed_experts" not in reply.meta
        with pytest.raises(RouteNotFound):
            ShmRouteReader(reply.rid, arena=served.arena, timeout=0)


# -- size of the response ------------------------------------------------------------------------


@pytest.mark.parametrize("new_tokens", [2, 400])
def test_routes_add_at_most_350_bytes_to_the_response(served: Traffic, new_tokens: int) -> None:
    prompt = served.prompt(20)
    served.generate(prompt, **GREEDY)  # both find the same in the prefix cache
    plain, routed = (
        served.post(
            "/generate",
            native_request(prompt, routes=routes, max_new_tokens=new_tokens, **GREEDY),
        )
        for routes in (False, True)
    )
    assert plain.json()["output_ids"] == routed.json()["output_ids"]
    assert len(routed.content) - len(plain.content) <= 350
    assert len(served.routes(Reply(prompt, routed.json())).rows) == 20 + new_tokens - 1


def test_a_ticket_is_at_most_256_bytes_for_rids_up_to_64(served: Traffic) -> None:
    body = native_request(served.prompt(20), rid="r" * 64)
    reply = Reply(body["input_ids"], served.post("/generate", body).json())
    assert len(reply.ticket) <= 256
    assert len(reply.ticket) % 4 != 0, "a client that decodes int32 must fail"
    served.routes(reply)


# -- weight versions (last: the weights are others afterwards) -------------------------------------


def test_rows_carry_the_label_that_the_engine_started_with(served: Traffic) -> None:
    versions = served.routes(served.generate(served.prompt(30))).weight_versions
    assert [(run.first, run.label) for run in versions] == [(0, "default")]


class TestWeightUpdates:
    def update(self, served: Traffic, model: Path, label: str) -> None:
        body = {"model_path": str(model), "weight_version": label, "flush_cache": False}
        assert served.post("/update_weights_from_disk", body).json()["success"]

    def fresh_versions(self, served: Traffic, reply: Reply) -> list[str]:
        """Versions of the rows that this request computed itself, in their order."""
        routes = served.routes(reply)
        ends = [run.first for run in routes.weight_versions[1:]] + [len(routes.rows)]
        cached = reply.meta["cached_tokens"]
        runs = zip(routes.weight_versions, ends, strict=True)
        return [run.label for run, end in runs if end > cached]

    def test_rows_from_the_cache_keep_the_version_they_were_computed_under(
        self, served: Traffic, checkpoint: Callable[[str], Path]
    ) -> None:
        first = served.generate(served.prompt(60))
        self.update(served, checkpoint("qwen3-32-trained"), "step-1")
        second = served.generate(first.tokens)
        cached = second.meta["cached_tokens"]
        routes = served.routes(second)
        assert cached >= 60
        assert [(run.first, run.label) for run in routes.weight_versions] == [
            (0, "default"),
            (cached, "step-1"),
        ]
        np.testing.assert_array_equal(routes.rows[:cached], served.routes(first).rows[:cached])

    def test_a_request_that_runs_across_an_update_has_rows_of_both_versions(
        self, served: Traffic, checkpoint: Callable[[str], Path]
    ) -> None:
        prompt = served.prompt(30)
        with served.stream("/generate", native_request(prompt, max_new_tokens=120)) as chunks:
            received = [next(chunks) for _ in range(10)]
            served.post("/pause_generation", {"mode": "in_place"})
            self.update(served, checkpoint("qwen3-32"), "step-2")
            served.post("/continue_generation", {})
            received.extend(chunks)
        reply = Reply(prompt, received[-1])
        assert self.fresh_versions(served, reply) == ["step-1", "step-2"]
        spans = reply.meta["weight_versions"]
        assert [span["version"] for span in spans] == ["step-1", "step-2"]

    def test_requests_sent_while_weights_change_have_rows_of_known_versions(
        self, served: Traffic, checkpoint: Callable[[str], Path]
    ) -> None:
        """Each sender has answers from before the update, during it and from after it."""
        all_have_begun, updated = threading.Barrier(5), threading.Event()

        def send() -> list[Reply]:
            replies = [served.generate(served.prompt(20), max_new_tokens=12)]
            all_have_begun.wait()
            while not updated.is_set():
                replies.append(served.generate(served.prompt(20), max_new_tokens=12))
            return [*replies, served.generate(served.prompt(20), max_new_tokens=12)]

        def update() -> list[Reply]:
            all_have_begun.wait()
            self.update(served, checkpoint("qwen3-32-trained"), "step-3")
            updated.set()
            return []

        for replies in served.together([update, send, send, send, send])[1:]:
            versions = [self.fresh_versions(served, reply) for reply in replies]
            assert versions[0] == ["step-2"]
            assert versions[-1] == ["step-3"]
            assert set(itertools.chain(*versions)) == {"step-2", "step-3"}


class TestAfterAllOfThese(EveryConfiguration):
    pass
