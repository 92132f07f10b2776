"""What the capturer hands on, and which ranks have anything to hand on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forwards import VOCABULARY, Forwards, started_publisher

import shmroute
from sglang_bridge.gather_host import HostGatherer
from sglang_bridge.layer_views import LayerViews
from sglang_bridge.settings import Settings
from sglang_bridge.table import RouteTable
from shmroute import IncompleteRoutes, RouteLayout, ShmRouteReader
from shmroute.segments import SHM_DIR

ROUTES = RouteLayout(16, 2, range(3))
LOCATIONS = 256


class CountingGatherer(HostGatherer):
    """Numbers forwards as a gatherer with streams does, and keeps whose results came."""

    def __init__(self, table: RouteTable) -> None:
        super().__init__(table)
        self.begun = 0
        self.processed: list[int | None] = []

    def forward_begins(self, waits: bool = False) -> int:
        self.begun += 1
        return self.begun

    def result_processed(self, forward: int | None) -> None:
        self.processed.append(forward)


class Engine:
    """An owner rank: its capturer, as SGLang's global one, and forwards to run."""

    def __init__(self, arena: shmroute.Arena) -> None:
        from capturers import WithoutModel

        self.arena = arena
        self.table = RouteTable(ROUTES, LOCATIONS, "cpu", vocabulary=VOCABULARY)
        self.gatherer = CountingGatherer(self.table)
        self.publisher = started_publisher(arena, self.gatherer)
        self.forwards = Forwards(self.table)
        self.native = torch.zeros((LOCATIONS, 3, 2), dtype=torch.int32)
        host_cache = SimpleNamespace(buffer=self.native, destroy=lambda: None)
        self.capturer = WithoutModel(self.publisher, self.table)
        self.shadowed = WithoutModel(self.publisher, self.table, host_cache)

    def batch(self, tokens: int) -> Any:
        from capturers import Batch

        return Batch(self.forwards.token_ids(tokens), self.forwards.locations(tokens))

    def captured(self, tokens: int) -> torch.Tensor:
        return torch.from_numpy(self.forwards.routes(tokens))

    def serve(self, ids: np.ndarray, locations: np.ndarray) -> bytes:
        """A request that is already in the table finishes."""
        ticket = self.publisher.collect(self.forwards.finished("r", ids, locations))
        self.publisher.flush()
        return ticket


@pytest.fixture
def engine(sglang: SimpleNamespace, arena_name: str) -> Iterator[Engine]:
    made = Engine(shmroute.Arena.create(arena_name, ROUTES, capacity="1MiB", slots=8))
    sglang.set_global_experts_capturer(made.capturer)
    yield made
    sglang.set_global_experts_capturer(None)
    made.capturer.destroy()


# -- marks ---------------------------------------------------------------------------------------


def test_the_gatherer_learns_whose_result_is_processed_also_behind_a_later_forward(
    engine: Engine,
) -> None:
    first = engine.capturer.forward(engine.batch(4), engine.captured(4))
    second = engine.capturer.forward(engine.batch(4), engine.captured(4))
    assert engine.gatherer.processed == []
    first.finalize()
    assert engine.gatherer.processed == [1]
    second.finalize()
    assert engine.gatherer.processed == [1, 2]


def test_a_result_hands_over_what_an_interrupted_step_left_pending(engine: Engine) -> None:
    batch = engine.batch(4)
    mark = engine.capturer.forward(batch, engine.captured(4))
    ids, locations = batch.input_ids.numpy(), batch.out_cache_loc.numpy()
    ticket = engine.publisher.collect(engine.forwards.finished("r", ids, locations))
    mark.finalize()
    with ShmRouteReader(ticket) as routes:
        assert routes.tokens == 4


def test_a_forward_whose_beginning_was_not_seen_begins_a_step_and_its_rows_are_missing(
    engine: Engine,
) -> None:
    batch, captured = engine.batch(4), engine.captured(4)
    engine.capturer.forward(batch, captured.clone())
    engine.capturer.end_forward(batch, captured).finalize()
    assert engine.gatherer.processed == [None]
    assert (engine.table.tags < 0).all()
    assert (captured == -1).all()


