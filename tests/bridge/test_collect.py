"""The hooks on finished requests, with SGLang's own request and pool types."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, Forwards, started_publisher

import shmroute
from sglang_bridge.gather_host import HostGatherer
from sglang_bridge.table import RouteTable
from shmroute import RouteFailed, RouteLayout, ShmRouteReader
from shmroute.counters import read_counters
from shmroute.ticket import decode

ROUTES = RouteLayout(16, 2, range(3))


class Scheduler:
    """What of a scheduler the hooks see: the pools, the capturer's owner side, requests."""

    def __init__(self, sglang: SimpleNamespace, arena: shmroute.Arena) -> None:
        self._sglang = sglang
        self.capturer: Any = None
        self.arena = arena
        self.table = RouteTable(ROUTES, 1024, "cpu", vocabulary=VOCABULARY)
        self.publisher = started_publisher(arena, HostGatherer(self.table))
        self.forwards = Forwards(self.table)
        self.req_to_token_pool = sglang.ReqToTokenPool(4, 256, "cpu", False)

    def request(self, rid: str, prompt: int, output: int, **fields: Any) -> tuple[Any, np.ndarray]:
        """A request that ran its forwards and holds row 1 of the pool, and its rows."""
        parameters = self._sglang.SamplingParams(max_new_tokens=fields.pop("max_new_tokens", 64))
        parameters.n = fields.pop("n", 1)
        ids = self.forwards.token_ids(prompt + output)
        req = self._sglang.Req(
            rid,
            "",
            array("q", ids[:prompt].tolist()),
            parameters,
            return_routed_experts=fields.pop("return_routed_experts", True),
            **fields,
        )
        req.output_ids.extend(ids[prompt:].tolist())
        req.finished_reason = self._sglang.FINISH_LENGTH(length=output)
        locations = self.forwards.locations(prompt + output)
        captured = self.forwards.run(ids, locations)
        req.kv.req_pool_idx = 1
        self.req_to_token_pool.req_to_token[1, : len(locations)] = _int32(locations)
        return req, self.forwards.rows(captured)

    @property
    def counters(self) -> dict[str, int]:
        return read_counters(self.arena.memory.counters)


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))


@pytest.fixture
def scheduler(sglang: SimpleNamespace, arena_name: str) -> Iterator[Scheduler]:
    from capturers import WithoutModel

    arena = shmroute.Arena.create(arena_name, ROUTES, capacity="1MiB", slots=8)
    made = Scheduler(sglang, arena)
    capturer = made.capturer = WithoutModel(made.publisher, made.table)
    sglang.set_global_experts_capturer(capturer)
    yield made
    sglang.set_global_experts_capturer(None)
    capturer.destroy()


def collected(scheduler: Scheduler, req: Any) -> bytes | None:
    from sglang_bridge import collect

    collect.collect(scheduler, req)
    collect.flush()
    return None if req.routed_experts is None else envelope_of(req)


def envelope_of(req: Any) -> bytes:
    envelope: bytes = req.routed_experts.numpy().tobytes()
    return envelope


def check_rows(served: Iterable[tuple[Any, np.ndarray]]) -> None:
    """Each request's ticket opens its own rows."""
    for req, rows in served:
        with ShmRouteReader(envelope_of(req)) as routes:
            np.testing.assert_array_equal(routes.numpy(), rows[:-1])


def ended(scheduler: Scheduler, *rids: str, prompt: int = 20) -> list[tuple[Any, np.ndarray]]:
    """Requests of one step, each through the hook; the next one takes its row of the pool."""
    from sglang_bridge import collect

    served = []
    for rid in rids:
        served.append(scheduler.request(rid, prompt=prompt, output=5))
        collect.collect(scheduler, served[-1][0])
    return served


def test_all_tokens_but_the_last_sampled_one_have_a_row(scheduler: Scheduler) -> None:
    req, rows = scheduler.request("plain", prompt=20, output=5)
    with ShmRouteReader(collected(scheduler, req)) as routes:
        assert (routes.rid, routes.start, routes.prompt_tokens) == ("plain", 0, 20)
        np.testing.assert_array_equal(routes.numpy(), rows[:-1])


