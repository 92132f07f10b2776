"""From finished requests to sealed records, with a real arena and real readers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, Forwards

import shmroute
from sglang_bridge.epochs import WeightEpochs
from sglang_bridge.errors import DeviceError
from sglang_bridge.finished import Finished, Gathered, Job
from sglang_bridge.gather_host import HostGatherer
from sglang_bridge.publisher import Publisher
from sglang_bridge.table import RouteTable
from shmroute import IncompleteRoutes, RouteFailed, RouteLayout, ShmRouteReader
from shmroute.counters import read_counters
from shmroute.layout import plan_extent

ROUTES = RouteLayout(256, 4, range(1, 5), num_layers=5)
LOCATIONS = 4096


class Bridge:
    """An arena, its publisher and forwards into the publisher's table."""

    def __init__(
        self,
        name: str,
        table: type[RouteTable] = RouteTable,
        gatherer: type[HostGatherer] = HostGatherer,
        routes: RouteLayout = ROUTES,
        **how: Any,
    ) -> None:
        arena = {"capacity": "4MiB", "slots": 64, **how}
        inline_when_full = arena.pop("inline_when_full", True)
        self.arena = shmroute.Arena.create(name, routes, **arena)
        self.epochs = WeightEpochs("loaded")
        self.table = table(routes, LOCATIONS, "cpu", vocabulary=VOCABULARY)
        self.publisher = Publisher(
            self.arena,
            self.epochs,
            gatherer(self.table),
            vocabulary=VOCABULARY,
            inline_when_full=inline_when_full,
            shadow=True,
        )
        self.publisher.start()
        self.forwards = Forwards(self.table)

    def finished(self, rid: str, tokens: int, start: int = 0) -> tuple[Finished, np.ndarray]:
        """One request in one forward, and the rows that readers must see."""
        ids, locations = self.forwards.token_ids(tokens), self.forwards.locations(tokens)
        captured = self.forwards.run(ids, locations, start=start)
        request = self.forwards.finished(rid, ids, locations, captured, start=start)
        return request, self.forwards.rows(captured)

    def serve(self, rid: str, tokens: int, start: int = 0) -> tuple[bytes, np.ndarray]:
        """The same, collected by itself: its envelope and its rows."""
        request, rows = self.finished(rid, tokens, start)
        return self.publisher.collect(request), rows

    def step(self, *rids: str) -> list[tuple[bytes, np.ndarray]]:
        """Requests that end in one step, as the hooks hand them on: envelopes and rows."""
        ended = [self.finished(rid, 20) for rid in rids]
        reqs = [request.req for request, _ in ended]
        for request, _ in ended:
            self.publisher.note(request)
        self.publisher.flush()
        envelopes = [req.routed_experts.numpy().tobytes() for req in reqs]
        return [(ticket, rows) for ticket, (_, rows) in zip(envelopes, ended, strict=True)]

    @property
    def counters(self) -> dict[str, int]:
        return read_counters(self.arena.memory.counters)

    def settled(self) -> dict[str, int]:
        """The counters once everything that was queued is sealed or failed."""
        self.publisher.flush()
        deadline = time.monotonic() + 20
        while list(self.arena.writer.in_flight()) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not list(self.arena.writer.in_flight())
        return self.counters


Make = Callable[..., Bridge]


@pytest.fixture
def make_bridge(arena_name: str) -> Iterator[Make]:
    made: list[Bridge] = []

    def make(**how: Any) -> Bridge:
        made.append(Bridge(arena_name, **how))
        return made[-1]

    yield make
    for bridge in made:
        bridge.publisher.stop()


def test_a_reader_sees_every_row_by_ticket_and_by_rid(make_bridge: Make, arena_name: str) -> None:
    bridge = make_bridge()
    ticket, rows = bridge.serve("one", 300, start=2)
    bridge.publisher.flush()
    with ShmRouteReader(ticket) as by_ticket, ShmRouteReader("one", arena=arena_name) as by_rid:
        np.testing.assert_array_equal(by_ticket.numpy(), rows)
        np.testing.assert_array_equal(by_rid.numpy(), rows)
        assert (by_rid.start, by_rid.tokens, by_rid.prompt_tokens) == (2, 300, 150)
        assert by_rid.complete
    assert bridge.counters["shadow_mismatches"] == 0