# -- decode graphs -------------------------------------------------------------------------------


class StoringGraphs:
    """Decode graphs for batches of 4; what they store on a GPU is in the table already."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.captured = False

    def before_forward(self, epoch: int) -> bool:
        self.epochs.append(epoch)
        return self.captured

    def has_stored(self, tokens: int | None) -> bool:
        return tokens == 4


@pytest.fixture
def graphs(engine: Engine) -> StoringGraphs:
    made = engine.capturer._decode_graphs = StoringGraphs()
    return made


def test_what_a_decode_graph_has_stored_is_not_scattered_again(
    engine: Engine, graphs: StoringGraphs
) -> None:
    batch, captured = engine.batch(4), engine.captured(4)
    engine.capturer.on_forward_begin(batch)
    engine.capturer.end_forward(batch, captured, graph=4).finalize()
    assert engine.gatherer.processed == [1]
    assert (engine.table.tags < 0).all()
    assert (captured >= 0).any()
    engine.capturer.weights_change("new")
    assert engine.capturer.epochs.current == 1, "its epoch was used"
    engine.capturer.on_forward_begin(batch)
    assert graphs.epochs == [0, 1]


@pytest.mark.parametrize("how", ["eager", "another batch", "a prefill graph"])
def test_what_no_decode_graph_has_stored_is_scattered(
    engine: Engine, graphs: StoringGraphs, how: str
) -> None:
    """The batch that SGLang names with a prefill graph is that of an earlier decode graph."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = engine.batch(4)
    if how == "a prefill graph":
        batch.forward_mode = ForwardMode.EXTEND
    engine.capturer.on_forward_begin(batch)
    ran = {"eager": None, "another batch": 8, "a prefill graph": 4}[how]
    engine.capturer.end_forward(batch, engine.captured(4), graph=ran)
    assert int((engine.table.tags >= 0).sum()) == 4


def test_rows_of_a_decode_graph_whose_beginning_was_not_seen_are_missing(
    engine: Engine, graphs: StoringGraphs
) -> None:
    batch = engine.batch(4)
    engine.capturer.forward(batch, engine.captured(4))
    assert int((engine.table.tags >= 0).sum()) == 4
    engine.capturer.end_forward(batch, engine.captured(4), graph=4)
    assert (engine.table.tags < 0).all()


@pytest.mark.parametrize("what", ["the first forward", "new graphs"])
def test_what_warm_ups_left_in_the_capture_buffer_is_gone_before_a_forward(
    engine: Engine, graphs: StoringGraphs, what: str
) -> None:
    """A layer that does not capture would show it."""
    capturer = engine.capturer
    capturer._every_row = left = engine.captured(4)
    capturer._dirty = what == "the first forward"
    graphs.captured = what == "new graphs"
    capturer.on_forward_begin(engine.batch(4))
    assert (left == -1).all()
    capturer.end_forward(engine.batch(4), left)
    graphs.captured = False
    capturer._every_row = left = engine.captured(4)
    capturer.on_forward_begin(engine.batch(4))
    assert (left >= 0).any()


@pytest.mark.parametrize("past_python", [True, False])
def test_what_a_forward_left_whose_end_was_not_seen_is_gone_before_the_next(
    engine: Engine, past_python: bool
) -> None:
    """Its layers' copies, and what a graph of it wrote."""
    capturer = engine.capturer
    capturer.on_forward_begin(engine.batch(4))
    buffer = capture(capturer, engine.captured(4))
    capturer._every_row = buffer
    if past_python:
        buffer[4:9] = 7
    capturer.on_forward_begin(engine.batch(4))
    assert (buffer == -1).all()


def test_what_layers_copied_outside_of_forwards_is_gone_before_the_next(engine: Engine) -> None:
    capturer = engine.capturer
    buffer = capture(capturer, engine.captured(4))
    capturer._every_row = buffer
    capturer.on_forward_begin(engine.batch(4))
    assert (buffer == -1).all()
    assert capturer._layers.written == 0


