"""slime, against its documented interface only (``documented_slime``): it cannot be installed.

The same routes by ticket as from native responses.
"""

from __future__ import annotations

import asyncio
import copy
import pickle
import secrets
import sys
import types
from argparse import Namespace

import numpy as np
import pytest
import torch
from documented_slime import RoutingReplay, Sample, of_rank, sent_to_trainer
from rollouts import LAYOUT, NUM_LAYERS, TOP_K, WIDE, rollout

from shmroute import InvalidTicket, LayoutMismatch, ReplayError, RouteGone, ShmRouteReader
from shmroute.replay import slime
from shmroute.replay.lazy_tensor import LazyRoutes

ARGS = Namespace(num_layers=NUM_LAYERS, moe_router_topk=TOP_K)
PROMPT = 3
#: cp_size, allgather_cp, sp_size
RANKS = ((1, False, 1), (2, False, 1), (2, True, 1), (2, False, 2), (4, False, 2))


@pytest.fixture(autouse=True)
def slime_modules(monkeypatch):
    """What the adapter imports of slime, as documented."""
    replay = types.ModuleType("slime.utils.routing_replay")
    replay.RoutingReplay = RoutingReplay
    rollout_module = types.ModuleType("slime.rollout")
    rollout_module.sglang_rollout = types.ModuleType("slime.rollout.sglang_rollout")
    packages = [types.ModuleType("slime"), types.ModuleType("slime.utils")]
    for module in (*packages, replay, rollout_module):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield rollout_module.sglang_rollout
    RoutingReplay.lazy_resources, RoutingReplay.replays = [], []


def sample_of(turns, routes=slime.with_routes) -> Sample:
    sample = Sample([1] * PROMPT)
    for end, ticket in turns:
        new = end - len(sample.tokens)
        meta_info = routes(ARGS, {"routed_experts": ticket})
        sample.append_response_tokens(
            ARGS, tokens=[7] * new, log_probs=[0.0] * new, meta_info=meta_info
        )
    return sample


def natively(sent) -> torch.Tensor:
    turns = [(sent.tokens, sent.native)]
    return sample_of(turns, lambda args, meta: meta).rollout_routed_experts


def three(arena, layout=LAYOUT):
    return [
        rollout(arena, f"r{i}", ends, layout=layout, seed=i)
        for i, ends in enumerate(([8, 9, 20], [9], [5, 14]))
    ]


@pytest.mark.parametrize("layout", [LAYOUT, WIDE], ids=["128 experts", "512 experts"])
@pytest.mark.parametrize("ends", [[20], [8, 9, 20], [400]], ids=str)
def test_a_sample_has_rows_that_nobody_has_read(make_arena, layout, ends):
    sent = rollout(make_arena(layout), "r", ends, layout=layout)
    routes = sent_to_trainer(sample_of(sent.turns).rollout_routed_experts)
    travelling = pickle.dumps(routes)
    assert len(travelling) < 350 * len(ends)
    arrived = pickle.loads(travelling)
    expected = natively(sent)
    for each in (routes, arrived, copy.deepcopy(routes)):
        assert isinstance(each, LazyRoutes)
        assert (each.shape, each.dtype, each.device) == (
            expected.shape,
            torch.int32,
            expected.device,
        )
        assert torch.equal(each.plain(), expected)


def test_a_turn_that_repeats_the_prefix_replaces_the_turns_before_it(arena):
    first, whole = rollout(arena, "first", [8], seed=1), rollout(arena, "whole", [20], seed=2)
    routes = sample_of([*first.turns, *whole.turns]).rollout_routed_experts
    assert torch.equal(routes.plain(), natively(whole))


def test_operations_that_slime_does_not_use_see_the_rows(arena):
    sent = rollout(arena, "r", [8, 20])
    routes, expected = sample_of(sent.turns).rollout_routed_experts, natively(sent)
    assert torch.equal(routes + 0, expected)
    assert torch.count_nonzero(routes[:, 2, :]) == torch.count_nonzero(expected[:, 2])
    assert torch.equal(routes[::2], expected[::2])
    assert torch.equal(routes.reshape(-1).to(torch.int64), expected.reshape(-1).long())
    for change in (lambda: routes.fill_(0), lambda: routes.__setitem__(0, 0)):
        with pytest.raises(ReplayError, match="read-only"):
            change()


