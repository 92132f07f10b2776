"""From finished requests to sealed records on a CUDA device: streams, staging, faults."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, Forwards, finished_request

import shmroute
from sglang_bridge import gather_device
from sglang_bridge.cuda_driver import Event
from sglang_bridge.epochs import WeightEpochs
from sglang_bridge.gather_device import DeviceGatherer, DeviceLocations
from sglang_bridge.publisher import Publisher
from sglang_bridge.table import RouteTable
from sglang_bridge.tags import INVALID
from shmroute import RouteFailed, RouteLayout, RouteTimeout, ShmRouteReader, population
from shmroute.counters import read_counters
from shmroute.segments import SHM_DIR

pytestmark = pytest.mark.gpu

ROUTES = RouteLayout(256, 8, range(1, 13), num_layers=13)
DEVICE = "cuda"


class DeviceForwards(Forwards):
    """Forwards whose routes, ids and locations are on the GPU, as SGLang has them."""

    def run(
        self,
        ids: np.ndarray,
        locations: np.ndarray,
        start: int = 0,
        routes: np.ndarray | None = None,
    ) -> np.ndarray:
        captured = self.routes(len(ids)) if routes is None else routes
        self.table.scatter(
            torch.from_numpy(captured).to(DEVICE),
            torch.from_numpy(locations).to(DEVICE),
            torch.from_numpy(ids).to(DEVICE),
            torch.arange(start, start + len(ids), device=DEVICE),
            self.epoch,
        )
        return captured


class Bridge:
    """An arena, its publisher, and forwards into a table on the GPU."""

    def __init__(
        self,
        name: str,
        *,
        routes: RouteLayout = ROUTES,
        locations: int = 20_000,
        in_host_memory: bool = False,
        staging: int = 8 << 20,
        locked: bool = True,
        **how: Any,
    ) -> None:
        self.arena = shmroute.Arena.create(
            name, routes, **{"capacity": "64MiB", "slots": 512, **how}
        )
        self.table = RouteTable(
            routes, locations, DEVICE, vocabulary=VOCABULARY, in_host_memory=in_host_memory
        )
        self.gatherer = DeviceGatherer(self.table, self.arena, self.arena.writer.counters, staging)
        self.publisher = Publisher(
            self.arena,
            WeightEpochs(),
            self.gatherer,
            vocabulary=VOCABULARY,
            inline_when_full=True,
            shadow=False,
        )
        if not locked:
            self.gatherer.page_lock.close()
        self.publisher.start()
        if not how.get("in_background"):  # else the lock comes when the pages are entered
            assert self.gatherer.page_lock.wait(30) is locked
        self.forwards = DeviceForwards(self.table)
        # SGLang's pool: a row of KV locations for each request.
        self.req_to_token = torch.zeros((64, 40_000), dtype=torch.int32, device=DEVICE)

    def finish(
        self, rid: str, ids: np.ndarray, locations: np.ndarray, start: int = 0, slot: int = 0
    ) -> bytes:
        """A request ends: its envelope. Its row of the pool is overwritten at once."""
        self.req_to_token[slot, : len(ids)] = torch.from_numpy(locations).to(DEVICE)
        torch.cuda.synchronize()
        taken = self.gatherer.snapshot(self.req_to_token, slot, 0, len(ids))
        self.req_to_token[slot].fill_(7)
        return self.publisher.collect(finished_request(rid, ids, taken, start))

    def serve(self, rid: str, tokens: int, start: int = 0) -> tuple[bytes, np.ndarray]:
        ids, locations = self.forwards.token_ids(tokens), self.forwards.locations(tokens)
        captured = self.forwards.run(ids, locations, start=start)
        return self.finish(rid, ids, locations, start), self.forwards.rows(captured)

    def flush(self) -> None:
        self.publisher.flush()
        self.gatherer.result_processed(0)  # the next step begins

    @property
    def counters(self) -> dict[str, int]:
        return read_counters(self.arena.memory.counters)


Make = Callable[..., Bridge]


@pytest.fixture
def make_bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    # A row of this pool is written as its request ends, so the whole is not copied before that.
    monkeypatch.setattr(gather_device, "_POOL_BYTES_MAX", 0)
    name = f"gpu-{os.getpid()}-{secrets.token_hex(4)}"
    made: list[Bridge] = []

    def make(**how: Any) -> Bridge:
        made.append(Bridge(name, **how))
        return made[-1]

    yield make
    for bridge in made:
        bridge.publisher.stop()
    shmroute.reap(name, force=True)
    assert not [entry for entry in os.listdir(SHM_DIR) if f"-{name}-" in entry]


def check(served: list[tuple[bytes, np.ndarray]]) -> None:
    for ticket, rows in served:
        with ShmRouteReader(ticket) as routes:
            np.testing.assert_array_equal(routes.numpy(), rows)
            routes.release()


@pytest.mark.parametrize("experts", [16, 256, 257, 512])
@pytest.mark.parametrize("top_k", [1, 8])
def test_the_kernel_stores_what_the_torch_form_stores(experts: int, top_k: int) -> None:
    routes = RouteLayout(experts, top_k, [1, 2, 4, 7], num_layers=8)
    ours, reference = (RouteTable(routes, 5000, DEVICE, vocabulary=VOCABULARY) for _ in range(2))
    forwards = Forwards(RouteTable(routes, 5000, "cpu", vocabulary=VOCABULARY), seed=experts)
    for tokens, epoch in ((1, 0), (2, 1), (160, 2), (161, 131_071), (2048, 131_072)):
        buffer = torch.full((tokens + 3, 8, top_k + 2), -1, dtype=torch.int32, device=DEVICE)
        captured = forwards.routes(tokens)
        captured[tokens // 2, 4, 0] = -1
        captured[tokens // 3, 1, -1] = experts
        buffer[3:, :, :top_k] = torch.from_numpy(captured).to(DEVICE)
        ids = torch.from_numpy(forwards.token_ids(tokens)).to(DEVICE)
        locations = torch.from_numpy(forwards.locations(tokens)).to(DEVICE)
        positions = torch.arange(tokens, device=DEVICE)
        view = buffer[3:, :, :top_k]
        reference.scatter_with_torch(view.clone(), locations, ids, positions, epoch)
        ours.scatter(view, locations, ids, positions, epoch)
        assert torch.equal(ours.tags, reference.tags)
        good = ours.tags[locations] >= 0
        assert torch.equal(ours.rows[locations][good], reference.rows[locations][good])
        assert bool((view[:, list(routes.layer_ids)] == -1).all())


@pytest.mark.parametrize("how", [{}, {"in_host_memory": True}, {"locked": False}], ids=str)
@pytest.mark.parametrize("experts", [256, 512])
def test_every_row_arrives_whatever_the_memory(
    make_bridge: Make, how: dict[str, bool], experts: int
) -> None:
    bridge = make_bridge(routes=RouteLayout(experts, 8, range(1, 13), num_layers=13), **how)
    for step in range(5):
        served = [bridge.serve(f"{step}-{i}", 1 + 37 * i, start=i) for i in range(20)]
        bridge.flush()
        check(served)
    counters = bridge.counters
    assert counters["tags_wrong"] == counters["inline"] == counters["failed"] == 0
    assert counters["sealed"] == 100
    assert (counters["pageable_copies"] > 0) is ("locked" in how)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No page of an arena is entered before this is set or the population stopped."""
    really, go_on = population._madvise(), threading.Event()

    def hold(*arguments: Any) -> Any:
        while not go_on.wait(0.002) and not any(p._stopped for p in list(population._under_way)):
            pass
        return really(*arguments)

    monkeypatch.setattr(population, "_madvise", lambda: hold)
    yield go_on
    go_on.set()