@pytest.mark.parametrize("decodes", [True, False])
def test_a_forward_that_may_scatter_inside_a_graph_waits_for_the_gathers(
    engine: Engine, graphs: StoringGraphs, monkeypatch: pytest.MonkeyPatch, decodes: bool
) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    waits = []
    monkeypatch.setattr(engine.gatherer, "forward_begins", lambda wait: waits.append(wait) or 1)
    batch = engine.batch(4)
    batch.forward_mode = ForwardMode.DECODE if decodes else ForwardMode.EXTEND
    engine.capturer.on_forward_begin(batch)
    engine.capturer._decode_graphs = None
    engine.capturer.on_forward_begin(batch)
    assert waits == [decodes, False]


def test_a_forward_begins_behind_the_gathers_whatever_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.publisher, "flush", failing)
    begun = engine.gatherer.forward_begins()
    with pytest.raises(RuntimeError, match="injected"):
        engine.capturer.on_forward_begin(engine.batch(4))
    assert engine.gatherer.forward_begins() == begun + 2


def test_without_shadow_mode_a_mark_carries_no_tensors(engine: Engine) -> None:
    mark = engine.capturer.forward(engine.batch(4), engine.captured(4))
    copied: list[torch.Tensor] = []
    mark.map_device_tensors(copied.append)
    assert copied == []


def test_in_shadow_mode_sglang_s_own_rows_reach_its_host_cache_through_the_mark(
    engine: Engine,
) -> None:
    """The buffer holds the next forward's rows by the time that they do."""
    batch, captured = engine.batch(4), engine.captured(4)
    expected, where = captured.clone(), batch.out_cache_loc
    mark = engine.shadowed.forward(batch, captured)
    copied = []

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor)
        return tensor.clone()

    mark.map_device_tensors(to_host)
    assert len(copied) == 2  # locations and routes
    assert (captured == -1).all()
    assert not engine.native.any()
    mark.finalize()
    assert torch.equal(engine.native[where], expected)
    assert engine.gatherer.processed == [1]


# -- forwards outside of graphs --------------------------------------------------------------------


class KeepingForwards:
    """Layers are kept; what is stored of them on a GPU is in the table already."""

    def __init__(self, stores: bool, fails: bool = False) -> None:
        self.stores, self.fails = stores, fails
        self.kept: list[int] = []
        self.epochs: list[int] = []

    def begin(self) -> None:
        self.kept.clear()

    def keep(self, layer_id: int, ids: torch.Tensor) -> bool:
        self.kept.append(layer_id)
        return True

    def store(self, *given: Any) -> bool:
        self.epochs.append(given[-1])
        if self.fails:
            raise RuntimeError("injected")
        return self.stores


def capture(capturer: Any, routes: torch.Tensor) -> torch.Tensor:
    """Each layer captures; returns the capture buffer."""
    buffer = torch.full((64, 3, 2), -1, dtype=torch.int32)
    capturer.device_cache = SimpleNamespace(buffer=buffer)
    capturer._layers = LayerViews(buffer)
    for layer in range(3):
        capturer.capture(layer, routes[:, layer])
    return buffer


@pytest.mark.parametrize("stores", [True, False])
def test_layers_that_were_kept_are_copied_by_nobody_and_stored_once(
    engine: Engine, stores: bool
) -> None:
    capturer, batch = engine.capturer, engine.batch(4)
    eager = capturer._eager = KeepingForwards(stores)
    capturer.on_forward_begin(batch)
    buffer = capture(capturer, engine.captured(4))
    assert eager.kept == [0, 1, 2]
    assert (buffer == -1).all()
    captured = engine.captured(4)
    capturer.end_forward(batch, captured.clone()).finalize()
    assert eager.epochs == [0]
    assert int((engine.table.tags >= 0).sum()) == (0 if stores else 4)
    capturer.weights_change("new")
    capturer.forward(engine.batch(4), captured)
    assert eager.kept == [], "the next forward begins with none"
    assert eager.epochs == [0, 1], "an epoch that was used ended with the weights"