@pytest.mark.parametrize("of", ["rows", "flat", "layer"])
def test_arrays_and_lists_of_routes_are_copies_of_their_rows(arena, of):
    sent = rollout(arena, "r", [8, 20])
    whole, plain = sample_of(sent.turns).rollout_routed_experts, natively(sent)
    routes, expected = {
        "rows": (whole, plain),
        "flat": (whole.reshape(-1), plain.reshape(-1)),
        "layer": (whole[:, 2], plain[:, 2]),
    }[of]
    assert isinstance(routes, LazyRoutes)
    assert routes.tolist() == expected.tolist()
    for array in (routes.numpy(), np.asarray(routes), np.from_dlpack(routes)):
        assert array.dtype == np.int32
        assert np.array_equal(array, expected.numpy())
    assert torch.equal(torch.from_dlpack(routes), expected)
    assert np.asarray(routes, dtype=np.int64).dtype == np.int64
    changed = routes.numpy()
    changed += 1
    assert torch.equal(routes.plain(), expected)
    with pytest.raises(ValueError, match="only a copy"):
        np.array(routes, copy=False)


@pytest.mark.parametrize("call", ["share_memory_()", "data_ptr()", "apply_(abs)", "map_(r, abs)"])
def test_what_wants_memory_that_routes_do_not_have_is_refused(arena, call):
    sent = rollout(arena, "r", [8])
    routes = sample_of(sent.turns).rollout_routed_experts
    with pytest.raises(ReplayError, match=r"use plain\(\)"):
        eval(f"r.{call}", {"r": routes})


@pytest.mark.parametrize("layout", [LAYOUT, WIDE], ids=["128 experts", "512 experts"])
@pytest.mark.parametrize(("cp", "allgather", "sp"), RANKS)
def test_each_rank_replays_the_same(make_arena, layout, cp, allgather, sp):
    sequences = three(make_arena(layout), layout)
    lazy = [
        pickle.loads(pickle.dumps(sample_of(s.turns).rollout_routed_experts)) for s in sequences
    ]
    given = [natively(each) for each in sequences]
    for cp_rank in range(cp):
        for sp_rank in range(sp):
            rank = Namespace(
                cp_rank=cp_rank,
                cp_size=cp,
                sp_rank=sp_rank,
                sp_size=sp,
                allgather=allgather,
                multiple=4,
            )
            local = of_rank(lazy, rank, layout.num_experts)
            expected = of_rank(given, rank, layout.num_experts)
            assert isinstance(local, LazyRoutes)
            stage_layers = layout.layer_ids[1:]  # of the second pipeline stage
            replays = {layer: RoutingReplay() for layer in stage_layers}
            for layer, replay in replays.items():
                replay.record(local[:, layer])
            passes = [RoutingReplay.pop_forward] * 2 + [RoutingReplay.pop_backward]
            for number, pop in enumerate(passes):
                RoutingReplay.begin_lazy_pass("backward" if number else "forward")
                if number == 1:
                    RoutingReplay.clear_all_forward()
                for layer, replay in replays.items():
                    rows = pop(replay)
                    assert rows.dtype == torch.int32
                    assert type(rows) is torch.Tensor
                    assert torch.equal(rows.cpu(), expected[:, layer])
                assert local.resource.nbytes == 0, "a pass is over: nothing is kept"
            RoutingReplay.assert_all_consumed()
            RoutingReplay.lazy_resources, RoutingReplay.replays = [], []


@pytest.mark.parametrize("release_stage", ["forward", "backward"])
def test_what_a_pass_left_is_let_go_of_when_the_next_begins(arena, release_stage):
    sent = rollout(arena, "r", [20])
    routes, expected = sample_of(sent.turns).rollout_routed_experts, natively(sent)
    replays = {layer: RoutingReplay() for layer in LAYOUT.layer_ids}
    for layer, replay in replays.items():
        replay.record(routes[:, layer])
    replays[1].pop_forward()
    assert routes.resource.nbytes
    RoutingReplay.begin_lazy_pass(release_stage)
    assert routes.resource.nbytes == 0
    for layer, replay in reversed(replays.items()):
        assert torch.equal(replay.pop_backward().cpu(), expected[:, layer])
    assert routes.resource.nbytes == 0


def test_a_pass_reads_a_micro_batch_once(arena):
    routes = sample_of(rollout(arena, "r", [20]).turns).rollout_routed_experts
    layers = [routes[:, layer] for layer in LAYOUT.layer_ids]
    held = []
    for layer in layers:
        layer.materialize_for_routing_replay("forward")
        held.append(routes.resource.nbytes)
    assert held == [19 * len(LAYOUT.layer_ids) * TOP_K] * 2 + [0]