def test_an_engine_s_arena_is_locked_once_its_pages_are_entered(
    make_bridge: Make, held: threading.Event
) -> None:
    bridge = make_bridge(in_background=True)
    lock, entered = bridge.gatherer.page_lock, bridge.arena.population
    served = bridge.serve("before", 500)
    bridge.flush()
    check([served])
    assert not entered.wait(0)
    assert not lock.wait(0.5)  # at once where it has not begun
    assert lock.refused is None
    pageable = bridge.counters["pageable_copies"]
    assert pageable > 0
    assert bridge.counters["page_locked_bytes"] == 0
    held.set()
    assert entered.wait(30)
    assert lock.wait(30)
    assert bridge.counters["page_locked_bytes"] == bridge.arena.memory.heap.nbytes
    behind = [bridge.serve(f"behind-{i}", 500) for i in range(3)]
    bridge.flush()
    check(behind)
    assert bridge.gatherer._heap.is_pinned()
    assert bridge.counters["pageable_copies"] == pageable


def test_an_engine_that_ends_before_that_leaves_nothing_locked(
    make_bridge: Make, held: threading.Event
) -> None:
    bridge = make_bridge(in_background=True)
    served = bridge.serve("before", 500)
    bridge.flush()
    check([served])
    bridge.publisher.stop()
    assert bridge.arena.population.wait(0)
    lock = bridge.gatherer.page_lock
    held.set()
    lock.start()
    assert not lock.wait(1)
    assert lock.refused is None