def test_rows_begin_where_the_request_wants_them(scheduler: Scheduler) -> None:
    req, rows = scheduler.request("late", prompt=20, output=5, routed_experts_start_len=18)
    with ShmRouteReader(collected(scheduler, req)) as routes:
        assert (routes.start, routes.tokens) == (18, 6)
        np.testing.assert_array_equal(routes.numpy(), rows[18:-1])


def test_a_start_behind_the_end_is_an_empty_record(scheduler: Scheduler) -> None:
    req, _ = scheduler.request("behind", prompt=20, output=0, routed_experts_start_len=20)
    with ShmRouteReader(collected(scheduler, req)) as routes:
        assert (routes.start, routes.tokens) == (19, 0)


def test_what_was_sampled_past_the_stop_has_no_row(scheduler: Scheduler) -> None:
    req, rows = scheduler.request("stopped", prompt=10, output=8)
    req.finished_len = 5
    with ShmRouteReader(collected(scheduler, req)) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows[:14])


def test_locations_are_read_before_the_pool_row_is_rewritten(scheduler: Scheduler) -> None:
    """SGLang releases the KV cache in the statement after the hook."""
    from sglang_bridge import collect

    first, rows = scheduler.request("first", prompt=20, output=5)
    collect.collect(scheduler, first)
    scheduler.request("second", prompt=20, output=5)  # takes the same row of the pool
    collect.flush()
    with ShmRouteReader("first", arena=scheduler.arena.name) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows[:-1])


def test_a_request_that_did_not_ask_costs_nothing(scheduler: Scheduler) -> None:
    from sglang_bridge import collect

    before = scheduler.counters
    req, _ = scheduler.request("quiet", prompt=5, output=2, return_routed_experts=False)
    assert collected(scheduler, req) is None
    collect.issue([req])
    collect.count_aborted(req)
    assert scheduler.counters == before


def test_the_hidden_warm_up_of_several_choices_makes_no_record(scheduler: Scheduler) -> None:
    from sglang_bridge import collect

    req, _ = scheduler.request("hidden", prompt=5, output=1, max_new_tokens=0, n=4)
    assert collected(scheduler, req) is None
    collect.issue([req])
    assert scheduler.counters["finished"] == 0


def test_a_reply_that_is_an_http_error_makes_no_record_and_is_counted(
    scheduler: Scheduler, sglang: SimpleNamespace
) -> None:
    from sglang_bridge import collect

    req, _ = scheduler.request("error", prompt=5, output=1)
    req.finished_reason = sglang.FINISH_ABORT("too long", status_code=400)
    assert collected(scheduler, req) is None
    collect.issue([req])
    collect.count_aborted(req)  # the same request: counted once
    assert (scheduler.counters["finished"], scheduler.counters["no_routes"]) == (1, 1)


def test_an_abort_in_mid_generation_keeps_its_rows(
    scheduler: Scheduler, sglang: SimpleNamespace
) -> None:
    from sglang_bridge import collect

    req, rows = scheduler.request("aborted", prompt=10, output=3)
    req.finished_reason = sglang.FINISH_ABORT("by the client")
    with ShmRouteReader(collected(scheduler, req)) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows[:12])
    collect.issue([req])
    assert scheduler.counters["no_routes"] == 0


@pytest.mark.parametrize("rid", ["\ud800", "x" * 5000], ids=["surrogate", "too long"])
def test_a_rid_that_no_ticket_can_hold_fails_this_request_and_not_the_scheduler(
    scheduler: Scheduler, rid: str
) -> None:
    req, _ = scheduler.request(rid, prompt=5, output=2)
    with pytest.raises(RouteFailed):
        ShmRouteReader(collected(scheduler, req))
    assert scheduler.counters["hook_errors"] == 1
    assert scheduler.counters["failed_before_ticket"] == 1