def test_a_rank_with_nothing_but_padding_replays_it(arena):
    routes = sample_of(rollout(arena, "r", [4]).turns).rollout_routed_experts
    pads = torch.arange(2 * NUM_LAYERS * TOP_K, dtype=torch.int32).reshape(2, NUM_LAYERS, TOP_K)
    local = torch.cat([routes, pads], dim=0)[3:]
    layer = local[:, 2].materialize_for_routing_replay("forward")
    assert torch.equal(layer.cpu(), pads[:, 2])


def test_records_are_released_when_slime_clears_its_replays(arena):
    sequences = three(arena)
    local = torch.cat([sample_of(s.turns).rollout_routed_experts for s in sequences], dim=0)
    layer = local[:, 1]
    layer.materialize_for_routing_replay("forward")
    layer.materialize_for_routing_replay("backward")
    assert RoutingReplay.lazy_resources == [local.resource]
    RoutingReplay.clear_all()
    for ticket in (ticket for each in sequences for ticket in each.tickets):
        with pytest.raises(RouteGone):
            ShmRouteReader(ticket)
    with pytest.raises(ReplayError, match="released after their training step"):
        layer.materialize_for_routing_replay("backward")


def test_generate_is_slimes_own(arena, slime_modules):
    sent = rollout(arena, "r", [8])

    async def generate(args, sample, sampling_params):
        (end, ticket), meta = sent.turns[0], {"id": "r"}
        new = end - len(sample.tokens)
        sample.append_response_tokens(
            args,
            tokens=[7] * new,
            log_probs=[0.0] * new,
            meta_info={**meta, "routed_experts": ticket},
        )
        return sample

    slime_modules.generate = generate
    sample = Sample([1] * PROMPT)
    before = set(vars(sample))
    assert asyncio.run(slime.generate(ARGS, sample, {})) is sample
    assert set(vars(sample)) == before
    assert torch.equal(sample.rollout_routed_experts.plain(), natively(sent))


def test_a_generate_that_does_not_append_is_named(slime_modules):
    async def generate(args, sample, sampling_params):
        sample.tokens += [7]
        sample.response_length += 1
        return sample

    slime_modules.generate = generate
    with pytest.raises(ReplayError, match="with_routes in a generate function of your own"):
        asyncio.run(slime.generate(ARGS, Sample([1] * PROMPT), {}))


def test_routes_that_do_not_fit_are_named(make_arena):
    arena = make_arena()
    sent = rollout(arena, "r", [8])
    with pytest.raises(ReplayError, match=f"routes of top-{TOP_K}, the trainer replays top-8"):
        slime.with_routes(
            Namespace(num_layers=6, moe_router_topk=8), {"routed_experts": sent.tickets[0]}
        )
    with pytest.raises(ReplayError, match="'r' is a rid"):
        slime.with_routes(ARGS, {"routed_experts": "r"})
    with pytest.raises(ReplayError, match="is a rid"):
        slime.with_routes(ARGS, {"routed_experts": secrets.token_hex(16)})
    with pytest.raises(InvalidTicket, match="neither a rid nor a ticket"):
        slime.with_routes(ARGS, {"routed_experts": "r" * 5000})
    routes = sample_of(sent.turns).rollout_routed_experts
    with pytest.raises(
        ReplayError, match=r"routers in decoder layers \[3\], the engine routes in \[1, 2, 4\]"
    ):
        routes[:, 3].materialize_for_routing_replay("forward")
    few = Namespace(num_layers=3, moe_router_topk=TOP_K)
    short = slime.with_routes(few, {"routed_experts": sent.tickets[0]})["routed_experts"]
    with pytest.raises(
        ReplayError, match=r"routes in decoder layer 4, the trainer's has layers \[0, 3\)"
    ):
        short.plain()
    other = rollout(make_arena(WIDE), "r", [9], layout=WIDE)
    mixed = torch.cat([routes, sample_of(other.turns).rollout_routed_experts])
    with pytest.raises(LayoutMismatch, match="models with other"):
        mixed[:, 1].materialize_for_routing_replay("forward")


@pytest.mark.parametrize("tokens", [2, 8, 400])
def test_an_engine_without_an_arena_is_named(arena, tokens):
    native = rollout(arena, "r", [tokens]).native
    with pytest.raises(ReplayError, match=r"native routes.*Start it with --shmroute-arena NAME"):
        slime.with_routes(ARGS, {"routed_experts": native})


def test_a_response_without_routes_is_left_as_it_is():
    meta_info = {"id": "r", "routed_experts": None}
    assert slime.with_routes(ARGS, meta_info) is meta_info