def test_requests_of_one_step_go_in_one_copy_each_lane(make_bridge: Make) -> None:
    bridge = make_bridge(slots=512, locations=60_000)
    served = [bridge.serve(f"{i}", 300) for i in range(160)]
    bridge.flush()
    check(served)


def test_a_record_longer_than_a_lane_goes_in_pieces(make_bridge: Make) -> None:
    bridge = make_bridge(staging=256 << 10)  # two lanes of 1365 rows
    served = [bridge.serve("short", 100), bridge.serve("long", 9000), bridge.serve("tail", 800)]
    bridge.flush()
    check(served)


def test_a_full_arena_sends_the_rows_inline(make_bridge: Make) -> None:
    bridge = make_bridge(slots=2)
    served = [bridge.serve(f"{i}", 50) for i in range(4)]
    assert bridge.counters["inline_full"] == 2
    bridge.flush()
    check(served)


def test_a_record_is_not_sealed_before_its_copy_is_there(make_bridge: Make) -> None:
    bridge = make_bridge()
    ticket, rows = bridge.serve("held", 500)
    with torch.cuda.stream(bridge.gatherer._copy_stream):
        torch.cuda._sleep(2_000_000_000)  # a second or so
    bridge.flush()
    with pytest.raises(RouteTimeout):
        ShmRouteReader(ticket, timeout=0.1)
    check([(ticket, rows)])


# -- the order of streams -------------------------------------------------------------------------


def reused_at_once(bridge: Bridge, steps: int = 40) -> int:
    """Forwards that overwrite the rows of requests whose gather has not run yet; wrong records.

    The same tokens at the same positions: tags cannot tell.
    """
    ids, locations = bridge.forwards.token_ids(2000), bridge.forwards.locations(2000)
    routes = [bridge.forwards.routes(2000) for _ in range(4)]
    device = [torch.from_numpy(captured).to(DEVICE) for captured in routes]
    where, words = torch.from_numpy(locations).to(DEVICE), torch.from_numpy(ids).to(DEVICE)
    positions = torch.arange(2000, device=DEVICE)
    bridge.req_to_token[0, :2000] = where
    wrong = 0
    for step in range(steps):
        bridge.table.scatter(device[step % 4].clone(), where, words, positions, 0)
        torch.cuda.synchronize()
        taken = bridge.gatherer.snapshot(bridge.req_to_token, 0, 0, 2000)
        ticket = bridge.publisher.collect(finished_request(f"{step}", ids, taken))
        with torch.cuda.stream(bridge.gatherer._gather_stream):
            torch.cuda._sleep(3_000_000)  # the gather comes late
        bridge.flush()
        bridge.gatherer.forward_begins(True)
        bridge.table.scatter(device[(step + 1) % 4].clone(), where, words, positions, 0)
        with ShmRouteReader(ticket) as read:
            expected = bridge.forwards.rows(routes[step % 4])
            wrong += not np.array_equal(read.numpy(), expected)
            read.release()
    return wrong