def test_sixteen_bit_ids_go_the_same_way(make_bridge: Make) -> None:
    bridge = make_bridge(routes=RouteLayout(512, 4, range(1, 5), num_layers=5))
    ticket, rows = bridge.serve("wide", 200)
    bridge.publisher.flush()
    with ShmRouteReader(ticket) as routes:
        assert routes.numpy().dtype == np.uint16
        assert routes.numpy().max() == 511
        np.testing.assert_array_equal(routes.numpy(), rows)


def test_the_runs_of_weight_versions_follow_the_rows(make_bridge: Make) -> None:
    """The prompt's rows were computed under older weights: a prefix hit across an update."""
    bridge = make_bridge()
    ids, locations = bridge.forwards.token_ids(90), bridge.forwards.locations(90)
    for first, label in ((0, "step-1"), (30, None), (60, "step-3")):
        bridge.forwards.epoch = bridge.epochs.mark_used()
        bridge.forwards.run(ids[first : first + 30], locations[first : first + 30], start=first)
        if first < 60:
            bridge.epochs.begin_update("step-3" if first == 30 else label)
    request = bridge.forwards.finished("versions", ids, locations)
    ticket = bridge.publisher.collect(request)
    bridge.publisher.flush()
    with ShmRouteReader(ticket) as routes:
        assert routes.weight_versions == ((0, 0, "loaded"), (30, 1, "step-1"), (60, 2, "step-3"))


def test_requests_of_one_step_lie_side_by_side(make_bridge: Make) -> None:
    bridge = make_bridge()
    served = [bridge.serve(f"rid-{i}", 50 + i) for i in range(8)]
    bridge.publisher.flush()
    addresses = []
    for ticket, rows in served:
        with ShmRouteReader(ticket) as routes:
            addresses.append(routes.numpy().__array_interface__["data"][0])
            np.testing.assert_array_equal(routes.numpy(), rows)
    sizes = [plan_extent(ROUTES.row_bytes, len(f"rid-{i}"), 50 + i).total_bytes for i in range(7)]
    assert np.diff(addresses).tolist() == sizes


def test_rows_whose_location_was_taken_by_another_token_are_missing(make_bridge: Make) -> None:
    bridge = make_bridge()
    ids, locations = bridge.forwards.token_ids(40), bridge.forwards.locations(40)
    captured = bridge.forwards.run(ids, locations)
    other = (ids[10:15] + 1) % VOCABULARY
    bridge.forwards.run(other, locations[10:15], start=10)
    ticket = bridge.publisher.collect(bridge.forwards.finished("lost", ids, locations, captured))
    counters = bridge.settled()
    with pytest.raises(IncompleteRoutes, match="5 of 40"):
        ShmRouteReader(ticket)
    with ShmRouteReader(ticket, allow_missing=True) as routes:
        assert routes.missing == ((10, 15),)
        keep = np.r_[0:10, 15:40]
        np.testing.assert_array_equal(routes.numpy()[keep], bridge.forwards.rows(captured)[keep])
    assert counters["tags_wrong"] == counters["rows_missing"] == 5
    assert counters["shadow_rows_incomparable"] == 5
    assert counters["shadow_mismatches"] == 0


# -- full ----------------------------------------------------------------------------------------