@pytest.mark.parametrize("lacking", [0, 1], ids=["all captured", "one row short"])
def test_a_forward_that_captured_too_few_rows_leaves_none_of_a_former_occupant(
    scheduler: Scheduler, lacking: int
) -> None:
    """The same tokens ran at the same places before: tags alone would let the old row pass."""
    from capturers import Batch

    req, _ = scheduler.request("again", prompt=20, output=5)
    ids = np.array([*req.origin_input_ids, *req.output_ids])
    locations = scheduler.req_to_token_pool.req_to_token[1, :25].numpy().astype(np.int64)
    captured = scheduler.forwards.routes(25)
    given = torch.from_numpy(captured[: 25 - lacking].copy())
    scheduler.capturer.forward(Batch(ids, locations), given)
    with ShmRouteReader(collected(scheduler, req), allow_missing=True) as routes:
        assert routes.missing_rows == (24 if lacking else 0)
        if not lacking:
            np.testing.assert_array_equal(routes.numpy(), scheduler.forwards.rows(captured)[:24])
    assert scheduler.counters["hook_errors"] == lacking


def test_what_a_forward_captured_is_not_there_for_the_next_one(scheduler: Scheduler) -> None:
    """A layer that does not capture next time leaves -1, which is missing, and not old ids."""
    from capturers import Batch

    ids, locations = scheduler.forwards.token_ids(8), scheduler.forwards.locations(8)
    buffer = torch.from_numpy(scheduler.forwards.routes(8))
    scheduler.capturer.forward(Batch(ids, locations), buffer)
    assert (buffer == -1).all()


def test_every_finished_request_is_counted_once_also_when_the_hook_fails(
    scheduler: Scheduler, sglang: SimpleNamespace
) -> None:
    from sglang_bridge import collect

    for i in range(12):
        rid = "\ud800" if i == 3 else f"rid-{i}"
        req, _ = scheduler.request(rid, prompt=5, output=2)
        if i == 5:
            req.kv = None  # the hook fails before it has described the request
        if i == 6:
            req.finished_reason = sglang.FINISH_ABORT("rejected", status_code=503)
        collected(scheduler, req)
        collect.issue([req])
    scheduler.publisher.stop()
    counts = scheduler.counters
    assert counts["finished"] == 12
    assert counts["finished"] == (
        counts["ticketed"] + counts["inline"] + counts["failed_requests"] + counts["no_routes"]
    )
    assert (counts["failed_requests"], counts["no_routes"], counts["hook_errors"]) == (2, 1, 2)


