"""Models of other shapes than the one that requests of every kind are tried on.

Engine starts:

2  Qwen3-MoE of 256 experts
3  the same model and requests with the package installed and no arena asked for: SGLang's
   native path, which the records of start 2 are compared with
4  Qwen3-MoE of 512 experts, pages of 16, prompts in chunks of 128 with decodes mixed in
5  Mixtral
6  the shape of DeepSeek-V3: a dense first layer, shared experts

GPT-OSS is not among them: SGLang serves it with none of the attention backends that a CPU has.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from engines import Engines
from hook_probe import HookProbe
from replaying import handed_to_experts
from small_models import ModelShape
from traffic import EveryConfiguration, Reply, Routes, Traffic, native_request

from shmroute import RouteNotFound, ShmRouteReader

pytestmark = pytest.mark.engine


# -- 256 experts, and the engine without an arena ------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """What one engine answered to ``converse``, and the hooks that its processes had."""

    traffic: Traffic
    replies: list[Reply]
    without_routes: Reply
    hooks: dict[str, list[str]]


def converse(traffic: Traffic, probe: HookProbe) -> Session:
    """The same greedy requests each time, one after the other so that batches are the same."""
    replies = [
        traffic.generate(traffic.prompt(15 + 6 * i), max_new_tokens=20, temperature=0.0)
        for i in range(20)
    ]
    replies += [
        traffic.generate(
            reply.tokens + traffic.prompt(12), start=start, max_new_tokens=20, temperature=0.0
        )
        for reply, start in zip(replies[:6], (0, 0, 0, 5, 30, 40), strict=True)
    ]
    silent = traffic.generate(traffic.prompt(30), routes=False, temperature=0.0)
    return Session(traffic, replies, silent, probe.hooks())


def decode_natively(reply: Reply, shape: ModelShape) -> npt.NDArray[np.int32]:
    """As a user of SGLang decodes it: ``int32 [rows, all layers, top_k]``."""
    flat = np.frombuffer(base64.b64decode(reply.meta["routed_experts"]), dtype=np.int32)
    return flat.reshape(-1, shape.num_layers, shape.top_k)


@pytest.fixture(scope="module")
def records() -> dict[str, Routes]:
    """The records of start 2 by rid, read while the engine lived."""
    return {}


@pytest.fixture(scope="module")
def with_arena(
    engines: Engines,
    checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    records: dict[str, Routes],
) -> Session:
    probe = HookProbe(tmp_path_factory.mktemp("probe"))
    model = checkpoint("qwen3-256")
    with engines.serve("qwen3-256", model, ending="kill", env=probe.env) as traffic:
        session = converse(traffic, probe)
        records.update({reply.rid: traffic.routes(reply) for reply in session.replies})
    return session


@pytest.fixture(scope="module")
def without_arena(
    engines: Engines,
    checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    with_arena: Session,
) -> Session:
    """After the other has ended: two engines at once would fight for the processors."""
    probe = HookProbe(tmp_path_factory.mktemp("probe"))
    model, flag = checkpoint("qwen3-256"), "--enable-return-routed-experts"
    with engines.serve_without_arena("native", model, flag, env=probe.env) as traffic:
        return converse(traffic, probe)


class TestQwen256(EveryConfiguration):
    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, with_arena: Session) -> Traffic:
        return with_arena.traffic

    def test_uint8_holds_every_id_up_to_255(
        self, records: dict[str, Routes], served: Traffic
    ) -> None:
        assert {routes.rows.dtype for routes in records.values()} == {np.dtype(np.uint8)}
        assert served.used[:, 255].any()
        assert served.used[:, 0].any()


class TestAgainstAnEngineWithoutArena:
    def test_every_row_is_the_one_that_the_native_path_returns(
        self, with_arena: Session, without_arena: Session, records: dict[str, Routes]
    ) -> None:
        compared = 0
        for ours, theirs in zip(with_arena.replies, without_arena.replies, strict=True):
            if ours.tokens == theirs.tokens:
                routes = records[ours.rid]
                native = decode_natively(theirs, with_arena.traffic.shape)
                np.testing.assert_array_equal(routes.native, native)
                compared += len(native)
        assert compared >= 2000

    def test_the_models_output_does_not_change(
        self, with_arena: Session, without_arena: Session
    ) -> None:
        ours = [reply.tokens for reply in with_arena.replies]
        assert ours == [reply.tokens for reply in without_arena.replies]

    def test_meta_info_has_the_same_keys_with_routes_and_without(
        self, with_arena: Session, without_arena: Session
    ) -> None:
        assert with_arena.replies[0].meta.keys() == without_arena.replies[0].meta.keys()
        silent = with_arena.without_routes.meta
        assert silent.keys() == without_arena.without_routes.meta.keys()
        assert "routed_experts" not in silent

    def test_no_hook_is_registered_without_an_arena(
        self, with_arena: Session, without_arena: Session
    ) -> None:
        assert len(without_arena.hooks) == len(with_arena.hooks) >= 3
        assert not any(without_arena.hooks.values())
        # The probe does see hooks where there are some.
        assert with_arena.hooks["launcher"]
        assert sum(bool(hooks) for hooks in with_arena.hooks.values()) >= 2

    def test_without_an_arena_none_is_made(
        self, with_arena: Session, without_arena: Session
    ) -> None:
        assert "shmroute: arena" in with_arena.traffic.log()
        assert "shmroute: arena" not in without_arena.traffic.log()


# -- 512 experts, chunks and pages ---------------------------------------------------------------


class TestQwen512InPagesAndMixedChunks(EveryConfiguration):
    RUNNING = 8

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, engines: Engines, checkpoint: Callable[[str], Path]) -> Iterator[Traffic]:
        arguments = (
            "--page-size=16",
            "--enable-mixed-chunk",
            "--chunked-prefill-size=128",
            f"--max-running-requests={cls.RUNNING}",
        )
        model = checkpoint("qwen3-512")
        with engines.serve("qwen3-512", model, *arguments, ending="terminate") as traffic:
            yield traffic

    def test_prompts_of_several_chunks_while_others_decode(self, served: Traffic) -> None:
        lengths = (10, 25, 300, 17, 513, 128, 129, 700, 64, 400, 255)
        prompts = [served.prompt(length) for length in lengths]
        replies = served.together(
            [lambda prompt=prompt: served.generate(prompt, max_new_tokens=60) for prompt in prompts]
        )
        for prompt, reply in zip(prompts, replies, strict=True):
            assert len(served.routes(reply).rows) == len(prompt) + 60 - 1

    def test_decodes_were_mixed_into_chunks(self, served: Traffic) -> None:
        """With --enable-mixed-chunk a chunk takes every running request along."""
        chunks = re.findall(r"Prefill batch.*#new-token: (\d+),.*#running-req: (\d+)", served.log())
        assert any(int(tokens) > 64 and int(running) > 1 for tokens, running in chunks)

    def test_rows_need_two_bytes(self, served: Traffic) -> None:
        rows = served.routes(served.generate(served.prompt(200))).rows
        assert rows.dtype == np.uint16
        assert rows.max() > 255

    def test_a_cached_prefix_of_whole_pages_keeps_its_rows(self, served: Traffic) -> None:
        first = served.generate(served.prompt(250))
        second = served.generate(first.tokens + served.prompt(40))
        cached = second.meta["cached_tokens"]
        assert cached >= 240
        assert cached % 16 == 0
        earlier, later = served.routes(first).rows, served.routes(second).rows
        np.testing.assert_array_equal(later[:cached], earlier[:cached])

    def test_an_abort_in_the_queue_has_no_routes_and_is_counted(self, served: Traffic) -> None:
        before = served.counters()
        with ExitStack() as running, ThreadPoolExecutor(1) as waiting:
            streams = []
            for i in range(self.RUNNING):
                body = native_request(served.prompt(20), rid=f"running-{i}", max_new_tokens=1500)
                streams.append(running.enter_context(served.stream("/generate", body)))
            for chunks in streams:
                next(chunks)
            body = native_request(served.prompt(20), rid="queued")
            queued = waiting.submit(served.post, "/generate", body)
            self.abort_until_done(served, "queued", queued)
            for i, chunks in enumerate(streams):
                served.post("/abort_request", {"rid": f"running-{i}"})
                for _ in chunks:
                    pass
        self.has_no_routes(served, "queued", queued.result())
        after = served.counters()
        assert after["no_routes"] == before["no_routes"] + 1
        assert after["finished"] == before["finished"] + 1 + self.RUNNING

    def test_an_abort_between_two_chunks_has_no_routes_and_is_counted(
        self, served: Traffic
    ) -> None:
        before, batches = served.counters(), served.log().count("Prefill batch")
        with ThreadPoolExecutor(1) as waiting:
            body = native_request(served.prompt(6000), rid="in-chunks", max_new_tokens=500)
            chunked = waiting.submit(served.post, "/generate", body)
            while served.log().count("Prefill batch") == batches:
                assert not chunked.done()
                time.sleep(0.01)
            self.abort_until_done(served, "in-chunks", chunked)
        self.has_no_routes(served, "in-chunks", chunked.result())
        after = served.counters()
        assert after["no_routes"] == before["no_routes"] + 1
        assert after["finished"] == before["finished"] + 1

    def abort_until_done(self, served: Traffic, rid: str, reply: Future[httpx.Response]) -> None:
        """Abort more than once, since a request may reach the engine after its abort."""
        while not reply.done():
            served.post("/abort_request", {"rid": rid})
            time.sleep(0.1)

    def has_no_routes(self, served: Traffic, rid: str, response: httpx.Response) -> None:
        meta = response.json()["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert not meta.get("routed_experts")
        with pytest.raises(RouteNotFound):
            ShmRouteReader(rid, arena=served.arena, timeout=0)


# -- other families ------------------------------------------------------------------------------


class Family(EveryConfiguration):
    """A checkpoint of that name, served to two dozen requests at once."""

    name: str

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, engines: Engines, checkpoint: Callable[[str], Path]) -> Iterator[Traffic]:
        with engines.serve(cls.name, checkpoint(cls.name), ending="terminate") as traffic:
            prompts = [traffic.prompt(30 + 8 * i) for i in range(24)]
            replies = traffic.together(
                [lambda prompt=prompt: traffic.generate(prompt) for prompt in prompts]
            )
            for reply in replies:
                traffic.routes(reply)
            yield traffic

    def test_replayed_in_transformers_every_layer_and_token_gets_the_engines_experts(
        self, served: Traffic, checkpoint: Callable[[str], Path]
    ) -> None:
        replies = [served.generate(served.prompt(length)) for length in (90, 35)]
        handed = handed_to_experts(checkpoint(self.name), replies, served.arena)
        for reply, experts in zip(replies, handed, strict=True):
            np.testing.assert_array_equal(experts, served.routes(reply).rows)


class TestMixtral(Family):
    name = "mixtral"


class TestDeepSeekV3(Family):
    name = "deepseek-v3"

    def test_only_the_layers_with_experts_have_rows(self, served: Traffic) -> None:
        routes = served.routes(served.generate(served.prompt(40)))
        assert routes.layer_ids == (1, 2, 3)
        assert routes.rows.shape == (63, 3, 4)

    def test_the_native_form_has_a_zero_dense_layer(self, served: Traffic) -> None:
        routes = served.routes(served.generate(served.prompt(40)))
        assert routes.native.shape == (63, 4, 4)
        assert routes.native.dtype == np.int32
        assert not routes.native[:, 0].any()
        np.testing.assert_array_equal(routes.native[:, 1:], routes.rows)

    def test_shared_experts_take_no_place_among_the_ids(self, served: Traffic) -> None:
        """Routed experts are 0 to 63; a fused shared one would be 64, a filler any number."""
        rows = served.routes(served.generate(served.prompt(200))).rows
        assert rows.max() <= 63
        assert (np.sort(rows, axis=-1)[..., 1:] != np.sort(rows, axis=-1)[..., :-1]).all()

    def test_a_second_turn_has_the_first_turns_rows(self, served: Traffic) -> None:
        first = served.generate(served.prompt(60))
        second = served.generate(first.tokens + served.prompt(20))
        cached = second.meta["cached_tokens"]
        assert cached >= 60
        earlier, later = served.routes(first).rows, served.routes(second).rows
        np.testing.assert_array_equal(later[:cached], earlier[:cached])