def test_locations_that_are_rewritten_at_once_never_reach_a_record(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a scatter that waits itself."""
    monkeypatch.setattr(DeviceGatherer, "forward_begins", lambda *_: 1)
    assert reused_at_once(make_bridge()) == 0


def test_a_scatter_inside_a_graph_does_not_overtake_a_gather(make_bridge: Make) -> None:
    """It cannot wait; the whole forward does."""
    bridge = make_bridge()
    bridge.table.fence = lambda: None
    assert reused_at_once(bridge) == 0


def test_without_the_wait_for_the_gather_they_do(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above would notice."""
    monkeypatch.setattr(DeviceGatherer, "_hold_back_scatters", lambda *_: None)
    assert reused_at_once(make_bridge()) > 20


def snapshot_late(bridge: Bridge, *, held_back: bool) -> torch.Tensor:
    """A snapshot behind a busy gather stream, and the pool's row rewritten right after it.

    ``held_back``: the schedule stream is busy, as behind a forward that was launched meanwhile.
    """
    bridge.req_to_token[3, :100] = torch.arange(100, device=DEVICE, dtype=torch.int32)
    torch.cuda.synchronize()
    with torch.cuda.stream(bridge.gatherer._gather_stream):
        torch.cuda._sleep(100_000_000)
    if held_back:
        with torch.cuda.stream(torch.cuda.Stream()):
            bridge.gatherer.forward_begins()
        torch.cuda._sleep(10_000_000)
    taken = bridge.gatherer.snapshot(bridge.req_to_token, 3, 0, 100)
    assert bridge.gatherer._aside is held_back
    bridge.req_to_token[3].fill_(9)
    torch.cuda.synchronize()
    return read(taken, 100)


def read(taken: DeviceLocations, count: int) -> torch.Tensor:
    first = (taken.address - taken.memory.data_ptr()) // 4
    return taken.memory[first : first + count].cpu()


@pytest.mark.parametrize("held_back", [False, True])
def test_a_row_of_the_pool_is_not_rewritten_before_its_snapshot(
    make_bridge: Make, held_back: bool
) -> None:
    taken = snapshot_late(make_bridge(), held_back=held_back)
    assert torch.equal(taken, torch.arange(100, dtype=torch.int32))


def test_without_the_wait_of_the_schedule_stream_it_is(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = make_bridge()
    monkeypatch.setattr(Event, "hold_back", lambda *_: None)
    taken = snapshot_late(bridge, held_back=True)
    assert torch.equal(taken, torch.full((100,), 9, dtype=torch.int32))


@pytest.mark.parametrize("held_back", [False, True])
def test_for_all_requests_of_a_step_but_one_the_whole_pool_is_copied_once(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch, held_back: bool
) -> None:
    monkeypatch.setattr(gather_device, "_POOL_BYTES_MAX", 64 << 20)
    bridge = make_bridge(slots=64)
    together = [(bridge.forwards.token_ids(n), bridge.forwards.locations(n)) for n in range(40, 60)]
    for step in range(3):
        captured = [bridge.forwards.run(ids, locations) for ids, locations in together]
        for slot, (_, locations) in enumerate(together):
            bridge.req_to_token[slot, : len(locations)] = torch.from_numpy(locations).to(DEVICE)
        torch.cuda.synchronize()
        if held_back:
            with torch.cuda.stream(torch.cuda.Stream()):
                bridge.gatherer.forward_begins()
            torch.cuda._sleep(10_000_000)
        served = []
        for slot, (ids, _) in enumerate(together):
            taken = bridge.gatherer.snapshot(bridge.req_to_token, slot, 0, len(ids))
            assert bridge.gatherer._whole is (slot >= 1)
            bridge.req_to_token[slot].fill_(9)  # as SGLang may, in its next statement
            request = finished_request(f"{step}-{slot}", ids, taken)
            rows = bridge.forwards.rows(captured[slot])
            served.append((bridge.publisher.collect(request), rows))
        bridge.flush()
        check(served)


@pytest.mark.parametrize("begins", ["a forward", "a result"])
def test_a_copy_of_the_pool_is_of_its_step_only(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch, begins: str
) -> None:
    monkeypatch.setattr(gather_device, "_POOL_BYTES_MAX", 64 << 20)
    bridge = make_bridge()
    for slot in range(5):
        bridge.gatherer.snapshot(bridge.req_to_token, slot, 0, 10)
    assert bridge.gatherer._whole
    if begins == "a forward":
        bridge.gatherer.forward_begins()
    else:
        bridge.gatherer.result_processed(0)
    bridge.req_to_token[7, :10] = 77
    for slot in range(8):
        taken = bridge.gatherer.snapshot(bridge.req_to_token, slot, 0, 10)
    torch.cuda.synchronize()
    assert (read(taken, 10) == 77).all()


def test_a_pool_that_is_too_large_is_never_copied_whole(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_device, "_POOL_BYTES_MAX", 1 << 20)
    bridge = make_bridge()
    for slot in range(8):
        bridge.req_to_token[slot, 5:15] = slot
        taken = bridge.gatherer.snapshot(bridge.req_to_token, slot, 5, 15)
        torch.cuda.synchronize()
        assert (read(taken, 10) == slot).all()
    assert not bridge.gatherer._whole


def test_a_step_s_snapshots_wait_for_the_gather_of_the_step_before(make_bridge: Make) -> None:
    """They go to the same memory, on another stream."""
    bridge = make_bridge()
    served = []
    for step in range(20):
        served.append(bridge.serve(f"{step}", 3000))
        with torch.cuda.stream(bridge.gatherer._gather_stream):
            torch.cuda._sleep(3_000_000)
        bridge.flush()
        bridge.req_to_token[1, :3000].fill_(0)
        bridge.gatherer.snapshot(bridge.req_to_token, 1, 0, 3000)  # another request's
        bridge.gatherer.result_processed(0)
    check(served)


def test_a_gather_waits_for_a_snapshot_that_comes_late(make_bridge: Make) -> None:
    """Until then other requests' locations are in its place, or none."""
    bridge = make_bridge()
    ids, locations = bridge.forwards.token_ids(500), bridge.forwards.locations(500)
    captured = bridge.forwards.run(ids, locations)
    bridge.req_to_token[0, :500] = torch.from_numpy(locations).to(DEVICE)
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    taken = bridge.gatherer.snapshot(bridge.req_to_token, 0, 0, 500)
    assert not bridge.gatherer._aside
    ticket = bridge.publisher.collect(finished_request("late", ids, taken))
    bridge.flush()
    check([(ticket, bridge.forwards.rows(captured))])


def test_a_lane_is_not_filled_again_before_its_copy_is_done(make_bridge: Make) -> None:
    bridge = make_bridge(staging=256 << 10)  # two lanes of 1365 rows
    served = [bridge.serve("long", 9000)]
    with torch.cuda.stream(bridge.gatherer._copy_stream):
        torch.cuda._sleep(200_000_000)
    bridge.flush()
    check(served)


def test_a_snapshot_does_not_wait_for_the_forward_that_was_launched_meanwhile(
    make_bridge: Make,
) -> None:
    """As under SGLang's overlap: the schedule stream is held back behind that forward."""
    bridge = make_bridge()
    forward, schedule = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(schedule):
        bridge.req_to_token[5, :50] = torch.arange(50, device=DEVICE, dtype=torch.int32)
    with torch.cuda.stream(forward):
        forward.wait_stream(schedule)
        bridge.gatherer.forward_begins()
        torch.cuda._sleep(2_000_000_000)
    schedule.wait_stream(forward)
    with torch.cuda.stream(schedule):
        started = time.perf_counter()
        taken = bridge.gatherer.snapshot(bridge.req_to_token, 5, 0, 50)
        bridge.gatherer._gather_stream.synchronize()
        waited = time.perf_counter() - started
        assert not forward.query()  # it still runs
    assert torch.equal(read(taken, 50), torch.arange(50, dtype=torch.int32))
    assert waited < 0.2


# -- faults and pauses ----------------------------------------------------------------------------


def test_after_a_cuda_error_in_the_copy_records_fail_and_later_ones_go_inline(
    make_bridge: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = make_bridge()
    before = bridge.serve("before", 50)
    bridge.flush()
    check([before])

    def broken(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an injected one")

    monkeypatch.setattr(bridge.gatherer, "copy_rows", broken)
    lost = [bridge.serve(f"lost-{i}", 50)[0] for i in range(3)]
    with caplog.at_level(logging.ERROR, "shmroute"):
        bridge.flush()
        for ticket in lost:
            with pytest.raises(RouteFailed, match="an injected one"):
                ShmRouteReader(ticket)
    assert "an injected one" in caplog.text
    monkeypatch.undo()
    after = bridge.serve("after", 50)
    check([after])
    counters = bridge.counters
    assert counters["failed_after_ticket"] == 3
    assert counters["inline_after_failure"] == 1


def test_the_memory_is_given_back_and_the_rows_are_missing_until_forwards_ran(
    make_bridge: Make,
) -> None:
    bridge = make_bridge(locations=200_000)
    check_before = bridge.serve("before", 80)
    bridge.flush()
    check([check_before])
    held = torch.cuda.mem_get_info()[0]
    bridge.gatherer.give_back()
    freed = torch.cuda.mem_get_info()[0] - held
    assert freed >= bridge.table.device_bytes * 0.9
    bridge.gatherer.take_again()
    assert bool((bridge.table.tags == INVALID).all())
    after = bridge.serve("after", 80)
    bridge.flush()
    check([after])