def test_routes_that_cannot_be_stored_are_missing_whatever_the_buffer_holds(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    capturer, batch = engine.capturer, engine.batch(4)
    capturer.forward(batch, engine.captured(4))
    capturer._eager = KeepingForwards(False, fails=True)
    left = engine.captured(6)
    capturer.forward(batch, left).finalize()
    assert "routes of a forward were lost" in caplog.text
    assert (engine.table.tags < 0).all()
    assert (left == -1).all()


@pytest.mark.parametrize("ran", ["a graph", "eager"])
def test_what_padding_left_in_the_capture_buffer_is_gone_after_the_forward(
    engine: Engine, ran: str
) -> None:
    """A later forward's layer that does not capture would show it."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    capturer, batch, padded = engine.capturer, engine.batch(4), engine.captured(9)
    batch.forward_mode = ForwardMode.EXTEND
    capturer.on_forward_begin(batch)
    buffer = capture(capturer, padded)
    graph = None
    if ran == "a graph":
        graph, capturer._layers.written = 4, 0  # replayed, it writes past Python
    capturer.end_forward(batch, buffer, graph=graph)
    assert int((engine.table.tags >= 0).sum()) == 4
    assert (buffer == -1).all()


def test_a_forward_that_wrote_no_padding_has_nothing_put_behind_it(engine: Engine) -> None:
    capturer, batch = engine.capturer, engine.batch(4)
    capturer.on_forward_begin(batch)
    buffer = capture(capturer, engine.captured(4))
    buffer[4:] = 7
    capturer.end_forward(batch, buffer)
    assert (buffer[4:] == 7).all()
    assert capturer._layers.written == 0


@pytest.mark.parametrize("when", ["before any forward", "after a forward", "in a compiler"])
def test_outside_of_forwards_and_in_a_compiler_routes_are_copied(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """While graphs warm up, nobody would store them; what is traced runs without Python."""
    capturer = engine.capturer
    eager = capturer._eager = KeepingForwards(True)
    routes = engine.captured(4)
    if when == "after a forward":
        capturer.forward(engine.batch(4), routes.clone())
    elif when == "in a compiler":
        capturer.on_forward_begin(engine.batch(4))
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    buffer = capture(capturer, routes)
    assert eager.kept == []
    assert torch.equal(buffer[:4], routes)


# -- a forward that the capture buffer cannot hold -----------------------------------------------


def too_long_forward(capturer: Any, batch: Any, routes: torch.Tensor) -> Any:
    """A forward in which each layer captures, as in the model, into a buffer of eight rows."""
    from sglang.srt.state_capturer.base import BaseDeviceCache

    capturer.device_cache = BaseDeviceCache(8, 3, 2, "cpu", name="routed_experts")
    buffer = capturer.device_cache.buffer.fill_(-1)
    capturer._layers = LayerViews(buffer)
    capturer.num_fused_shared_experts = 0
    capturer.on_forward_begin(batch)
    for layer in range(3):
        capturer.capture(layer, routes[:, layer])
    return capturer.end_forward(batch, buffer)


def test_rows_of_a_forward_longer_than_the_capture_buffer_are_missing_and_it_is_named(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a former occupant's tags would match: the same tokens ran there before."""
    batch = engine.batch(12)
    engine.capturer.forward(batch, engine.captured(12))
    too_long_forward(engine.capturer, batch, engine.captured(12)).finalize()
    assert "a forward of 12 tokens, and the capture buffer holds 8" in caplog.text
    ticket = engine.serve(batch.input_ids.numpy(), batch.out_cache_loc.numpy())
    with ShmRouteReader(ticket, allow_missing=True) as routes:
        assert routes.missing == ((0, 12),)


def test_the_forward_after_it_has_its_rows(engine: Engine) -> None:
    too_long_forward(engine.capturer, engine.batch(12), engine.captured(12)).finalize()
    batch, captured = engine.batch(8), engine.captured(8)
    expected = captured.clone()
    too_long_forward(engine.capturer, batch, captured).finalize()
    ticket = engine.serve(batch.input_ids.numpy(), batch.out_cache_loc.numpy())
    with ShmRouteReader(ticket) as routes:
        np.testing.assert_array_equal(routes.numpy(), expected)


def test_in_shadow_mode_it_leaves_sglang_s_host_cache_alone(engine: Engine) -> None:
    too_long_forward(engine.shadowed, engine.batch(12), engine.captured(12)).finalize()
    assert not engine.native.any()


# -- memory of a colocated trainer ---------------------------------------------------------------


def updater(saver: bool) -> Any:
    return SimpleNamespace(memory_saver_adapter=SimpleNamespace(enabled=saver))


def release(tags: list[str] | None, *, saver: bool = True) -> None:
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    from sglang_bridge import scheduler

    scheduler._memory_released(None, updater(saver), ReleaseMemoryOccupationReqInput(tags=tags))


def resume(tags: list[str] | None, *, saver: bool = True) -> None:
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    from sglang_bridge import scheduler

    scheduler._memory_resumed(None, updater(saver), ResumeMemoryOccupationReqInput(tags=tags))


def held(engine: Engine) -> int:
    table = engine.table
    return sum(part.untyped_storage().nbytes() for part in (table.rows, table.tags))


@pytest.mark.parametrize("tags", [None, [], ["kv_cache"], ["weights", "kv_cache"]], ids=str)
def test_the_table_s_memory_goes_and_comes_with_the_kv_cache_s(
    engine: Engine, tags: list[str] | None
) -> None:
    before = held(engine)
    assert before == engine.table.nbytes
    release(tags)
    assert held(engine) == 0
    resume(tags)
    assert held(engine) == before


@pytest.mark.parametrize("tags", [["weights"], ["cuda_graph"]], ids=str)
def test_while_the_kv_cache_stays_the_table_and_its_rows_stay(
    engine: Engine, tags: list[str]
) -> None:
    """A trainer that takes the weights only must not lose the routes of what is cached."""
    ids, locations = engine.forwards.token_ids(20), engine.forwards.locations(20)
    captured = engine.forwards.run(ids, locations)
    release(tags)
    assert held(engine) == engine.table.nbytes
    resume(tags)
    with ShmRouteReader(engine.serve(ids, locations)) as routes:
        np.testing.assert_array_equal(routes.numpy(), engine.forwards.rows(captured))


def test_without_the_memory_saver_nothing_goes_because_the_engine_goes_on(
    engine: Engine,
) -> None:
    release(None, saver=False)
    assert held(engine) == engine.table.nbytes
    resume(None, saver=False)
    assert held(engine) == engine.table.nbytes


def test_rows_from_before_are_missing_until_forwards_have_run_again(engine: Engine) -> None:
    ids, locations = engine.forwards.token_ids(20), engine.forwards.locations(20)
    engine.forwards.run(ids, locations)
    release(None)
    resume(None)
    ticket = engine.serve(ids, locations)
    with pytest.raises(IncompleteRoutes, match="20 of 20"):
        ShmRouteReader(ticket)
    captured = engine.forwards.run(ids, locations)
    with ShmRouteReader(engine.serve(ids, locations)) as routes:
        np.testing.assert_array_equal(routes.numpy(), engine.forwards.rows(captured))


def test_the_kv_cache_may_go_without_a_capturer_of_ours(sglang: SimpleNamespace) -> None:
    """Another rank's scheduler, or one whose model has no experts."""
    sglang.set_global_experts_capturer(None)
    release(None)
    resume(None)


# -- ranks ---------------------------------------------------------------------------------------


@pytest.fixture
def make_rank(sglang: SimpleNamespace, arena_name: str) -> Iterator[Callable[..., Any]]:
    """The capturer of either attention-TP rank of two, made as its scheduler makes it."""
    import moe_layers
    from sglang.srt.runtime_context import get_context, get_parallel

    from sglang_bridge.capturer import ArenaCapturer

    model = torch.nn.ModuleList(
        part for layer in range(3) for part in (moe_layers.router(layer), moe_layers.experts(layer))
    )
    model.shared_experts_config = SimpleNamespace(num_fused_shared_experts=0)
    config = SimpleNamespace(
        hf_text_config=SimpleNamespace(num_experts_per_tok=2, num_hidden_layers=3),
        model_path="made",
        context_len=64,
        vocab_size=VOCABULARY,
        is_multimodal=False,
    )
    with ExitStack() as ending:
        ending.enter_context(get_context().override_server_args(tp_size=2, chunked_prefill_size=64))

        def make(number: int, *, shadow: bool = False) -> Any:
            ranks = {"tp_rank": number, "attn_tp_rank": number, "pp_rank": 0, "attn_cp_rank": 0}
            ending.enter_context(get_parallel().override(**ranks))
            capturer = ArenaCapturer(
                Settings(arena=arena_name, capacity=1 << 20, slots=8, shadow=shadow),
                model=model,
                model_config=config,
                num_tokens=LOCATIONS,
                max_running_requests=4,
                device="cpu",
            )
            ending.callback(capturer.destroy)
            sglang.set_global_experts_capturer(capturer)
            ending.callback(sglang.set_global_experts_capturer, None)
            return capturer

        yield make


def arena_files(name: str) -> list[str]:
    return [entry for entry in os.listdir(SHM_DIR) if f"-{name}-" in entry]


@pytest.mark.parametrize(("number", "owns"), [(0, True), (1, False)])
def test_of_two_attention_tp_ranks_the_first_alone_has_a_publisher_a_table_and_an_arena(
    make_rank: Callable[[int], Any], arena_name: str, number: int, owns: bool
) -> None:
    capturer = make_rank(number)
    assert (capturer.publisher is not None) == owns
    assert hasattr(capturer, "table") == owns
    assert bool(arena_files(arena_name)) == owns


def test_another_rank_s_forwards_requests_and_updates_go_by_without_a_trace(
    make_rank: Callable[[int], Any],
    sglang: SimpleNamespace,
    arena_name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from capturers import Batch

    from sglang_bridge import scheduler

    capturer = make_rank(1)
    pool = sglang.ReqToTokenPool(4, 64, "cpu", False)
    runner = SimpleNamespace(is_draft_worker=False, req_to_token_pool=pool, capture_tail_hooks=[])
    scheduler._created(None, runner)
    batch = Batch(np.arange(4), np.arange(4))
    for _ in range(2):
        scheduler._forward_begins(runner, batch)
        for layer in range(3):
            capturer.capture(layer, torch.ones((4, 2), dtype=torch.int32))
        assert capturer.on_forward_end(batch, False, None, no_copy_to_cpu=True) is None
    assert (capturer.device_cache.buffer == -1).all()
    assert runner.capture_tail_hooks == []

    req = sglang.Req("r", "", [1, 2], sglang.SamplingParams(), return_routed_experts=True)
    req.output_ids.extend([3, 4])
    req.finished_reason = sglang.FINISH_LENGTH(length=2)
    scheduler._collect(None, SimpleNamespace(req_to_token_pool=pool), req)
    scheduler._streamed(None, [req], False)
    scheduler._step_processed(None)
    assert req.routed_experts is None

    scheduler._idle(None)
    scheduler._paused(None)
    scheduler._weights_renamed(None, "new")
    release(None)
    resume(None)
    assert arena_files(arena_name) == []
    assert not caplog.records


@pytest.mark.parametrize("number", [0, 1])
def test_in_shadow_mode_sglang_s_way_has_its_own_copies_of_what_routers_made(
    make_rank: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """With our copies in its buffer it would agree with whatever they are."""
    from sglang.srt.state_capturer import base

    def pageable(shape: tuple[int, ...], *, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setitem(base.ALLOC_MEMORY_FUNCS, "cpu", pageable)
    capturer = make_rank(number, shadow=True)
    monkeypatch.setattr(capturer._layers, "copy", lambda *_: capturer._every_row.fill_(7))
    ids = torch.tensor([[1, 2], [3, 4], [5, 6], [8, 9]], dtype=torch.int32)
    for layer in range(3):
        capturer.capture(layer, ids)
    assert torch.equal(capturer.device_cache.buffer[:4], ids[:, None].expand(4, 3, 2))
    if number == 0:
        assert (capturer._every_row == 7).all()