def test_a_request_that_cannot_be_described_leaves_the_step_s_others_their_routes(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_bridge import collect
    from sglang_bridge.finished import Finished

    describe = Finished.describe

    def failing(self: Finished) -> None:
        if self.req.rid == "b":
            raise RuntimeError("no description")
        describe(self)

    monkeypatch.setattr(Finished, "describe", failing)
    served = ended(scheduler, "a", "b", "c")
    collect.flush()
    check_rows([served[0], served[2]])
    with pytest.raises(RouteFailed, match="no description"):
        ShmRouteReader(envelope_of(served[1][0]))
    counts = scheduler.counters
    assert (counts["finished"], counts["ticketed"], counts["failed_requests"]) == (3, 2, 1)


def test_a_request_of_sglang_s_is_not_kept_until_its_record_is_sealed(scheduler: Scheduler) -> None:
    """It may hold images on the GPU."""
    served = ended(scheduler, "a", "b")
    scheduler.publisher.issue()
    assert [job.request.req for job in scheduler.publisher._pending] == [None, None]
    scheduler.publisher.flush()
    check_rows(served)


def test_a_session_s_next_turn_may_change_the_prompt_before_the_seal(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang gives the array itself to the next turn, which cuts it and writes on."""
    held, judge = threading.Event(), scheduler.publisher._judge

    def late(*arguments: Any) -> Any:
        assert held.wait(30)
        return judge(*arguments)

    monkeypatch.setattr(scheduler.publisher, "_judge", late)
    req, rows = scheduler.request("turn 2", prompt=20, output=5)
    req.session = object()
    ticket = collected(scheduler, req)
    del req.origin_input_ids[10:]
    req.origin_input_ids.extend(array("q", [1] * 40))
    held.set()
    with ShmRouteReader(ticket) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows[:-1])


# -- when tickets are issued ---------------------------------------------------------------------


def check_sums(scheduler: Scheduler) -> dict[str, int]:
    """The counters, once everything is sealed or failed; every request is in one of them."""
    scheduler.publisher.stop()
    counts = scheduler.counters
    assert counts["finished"] == (
        counts["ticketed"] + counts["inline"] + counts["failed_requests"] + counts["no_routes"]
    )
    assert counts["reserved"] == counts["sealed"] + counts["failed"]
    return counts


def test_where_a_request_ends_nothing_but_its_locations_is_taken(scheduler: Scheduler) -> None:
    ((req, _),) = ended(scheduler, "only noted")
    assert req.routed_experts is None
    assert (scheduler.counters["finished"], scheduler.counters["reserved"]) == (0, 0)


def test_the_first_response_finds_its_ticket_and_the_step_s_others_have_theirs(
    scheduler: Scheduler,
) -> None:
    from sglang_bridge import collect

    served = ended(scheduler, "a", "b", "c")
    unfinished, _ = scheduler.request("goes on", prompt=5, output=1)
    unfinished.finished_reason = None
    collect.issue([unfinished])
    assert all(req.routed_experts is None for req, _ in served)
    collect.issue([served[1][0]])
    tickets = [decode(envelope_of(req)) for req, _ in served]
    assert [ticket.rid for ticket in tickets] == ["a", "b", "c"]
    generations = [ticket.generation for ticket in tickets]
    assert generations == sorted(generations)
    assert scheduler.counters["publish_calls"] == 0
    collect.flush()
    assert scheduler.counters["publish_calls"] == 1
    check_rows(served)


def streaming(
    sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], Callable[..., None]]:
    """SGLang's making of a step's responses with the hook around it, and what it sends."""
    from sglang.srt.managers.scheduler_components import output_streamer
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    from sglang_bridge import scheduler as hooks

    serving = SimpleNamespace(stream_interval=1, weight_version=None)
    parallel = SimpleNamespace(dp_rank=None, attn_tp_rank=1)  # the first one's logs each request
    monkeypatch.setattr(output_streamer, "get_serving", lambda: serving)
    monkeypatch.setattr(output_streamer, "get_parallel", lambda: parallel)
    responses: list[Any] = []
    streamer = output_streamer.SchedulerOutputStreamer(
        send_to_detokenizer=SimpleNamespace(send_output=responses.append),
        tree_cache=None,
        server_args=None,
        is_generation=True,
        spec_algorithm=sglang.SpeculativeAlgorithm.NONE,
        disaggregation_mode=None,
        enable_hicache_storage=lambda: False,
    )
    make = _wrap_fn(
        output_streamer.SchedulerOutputStreamer._stream_output_generation,
        hooks._streamed,
        HookType.BEFORE,
    )

    def stream(reqs: list[Any], skip_req: Any = None) -> None:
        for req in reqs:
            req.tokenizer, req.stream = None, True
        make(streamer, reqs, False, skip_req)

    return responses, stream


def test_sglang_s_response_of_a_finished_request_carries_its_ticket(
    scheduler: Scheduler, sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook as it is registered, around SGLang's own making of a step's responses."""
    responses, stream = streaming(sglang, monkeypatch)
    (req, _), (other, _) = ended(scheduler, "first", "second")
    running, _ = scheduler.request("goes on", prompt=5, output=50)
    running.finished_reason = None
    stream([req, running, other])
    (response,) = responses
    carried = dict(zip(response.rids, response.routed_experts, strict=True))
    assert carried["goes on"] is None
    for rid in ("first", "second"):
        assert decode(carried[rid].numpy().tobytes()).rid == rid


def test_a_request_that_sglang_leaves_out_of_the_responses_is_not_counted(
    scheduler: Scheduler, sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is skipped while its prompt is still computed in pieces, and answered later."""
    responses, stream = streaming(sglang, monkeypatch)
    left_out, _ = scheduler.request("left out", prompt=5, output=1)
    stream([left_out], left_out)
    assert (responses, scheduler.counters["finished"]) == ([], 0)
    stream([left_out])
    assert (len(responses), scheduler.counters["no_routes"]) == (1, 1)


def test_a_step_s_responses_pass_one_hook(
    scheduler: Scheduler, sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One around each response would take a microsecond of each running request's every step."""
    from sglang_bridge import collect

    calls = []
    monkeypatch.setattr(collect, "issue", lambda *given: calls.append(given))
    _, stream = streaming(sglang, monkeypatch)
    running = [scheduler.request(f"{i}", prompt=2, output=1)[0] for i in range(3)]
    for one in running:
        one.finished_reason = None
    stream(running)
    assert calls == [(running, None)]


@pytest.mark.parametrize("rids", [("once",), ("once", "beside", "and a third")])
def test_a_request_whose_response_is_asked_for_again_keeps_its_one_ticket(
    scheduler: Scheduler, rids: tuple[str, ...]
) -> None:
    from sglang_bridge import collect

    reqs = [req for req, _ in ended(scheduler, *rids)]
    collect.issue(reqs)
    tickets = [req.routed_experts for req in reqs]
    collect.issue(reqs)
    collect.flush()
    collect.flush()
    assert all(req.routed_experts is ticket for req, ticket in zip(reqs, tickets, strict=True))
    counts = check_sums(scheduler)
    assert (counts["finished"], counts["tickets"], counts["sealed"]) == (len(rids),) * 3


@pytest.mark.parametrize("when", ["a later forward ends", "a result is processed", "the engine"])
def test_what_no_response_has_asked_for_is_issued_by_what_comes_first(
    scheduler: Scheduler, when: str
) -> None:
    """A step that was interrupted between a request's end and its response."""
    from capturers import Batch

    forwards = scheduler.forwards
    ids, locations = forwards.token_ids(8), forwards.locations(8)
    buffer = torch.from_numpy(forwards.routes(8))
    mark = None
    if when == "a result is processed":
        mark = scheduler.capturer.forward(Batch(ids, locations), buffer)
    ((req, rows),) = ended(scheduler, "waits")
    if mark is not None:
        mark.finalize()
    elif when == "a later forward ends":
        # Onto the request's own locations, its tokens at their positions: no tag could tell.
        where = scheduler.req_to_token_pool.req_to_token[1, :25].numpy().astype(np.int64)
        again = Batch(np.array([*req.origin_input_ids, *req.output_ids]), where)
        scheduler.capturer.forward(again, torch.from_numpy(forwards.routes(25)))
    else:
        scheduler.publisher.stop()
    with ShmRouteReader(envelope_of(req)) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows[:-1])
    assert check_sums(scheduler)["ticketed"] == 1


def test_a_step_s_requests_are_issued_before_the_next_result_s_locations_are_taken(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot is valid until then, and what goes inline is gathered by it."""
    from capturers import Batch

    forwards, gatherer = scheduler.forwards, scheduler.publisher.gatherer
    mark = scheduler.capturer.forward(
        Batch(forwards.token_ids(8), forwards.locations(8)), torch.from_numpy(forwards.routes(8))
    )
    ((req, _),) = ended(scheduler, "before")
    seen = []
    monkeypatch.setattr(gatherer, "result_processed", lambda _: seen.append(req.routed_experts))
    mark.finalize()
    assert seen == [req.routed_experts]
    assert req.routed_experts is not None


@pytest.mark.parametrize("rid", ["\ud800", "x" * 5000], ids=["surrogate", "too long"])
def test_a_request_that_fails_among_others_fails_alone(scheduler: Scheduler, rid: str) -> None:
    from sglang_bridge import collect

    served = ended(scheduler, "a", "b", rid, "c", "d")
    collect.issue([served[0][0]])
    collect.flush()
    with pytest.raises(RouteFailed):
        ShmRouteReader(envelope_of(served[2][0]))
    good = [served[i] for i in (0, 1, 3, 4)]
    check_rows(good)
    generations = [decode(envelope_of(req)).generation for req, _ in good]
    assert generations == sorted(generations)
    counts = check_sums(scheduler)
    assert (counts["finished"], counts["ticketed"], counts["hook_errors"]) == (5, 4, 1)


def test_a_ticket_that_cannot_be_handed_over_fails_its_record_and_no_other(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_bridge import collect

    publisher = scheduler.publisher
    made, handed = publisher._respond, []

    def breaking(envelope: bytes) -> Any:
        handed.append(envelope)
        if len(handed) == 2:
            raise MemoryError("no tensor now")
        return made(envelope)

    monkeypatch.setattr(publisher, "_respond", breaking)
    served = ended(scheduler, "a", "b", "c")
    collect.issue([served[2][0]])
    collect.flush()
    for envelope in (handed[1], envelope_of(served[1][0])):
        with pytest.raises(RouteFailed):
            ShmRouteReader(envelope)
    check_rows((served[0], served[2]))
    counts = check_sums(scheduler)
    assert (counts["finished"], counts["ticketed"], counts["failed_before_ticket"]) == (3, 2, 1)


def test_a_step_that_cannot_be_reserved_together_is_reserved_one_by_one(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_bridge import collect

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("not together")

    monkeypatch.setattr(scheduler.arena.writer, "reserve_together", broken)
    served = ended(scheduler, "a", "b")
    collect.issue([served[0][0]])
    collect.flush()
    check_rows(served)
    counts = check_sums(scheduler)
    assert (counts["finished"], counts["ticketed"], counts["hook_errors"]) == (2, 2, 1)


def test_where_slots_run_out_within_a_step_the_rest_of_it_goes_inline(
    scheduler: Scheduler,
) -> None:
    from sglang_bridge import collect

    served = ended(scheduler, *(f"{i}" for i in range(10)))  # there are 8 slots
    collect.issue([served[9][0]])
    collect.flush()
    for i, (req, rows) in enumerate(served):
        with ShmRouteReader(envelope_of(req)) as routes:
            assert routes.inline == (i >= 8)
            np.testing.assert_array_equal(routes.numpy(), rows[:-1])
    counts = check_sums(scheduler)
    assert (counts["finished"], counts["ticketed"], counts["inline_full"]) == (10, 8, 2)


def test_what_of_a_step_the_gatherer_cannot_take_goes_inline(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_bridge import collect

    two = 2 * 24 * ROUTES.row_bytes
    monkeypatch.setattr(scheduler.publisher.gatherer, "has_room", lambda nbytes: nbytes <= two)
    served = ended(scheduler, "a", "b", "c")
    collect.issue([served[0][0]])
    collect.flush()
    for i, (req, rows) in enumerate(served):
        with ShmRouteReader(envelope_of(req)) as routes:
            assert routes.inline == (i == 2)
            np.testing.assert_array_equal(routes.numpy(), rows[:-1])
    assert check_sums(scheduler)["inline_unlocked"] == 1


def test_a_request_without_rows_among_others_is_an_empty_record(scheduler: Scheduler) -> None:
    from sglang_bridge import collect

    served = ended(scheduler, "a")
    empty, _ = scheduler.request("empty", prompt=20, output=0, routed_experts_start_len=20)
    collect.collect(scheduler, empty)
    served += ended(scheduler, "b")
    collect.issue([empty])
    collect.flush()
    assert ShmRouteReader(envelope_of(empty)).tokens == 0
    check_rows(served)
    counts = check_sums(scheduler)
    assert (counts["finished"], counts["ticketed"], counts["inline_empty"]) == (3, 2, 1)


def test_after_a_device_error_a_whole_step_goes_inline(scheduler: Scheduler) -> None:
    from sglang_bridge import collect

    scheduler.publisher._broken = True
    served = ended(scheduler, "a", "b")
    collect.issue([served[0][0]])
    for req, rows in served:
        with ShmRouteReader(envelope_of(req)) as routes:
            assert routes.inline
            np.testing.assert_array_equal(routes.numpy(), rows[:-1])
    assert check_sums(scheduler)["inline_after_failure"] == 2


def test_rids_that_are_the_same_in_one_step_each_have_a_ticket_and_the_last_has_the_name(
    scheduler: Scheduler,
) -> None:
    from sglang_bridge import collect

    served = ended(scheduler, "twin", "twin")
    collect.issue([served[0][0]])
    collect.flush()
    check_rows(served)
    with ShmRouteReader("twin", arena=scheduler.arena.name) as routes:
        np.testing.assert_array_equal(routes.numpy(), served[1][1][:-1])


def test_while_requests_are_noted_sealing_waits(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Python, on the scheduler thread's interpreter, and nobody needs it that soon."""
    from sglang_bridge import collect

    monkeypatch.setattr("sglang_bridge.publisher._PATIENCE", 60.0)
    sealer_is_there, noted = threading.Event(), threading.Event()
    let_run = scheduler.publisher._let_the_scheduler_run

    def after_the_next_step_began() -> None:
        sealer_is_there.set()
        noted.wait(20)
        let_run()

    monkeypatch.setattr(scheduler.publisher, "_let_the_scheduler_run", after_the_next_step_began)
    ((first, _),) = ended(scheduler, "first")
    collect.flush()
    assert sealer_is_there.wait(20)
    ended(scheduler, "second")
    noted.set()
    with pytest.raises(shmroute.RouteTimeout):
        ShmRouteReader(envelope_of(first), timeout=0.1)
    collect.flush()
    with ShmRouteReader(envelope_of(first)) as routes:
        assert routes.tokens == 24


def test_what_an_idle_or_paused_scheduler_does_reaches_the_publisher(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_bridge import scheduler as hooks

    called = []
    for name in ("let_the_sealer_run", "wait_for_the_sealer"):
        monkeypatch.setattr(scheduler.publisher, name, lambda name=name: called.append(name))
    hooks._idle(scheduler)
    hooks._paused(None, scheduler, object())
    assert called == ["let_the_sealer_run", "wait_for_the_sealer"]


def test_without_an_arena_an_idle_scheduler_goes_on_as_ever(sglang: SimpleNamespace) -> None:
    from sglang_bridge import scheduler as hooks

    sglang.set_global_experts_capturer(None)
    hooks._idle(None)
    hooks._paused(None, None, object())


def test_an_engine_is_idle_where_no_forward_is_under_way(scheduler: Scheduler) -> None:
    gatherer = scheduler.publisher.gatherer
    number = gatherer.forward_begins()
    assert not gatherer.idle
    gatherer.result_processed(number)
    assert gatherer.idle


# -- shadow mode, and token ids -------------------------------------------------------------------


def test_shadow_mode_takes_the_locations_before_sglang_reads_them(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own reading waits for the stream, and would hide how ours are ordered."""
    from sglang.srt.state_capturer.base import BaseTopkCapturer

    order = []
    snapshot = scheduler.publisher.gatherer.snapshot

    def ours(*given: Any) -> Any:
        order.append("ours")
        return snapshot(*given)

    def natively(*_: Any) -> None:
        order.append("native")

    monkeypatch.setattr(scheduler.publisher.gatherer, "snapshot", ours)
    monkeypatch.setattr(BaseTopkCapturer, "get_topk", natively)
    scheduler.capturer.shadow = True
    req, rows = scheduler.request("both", prompt=20, output=5)
    with ShmRouteReader(collected(scheduler, req)) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows[:-1])
    scheduler.capturer.shadow = False
    assert order == ["ours", "native"]


def test_token_ids_out_of_an_array_are_those_of_a_list(scheduler: Scheduler) -> None:
    from sglang_bridge.finished import _as_array

    for ids in (array("q", [3, 1 << 40, 7]), [3, 1 << 40, 7], array("i", [3, 5])):
        np.testing.assert_array_equal(_as_array(ids), list(ids))
        assert _as_array(ids).dtype == np.int64