def test_when_slots_run_out_the_rows_travel_inline_and_releasing_brings_tickets_back(
    make_bridge: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = make_bridge(slots=2)
    with caplog.at_level(logging.WARNING, "shmroute"):
        served = [bridge.serve(f"rid-{i}", 60) for i in range(5)]
    counters = bridge.settled()
    for i, (envelope, rows) in enumerate(served):
        with ShmRouteReader(envelope) as routes:
            assert routes.inline == (i >= 2)
            np.testing.assert_array_equal(routes.numpy(), rows)
    assert (counters["tickets"], counters["inline"], counters["inline_full"]) == (2, 3, 3)
    assert counters["shadow_records"] == 5
    assert "rid 'rid-2' (60 tokens) travel inside its response" in caplog.text
    assert caplog.text.count("travel inside") == 1  # one line a second, with a count
    assert "Remedy: release records" in caplog.text

    shmroute.release([envelope for envelope, _ in served])
    again, rows = bridge.serve("again", 60)
    bridge.publisher.flush()
    with ShmRouteReader(again) as routes:
        assert not routes.inline
        np.testing.assert_array_equal(routes.numpy(), rows)


def test_a_record_larger_than_the_heap_travels_inline(make_bridge: Make) -> None:
    bridge = make_bridge(capacity="64KiB", slots=4)
    envelope, rows = bridge.serve("huge", 4000)
    with ShmRouteReader(envelope) as routes:
        assert routes.inline
        np.testing.assert_array_equal(routes.numpy(), rows)


def test_an_inline_record_says_which_rows_are_missing_and_under_which_weights(
    make_bridge: Make,
) -> None:
    bridge = make_bridge(slots=1)
    bridge.serve("fills the arena", 10)
    ids, locations = bridge.forwards.token_ids(20), bridge.forwards.locations(20)
    bridge.forwards.run(ids, locations)
    bridge.forwards.run(ids[3:4], locations[3:4], start=9)
    envelope = bridge.publisher.collect(bridge.forwards.finished("inline", ids, locations))
    with ShmRouteReader(envelope, allow_missing=True) as routes:
        assert routes.inline
        assert routes.missing == ((3, 4),)
        assert routes.weight_versions == ((0, 0, "loaded"),)


def test_with_on_full_error_the_reader_is_told(make_bridge: Make) -> None:
    bridge = make_bridge(slots=1, inline_when_full=False)
    bridge.serve("fills the arena", 10)
    envelope, _ = bridge.serve("refused", 10)
    assert len(envelope) % 4
    with pytest.raises(RouteFailed, match=r"'refused'.*0 of 1 slots"):
        ShmRouteReader(envelope)
    assert bridge.settled()["failed_before_ticket"] == 1


def test_no_rows_are_an_empty_record_without_a_slot(make_bridge: Make) -> None:
    """A prompt of one token that samples one: nothing was forwarded but the prompt's end."""
    bridge = make_bridge()
    envelope, _ = bridge.serve("nothing", 0)
    with ShmRouteReader(envelope) as routes:
        assert routes.inline
        assert routes.numpy().shape == (0, 4, 4)
    counters = bridge.settled()
    assert (counters["inline_empty"], counters["reserved"]) == (1, 0)
    assert counters["publish_calls"] == 0


# -- failures ------------------------------------------------------------------------------------


def test_a_gather_that_fails_fails_its_record_and_no_other(make_bridge: Make) -> None:
    bridge = make_bridge()
    good, rows = bridge.serve("good", 30)
    ids = bridge.forwards.token_ids(30)
    beyond = np.arange(LOCATIONS - 10, LOCATIONS + 20)
    bad = bridge.publisher.collect(bridge.forwards.finished("bad", ids, beyond))
    late, late_rows = bridge.serve("late", 30)
    counters = bridge.settled()
    with pytest.raises(RouteFailed, match=r"'bad'.*IndexError"):
        ShmRouteReader(bad)
    for ticket, expected in ((good, rows), (late, late_rows)):
        with ShmRouteReader(ticket) as routes:
            np.testing.assert_array_equal(routes.numpy(), expected)
    assert (counters["tickets"], counters["ticketed"]) == (3, 2)
    assert (counters["failed_after_ticket"], counters["failed"]) == (1, 1)
    assert bridge.serve("next", 30)[0]  # the threads live on


def test_a_failed_generation_is_never_handed_out_again(make_bridge: Make) -> None:
    bridge = make_bridge(slots=1)
    beyond = np.arange(LOCATIONS, LOCATIONS + 5)
    ids = bridge.forwards.token_ids(5)
    bad = bridge.publisher.collect(bridge.forwards.finished("bad", ids, beyond))
    bridge.settled()
    ticket, rows = bridge.serve("after", 5)  # in the same slot
    bridge.settled()
    with pytest.raises(RouteFailed):
        ShmRouteReader(bad)
    with ShmRouteReader(ticket) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows)


class BrokenDevice(RouteTable):
    """A table on a device that fails at every record; what goes inline is still read."""

    error: Exception

    def gather(self, locations: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if threading.current_thread().name == "shmroute-gather":
            raise self.error
        return super().gather(locations, out)


class LostOnTheWay:
    """Jobs whose copies were begun and fail: that is known once they are waited for."""

    def __init__(self, jobs: list[Job], error: Exception) -> None:
        self.jobs = jobs
        self._error = error

    def wait(self) -> None:
        for job in self.jobs:
            job.error = job.error or self._error

    def done(self) -> None:
        """Nothing is kept."""


class LosingGatherer(HostGatherer):
    """A gatherer on a device that takes every copy and finishes none."""

    error: Exception

    def start(self, hand_over: Callable[[Gathered | None], None]) -> None:
        super().start(lambda run: hand_over(run and LostOnTheWay(run.jobs, self.error)))


@pytest.mark.parametrize("kind", [torch.AcceleratorError, DeviceError])
@pytest.mark.parametrize(
    "broken",
    [{"table": BrokenDevice}, {"gatherer": LosingGatherer}],
    ids=["as rows are gathered", "as they are waited for"],
)
def test_after_a_device_error_no_request_gets_a_ticket_that_would_fail(
    make_bridge: Make,
    caplog: pytest.LogCaptureFixture,
    broken: dict[str, type],
    kind: type[Exception],
) -> None:
    bridge = make_bridge(**broken)
    bridge.table.error = bridge.publisher.gatherer.error = kind("the device is gone")
    lost = bridge.step("a", "b", "c")
    bridge.settled()
    for ticket, _ in lost:
        with pytest.raises(RouteFailed, match=f"{kind.__name__}: the device is gone"):
            ShmRouteReader(ticket)
    for rid in "abc":
        said = f"the record of rid {rid!r} failed after its ticket had left: the device is gone"
        assert said in caplog.text
    assert f"{kind.__name__}: the device is gone" in caplog.text
    for envelope, rows in bridge.step("d", "e"):
        with ShmRouteReader(envelope) as routes:
            assert routes.inline
            np.testing.assert_array_equal(routes.numpy(), rows)
    counts = bridge.settled()
    assert (counts["failed_after_ticket"], counts["inline_after_failure"]) == (3, 2)
    assert counts["finished"] == 5
    assert counts["finished"] == (
        counts["ticketed"] + counts["inline"] + counts["failed_requests"] + counts["no_routes"]
    )


def test_tokens_that_cannot_be_told_fail_the_record(make_bridge: Make) -> None:
    bridge = make_bridge()
    ids, locations = bridge.forwards.token_ids(20), bridge.forwards.locations(20)
    bridge.forwards.run(ids, locations)
    request = bridge.forwards.finished("short", ids, locations)
    request.req.output_ids.pop()
    ticket = bridge.publisher.collect(request)
    bridge.settled()
    with pytest.raises(RouteFailed, match="19 token ids for 20 rows"):
        ShmRouteReader(ticket)


def test_an_error_envelope_can_be_made_for_a_rid_that_no_ticket_can_hold(
    make_bridge: Make,
) -> None:
    """The rid comes from a client; what fails because of it must not fail again."""
    bridge = make_bridge()
    for rid in ("\ud800", "x" * 5000):
        with pytest.raises(RouteFailed, match="no such rid"):
            ShmRouteReader(bridge.publisher.refuse(rid, "no such rid"))


def test_each_request_is_counted_once_whatever_became_of_it(make_bridge: Make) -> None:
    bridge = make_bridge(slots=8)
    collected = 0
    for step in range(6):
        for i in range(3):
            bridge.serve(f"{step}-{i}", 0 if (step, i) == (1, 1) else 25)
            collected += 1
        if step == 1:
            beyond = np.arange(LOCATIONS, LOCATIONS + 5)
            ids = bridge.forwards.token_ids(5)
            bridge.publisher.collect(bridge.forwards.finished("bad", ids, beyond))
            bridge.publisher.refuse("refused", "by the test")
            collected += 2
        counters = bridge.settled()
        accounted = counters["ticketed"] + counters["inline"] + counters["failed_requests"]
        assert accounted == collected
        assert counters["reserved"] == counters["sealed"] + counters["failed"]
    assert min(counters["ticketed"], counters["inline_full"], counters["failed_requests"]) > 0


# -- the scheduler thread and the others ----------------------------------------------------------


class SlowTable(RouteTable):
    """A table whose gathers take their time, so that forwards come in between."""

    def gather(self, locations: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        time.sleep(0.003)
        half = len(locations) // 2
        first = super().gather(locations[:half], out[:half])
        time.sleep(0.003)
        return torch.cat((first, super().gather(locations[half:], out[half:])))


def test_forwards_that_reuse_locations_at_once_never_reach_a_record(make_bridge: Make) -> None:
    """Each forward takes the locations of the requests that finished one step before it.

    It runs the same tokens at the same positions, so that tags could not tell: only the
    fence between the queued gathers and the scatter keeps the rows apart.
    """
    bridge = make_bridge(table=SlowTable)
    ids, locations = bridge.forwards.token_ids(64), bridge.forwards.locations(64)
    served = []
    for step in range(30):
        captured = bridge.forwards.run(ids, locations)
        for part in (slice(0, 32), slice(32, 64)):
            request = bridge.forwards.finished(
                f"{step}-{part.start}", ids[part], locations[part], start=part.start
            )
            served.append((bridge.publisher.collect(request), bridge.forwards.rows(captured)[part]))
        bridge.publisher.flush()
    for ticket, rows in served:
        with ShmRouteReader(ticket) as routes:
            np.testing.assert_array_equal(routes.numpy(), rows)


class HeldTable(RouteTable):
    """A table whose gathers wait until they are let go."""

    def __init__(self, *given: Any, **how: Any) -> None:
        super().__init__(*given, **how)
        self.held = threading.Event()

    def gather(self, locations: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.held.wait()
        return super().gather(locations, out)


def test_collecting_does_not_wait_for_gathering(make_bridge: Make) -> None:
    bridge = make_bridge(table=HeldTable)
    tickets = [bridge.serve("0", 20)[0]]
    bridge.publisher.flush()
    # Returns although the gather of "0" hangs; a scatter would wait, and none is made here.
    ids, locations = bridge.forwards.token_ids(20), bridge.forwards.locations(20)
    for i in range(1, 6):
        tickets.append(bridge.publisher.collect(bridge.forwards.finished(str(i), ids, locations)))
        bridge.publisher.flush()
    with pytest.raises(shmroute.RouteTimeout):
        ShmRouteReader(tickets[0], timeout=0.05)
    bridge.table.held.set()
    assert ShmRouteReader(tickets[0]).tokens == 20


class UnderWay:
    """Jobs that are handed over while their rows are still on the way."""

    def __init__(self, jobs: list[Job], gathered: threading.Event) -> None:
        self.jobs = jobs
        self._gathered = gathered

    def wait(self) -> None:
        self._gathered.wait()

    def done(self) -> None:
        """Nothing is kept."""


class EarlyGatherer(HostGatherer):
    """Hands over at once, as a gatherer whose copies are asynchronous does."""

    def start(self, hand_over: Callable[[Gathered | None], None]) -> None:
        self._hand_over_now = hand_over
        super().start(lambda gathered: None if gathered else hand_over(None))

    def submit(self, jobs: list[Job]) -> None:
        super().submit(jobs)
        self._hand_over_now(UnderWay(jobs, self._gathered))


def test_a_record_is_not_sealed_before_its_rows_are_there(make_bridge: Make) -> None:
    bridge = make_bridge(table=HeldTable, gatherer=EarlyGatherer)
    ticket, rows = bridge.serve("held", 20)
    bridge.publisher.flush()
    try:
        with pytest.raises(shmroute.RouteTimeout):
            ShmRouteReader(ticket, timeout=0.05)
    finally:
        bridge.table.held.set()
    with ShmRouteReader(ticket) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows)


def test_a_snapshot_keeps_what_the_pool_s_row_held(make_bridge: Make) -> None:
    """SGLang rewrites the row in the statement after the hook, the gather comes later."""
    pool = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    taken = make_bridge().publisher.gatherer.snapshot(pool, 1, 0, 3)
    pool[1].fill_(9)
    assert taken.tolist() == [4, 5, 6]


def sealing_beside_a_pending_step(make_bridge: Make) -> tuple[Bridge, bytes, bytes]:
    """A step is handed over and about to be sealed; the next one's request is collected."""
    bridge = make_bridge(table=HeldTable)
    ids, locations = bridge.forwards.token_ids(20), bridge.forwards.locations(20)
    captured = bridge.forwards.run(ids, locations)
    requests = [
        bridge.forwards.finished(rid, ids, locations, captured) for rid in ("first", "pending")
    ]
    first = bridge.publisher.collect(requests[0])
    bridge.publisher.flush()
    pending = bridge.publisher.collect(requests[1])
    bridge.table.held.set()
    return bridge, first, pending


def test_while_a_step_collects_sealing_waits(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Python, on the scheduler thread's interpreter, and nobody needs it that soon."""
    monkeypatch.setattr("sglang_bridge.publisher._PATIENCE", 60.0)
    bridge, first, pending = sealing_beside_a_pending_step(make_bridge)
    with pytest.raises(shmroute.RouteTimeout):
        ShmRouteReader(first, timeout=0.1)
    bridge.publisher.flush()
    for ticket in (first, pending):
        with ShmRouteReader(ticket) as routes:
            assert routes.tokens == 20


class LingeringGatherer(HostGatherer):
    """Hands its work over at once, and takes its time before the scheduler thread goes on."""

    def submit(self, jobs: list[Job]) -> None:
        super().submit(jobs)
        self.fence()
        time.sleep(0.1)
        self.open_at_the_end = [job.record.open for job in jobs]


def test_while_a_step_is_handed_over_sealing_waits(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_bridge.publisher._PATIENCE", 60.0)
    bridge = make_bridge(gatherer=LingeringGatherer)
    ticket, rows = bridge.serve("handed-over", 20)
    bridge.publisher.flush()
    assert bridge.publisher.gatherer.open_at_the_end == [True]
    with ShmRouteReader(ticket) as routes:
        np.testing.assert_array_equal(routes.numpy(), rows)


def test_a_step_that_stays_pending_holds_up_sealing_only_so_long(make_bridge: Make) -> None:
    """A scheduler that is interrupted between collecting and handing over."""
    _, first, pending = sealing_beside_a_pending_step(make_bridge)
    with ShmRouteReader(first) as routes:
        assert routes.tokens == 20
    with pytest.raises(shmroute.RouteTimeout):
        ShmRouteReader(pending, timeout=0)


class Sleeps:
    """In place of ``time`` in the publisher: notes how long the thread that asks slept."""

    monotonic = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self.taken: list[float] = []

    def sleep(self, seconds: float) -> None:
        if threading.get_ident() == self._thread:
            self.taken.append(seconds)
        time.sleep(seconds)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    noted = Sleeps()
    monkeypatch.setattr("sglang_bridge.publisher.time", noted)
    return noted


def hold_sealing(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What is to be sealed waits until this is set."""
    held, seal = threading.Event(), bridge.publisher._seal

    def late(job: Job) -> None:
        assert held.wait(20)
        seal(job)

    monkeypatch.setattr(bridge.publisher, "_seal", late)
    return held


def settle(bridge: Bridge, records: int) -> None:
    deadline = time.monotonic() + 20
    while bridge.publisher._settled < records and time.monotonic() < deadline:
        time.sleep(0.001)
    assert bridge.publisher._settled == records


def test_an_idle_scheduler_thread_sleeps_while_there_is_something_to_seal(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps
) -> None:
    """Its loop looks for work without end, and the sealer would get the interpreter back late."""
    bridge = make_bridge()
    publisher = bridge.publisher
    publisher.let_the_sealer_run()
    assert not sleeps.taken
    held = hold_sealing(bridge, monkeypatch)
    for number in range(3):
        bridge.serve(f"{number}", 10)
    publisher.flush()
    for _ in range(4):
        publisher.let_the_sealer_run()
    assert len(sleeps.taken) == 4
    assert 0 < max(sleeps.taken) < 2e-3, "a request that comes meanwhile has to wait for it"
    held.set()
    settle(bridge, 3)
    publisher.let_the_sealer_run()
    assert len(sleeps.taken) == 4


def test_a_record_that_fails_is_nothing_to_wait_for(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps
) -> None:
    bridge = make_bridge()

    def refuse(_job: Job) -> None:
        raise RuntimeError("a seal that fails")

    monkeypatch.setattr(bridge.publisher, "_seal", refuse)
    bridge.serve("fails", 10)
    bridge.publisher.flush()
    settle(bridge, 1)
    bridge.publisher.let_the_sealer_run()
    bridge.publisher.wait_for_the_sealer()
    assert not sleeps.taken


def test_a_paused_scheduler_thread_waits_until_all_is_sealed(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_bridge.publisher._PAUSED_SLEEP_MAX", 20.0)
    bridge = make_bridge()
    held = hold_sealing(bridge, monkeypatch)
    ticket, _ = bridge.serve("before the pause", 10)
    bridge.publisher.flush()
    threading.Timer(0.05, held.set).start()
    bridge.publisher.wait_for_the_sealer()
    with ShmRouteReader(ticket, timeout=0) as routes:
        assert routes.tokens == 10


def test_a_paused_scheduler_thread_waits_only_so_long(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps
) -> None:
    """Its orders, new weights among them, must not wait for a copy that hangs."""
    monkeypatch.setattr("sglang_bridge.publisher._PAUSED_SLEEP_MAX", 0.02)
    bridge = make_bridge()
    held = hold_sealing(bridge, monkeypatch)
    bridge.serve("hangs", 10)
    bridge.publisher.flush()
    bridge.publisher.wait_for_the_sealer()
    assert 0 < len(sleeps.taken) <= 0.02 / min(sleeps.taken) + 1
    held.set()


def test_stopping_seals_what_was_queued(make_bridge: Make) -> None:
    bridge = make_bridge(table=SlowTable)
    served = [bridge.serve(f"{i}", 20) for i in range(10)]
    bridge.publisher.stop()
    for ticket, rows in served:
        with ShmRouteReader(ticket, timeout=0) as routes:
            np.testing.assert_array_equal(routes.numpy(), rows)


# -- shadow mode ---------------------------------------------------------------------------------


def test_one_changed_id_is_reported_with_rid_token_and_layer_and_counted(
    make_bridge: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = make_bridge()
    ids, locations = bridge.forwards.token_ids(40), bridge.forwards.locations(40)
    captured = bridge.forwards.run(ids, locations, start=5)
    native = captured.copy()
    native[17, 3, 2] ^= 1  # layer 3 is row axis 2: the first layer is dense
    request = bridge.forwards.finished("planted", ids, locations, native, start=5)
    bridge.publisher.collect(request)
    with caplog.at_level(logging.ERROR, "shmroute"):
        counters = bridge.settled()
    assert counters["shadow_mismatches"] == 1
    assert counters["shadow_rows"] == 40
    assert "rid 'planted': 1 of 40 rows differ" in caplog.text
    assert "first at token 22, layer 3" in caplog.text


def test_an_inline_record_is_compared_too(
    make_bridge: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = make_bridge(slots=1)
    bridge.serve("fills the arena", 10)
    ids, locations = bridge.forwards.token_ids(10), bridge.forwards.locations(10)
    native = bridge.forwards.run(ids, locations)
    native[4, 1, 0] ^= 1
    bridge.publisher.collect(bridge.forwards.finished("inline", ids, locations, native))
    assert bridge.settled()["shadow_mismatches"] == 1
    assert "first at token 4, layer 1" in caplog.text


def test_native_rows_of_another_number_are_all_a_mismatch(make_bridge: Make) -> None:
    bridge = make_bridge()
    ids, locations = bridge.forwards.token_ids(10), bridge.forwards.locations(10)
    native = bridge.forwards.run(ids, locations)[:-1]
    bridge.publisher.collect(bridge.forwards.finished("short", ids, locations, native))
    assert bridge.settled()["shadow_mismatches"] == 10


# -- what the gatherer cannot take ---------------------------------------------------------------


class FullGatherer(HostGatherer):
    """Takes so many bytes at a time, as one whose arena is not page-locked does."""

    limit = 40 * ROUTES.row_bytes

    def has_room(self, nbytes: int) -> bool:
        return nbytes <= self.limit


def test_what_the_gatherer_has_no_room_for_travels_inline_and_is_counted(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostGatherer, "has_room", FullGatherer.has_room)
    monkeypatch.setattr(HostGatherer, "limit", FullGatherer.limit, raising=False)
    bridge = make_bridge()
    served = [bridge.serve(f"{i}", 30) for i in range(3)]  # of one step: only the first fits
    bridge.publisher.flush()
    served.append(bridge.serve("next step", 30))
    counters = bridge.settled()
    assert (counters["tickets"], counters["inline_unlocked"]) == (2, 2)
    for ticket, rows in served:
        with ShmRouteReader(ticket) as routes:
            np.testing.assert_array_equal(routes.numpy(), rows)
