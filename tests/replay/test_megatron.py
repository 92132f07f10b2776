"""Replay in Megatron-core: its own routers, layers, checkpoints and chunks, on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import megatron_models as megatron
import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron_models import EXPERTS, TOP_K, as_map, gradients
from rollouts import routes

import shmroute
from shmroute import Arena, Partition, ReplayError, RouteLayout
from shmroute.replay.megatron import LayerReplay, RouteReplay

pytestmark = pytest.mark.filterwarnings("ignore:::megatron")

LAYOUT = RouteLayout(EXPERTS, TOP_K, [1, 2], num_layers=3)
PIPELINED = RouteLayout(EXPERTS, TOP_K, range(1, 8), num_layers=8)

RECOMPUTATIONS = {
    "each layer": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "layers together": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 3,
    },
    "one of two MoE layers": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
    },
    "their MoE part": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


class Sequences:
    """Records of sequences in an arena, and their rows ``[tokens, moe_layers, top_k]``."""

    def __init__(self, arena: Arena, layout: RouteLayout) -> None:
        self.arena, self.layout = arena, layout
        self.rows: dict[str, np.ndarray[Any, Any]] = {}

    def add(self, *lengths: int) -> list[bytes]:
        """Tickets of new sequences of so many tokens."""
        return [self._add(length) for length in lengths]

    def _add(self, length: int) -> bytes:
        rid = f"r{len(self.rows)}"
        ids = routes(length - 1, self.layout, seed=len(self.rows))
        with self.arena.reserve(rid, tokens=length - 1) as slot:
            slot.rows[...] = ids
        unrouted = np.broadcast_to(np.arange(TOP_K), (1, *ids.shape[1:]))
        self.rows[rid] = np.concatenate([ids, unrouted])
        return slot.ticket

    def expected(self, first: int, count: int, layer_id: int) -> torch.Tensor:
        """``bool [tokens, experts]`` of sequences packed one behind the other."""
        packed = np.concatenate([self.rows[f"r{at}"] for at in range(first, first + count)])
        return as_map(packed[:, self.layout.layer_ids.index(layer_id)])


@pytest.fixture(autouse=True)
def _one_stage(request: pytest.FixtureRequest) -> Iterator[None]:
    stages = 2 if "chunks" in request.fixturenames else 1
    with megatron.megatron_on_a_cpu(stages=stages):
        yield
    RouterReplay.clear_global_router_replay_instances()


@pytest.fixture
def sequences_of(
    make_arena: Callable[[RouteLayout], Arena],
) -> Callable[[RouteLayout], Sequences]:
    return lambda layout: Sequences(make_arena(layout), layout)


@pytest.fixture
def sequences(sequences_of: Callable[[RouteLayout], Sequences]) -> Sequences:
    return sequences_of(LAYOUT)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(12)[None]


def trained(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of one forward and backward."""
    model.zero_grad(set_to_none=True)
    megatron.logits(model, tokens).square().sum().backward()
    return gradients(model)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the routes ----------------------------------------------------------------------------------


def test_each_router_sends_each_token_where_the_rollout_sent_it(sequences, tokens):
    model = megatron.gpt(megatron.config())
    routed, replay = megatron.Routed(model), RouteReplay(model)
    with replay.schedule(), replay.micro_batch(sequences.add(7, 5)):
        megatron.logits(model, tokens)
    maps = routed.take()
    assert list(maps) == [2, 3]  # Megatron counts layers from 1
    for layer_number, (routing_map,) in maps.items():
        assert torch.equal(routing_map, sequences.expected(0, 2, layer_number - 1))


def test_outputs_and_gradients_are_those_of_megatrons_own_replay(sequences, tokens):
    tickets = sequences.add(7, 5)
    model = megatron.gpt(megatron.config(moe_enable_routing_replay=True))
    rows = shmroute.read_batch(tickets, pad="distinct", dtype=torch.int64).rows
    RouterReplay.set_replay_data(list(rows.unbind(1)))
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    theirs = trained(model, tokens)
    RouterReplay.clear_global_router_replay_action()
    RouterReplay.clear_global_indices()
    replay = RouteReplay(model)
    with replay.schedule(), replay.micro_batch(tickets):
        ours = trained(model, tokens)
    assert equal(ours, theirs)
    for router in megatron.routers(model):
        assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "router",
    [
        {},
        {"moe_router_pre_softmax": True},
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 2.5,
        },
    ],
    ids=["softmax", "softmax before top-k", "sigmoid, groups, bias"],
)
def test_replaying_a_routers_own_choice_changes_nothing(sequences, tokens, router):
    model = megatron.gpt(megatron.config(**router))
    for each in megatron.routers(model):
        if each.enable_expert_bias:
            each.expert_bias.normal_()
    routed, natively = megatron.Routed(model), trained(model, tokens)
    with sequences.arena.reserve("own", tokens=12) as slot:
        for column, (routing_map,) in enumerate(routed.take().values()):
            slot.rows[:, column] = routing_map.nonzero()[:, 1].view(12, TOP_K)
    replay = RouteReplay(model)
    # The record's 12 rows are of 13 tokens: of two ranks the first has these 12.
    cut = Partition(cp_size=1, sp_size=2, batch_multiple=24)
    with replay.schedule(), replay.micro_batch(slot.ticket, tokens=cut):
        replayed = trained(model, tokens)
    assert replayed.keys() == natively.keys()
    for name, gradient in natively.items():  # top-k came sorted, so sums are in another order
        torch.testing.assert_close(replayed[name], gradient, msg=name)


@pytest.mark.parametrize("side", [1, 2], ids=["packed", "side by side"])
@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("sp_size", [1, 2])
def test_each_rank_replays_its_own_tokens(sequences, side, cp_size, sp_size):
    lengths, padded = (13, 16), 16
    tickets = sequences.add(*lengths)
    whole = np.broadcast_to(np.arange(TOP_K), (2, padded, 2, TOP_K)).copy()
    for at, length in enumerate(lengths):
        whole[at, :length] = sequences.rows[f"r{at}"]
    model = megatron.gpt(megatron.config())
    routed, replay = megatron.Routed(model), RouteReplay(model)
    seen = 0
    for cp_rank in range(cp_size):
        chunk = padded // (2 * cp_size)
        starts = (cp_rank * chunk, padded - (cp_rank + 1) * chunk)
        share = np.concatenate([whole[:, start : start + chunk] for start in starts], 1)
        # Packed: sequence by sequence; side by side: [length, sequences], as Megatron flattens.
        share = (share.swapaxes(0, 1) if side == 2 else share).reshape(-1, 2, TOP_K)
        for sp_rank in range(sp_size):
            mine = np.split(share, sp_size)[sp_rank]
            cut = Partition(cp_rank, cp_size, True, sp_rank, sp_size, sequence_multiple=padded)
            with replay.schedule(), replay.micro_batch(tickets, tokens=cut):
                for router in megatron.routers(model):
                    router(torch.randn(len(mine) // side, side, megatron.HIDDEN))
            for column, (routing_map,) in enumerate(routed.take().values()):
                assert torch.equal(routing_map, as_map(mine[:, column]))
            seen += len(mine)
    assert seen == 2 * padded


def test_turns_of_a_conversation_are_one_sequence(sequences, tokens):
    (whole,) = sequences.add(12)
    turns = []
    for rid, start, end in (("first", 0, 5), ("second", 5, 11)):
        with sequences.arena.reserve(rid, tokens=end - start, start=start) as slot:
            slot.rows[...] = sequences.rows["r0"][start:end]
        turns.append(slot.ticket)
    model = megatron.gpt(megatron.config())
    routed, replay = megatron.Routed(model), RouteReplay(model)
    for sources in (whole, [turns]):
        with replay.schedule(), replay.micro_batch(sources):
            megatron.logits(model, tokens)
    for once, again in routed.take().values():
        assert torch.equal(once, again)


@pytest.mark.parametrize("chunks", [None, "a path", [None]], ids=repr)
def test_what_is_no_model_is_refused_by_its_type(chunks):
    with pytest.raises(ReplayError, match="the model, or a chunk of it, is a"):
        RouteReplay(chunks)


@pytest.mark.parametrize(
    ("sources", "share", "said"),
    [
        ([], None, "routes of no sequences"),
        (["r"], 0, "tokens is a int: give a shmroute.Partition"),
    ],
)
def test_a_micro_batch_that_cannot_be_is_refused(sources, share, said):
    replay = RouteReplay(megatron.gpt(megatron.config()))
    with replay.schedule(), pytest.raises(ReplayError, match=said):
        with replay.micro_batch(sources, tokens=share):
            pass


def test_a_sequence_without_its_first_turn_is_refused(sequences, tokens):
    sequences.add(12)
    with sequences.arena.reserve("second", tokens=6, start=5) as slot:
        slot.rows[...] = sequences.rows["r0"][5:11]
    model = megatron.gpt(megatron.config())
    with pytest.raises(ReplayError, match=r"rid 'second'\) has routes from token 5 on"):
        forward(RouteReplay(model), model, slot.ticket, 12)


# -- recomputation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputation", RECOMPUTATIONS.values(), ids=RECOMPUTATIONS)
def test_a_recomputation_replays_the_same_routes_without_reading_them_again(
    sequences, tokens, recomputation
):
    tickets = sequences.add(7, 5)
    gradients_of = []
    for settings in ({}, recomputation):
        model = megatron.gpt(megatron.config(**settings)).train()
        routed, replay = megatron.Routed(model), RouteReplay(model)
        with replay.schedule():
            with replay.micro_batch(tickets):
                output = megatron.logits(model, tokens)
            held = replay.held_bytes
            if settings:
                shmroute.release(tickets)
            output.square().sum().backward()
            assert replay.held_bytes == 0
        assert held == (12 * 2 * TOP_K if settings else 0)
        gradients_of.append(gradients(model))
        recomputed = 0
        for layer_number, (forward, *again) in routed.take().items():
            assert torch.equal(forward, sequences.expected(0, 2, layer_number - 1))
            assert all(torch.equal(forward, other) for other in again)
            recomputed += len(again)
        assert recomputed == (0 if not settings else 1 if "block" in settings.values() else 2)
    assert equal(*gradients_of)


def test_rows_of_a_pass_without_gradients_wait_for_no_recomputation(sequences, tokens):
    model = megatron.gpt(megatron.config(**RECOMPUTATIONS["each layer"]))
    replay = RouteReplay(model)
    with replay.schedule(), torch.no_grad():
        with replay.micro_batch(sequences.add(12)):
            megatron.logits(model, tokens)
        assert replay.held_bytes == 0


def test_a_second_recomputation_of_one_forward_is_refused(sequences, tokens):
    model = megatron.gpt(megatron.config(**RECOMPUTATIONS["each layer"]))
    replay = RouteReplay(model)
    with replay.schedule():
        with replay.micro_batch(sequences.add(12)):
            output = megatron.logits(model, tokens).sum()
        output.backward(retain_graph=True)
        with pytest.raises(ReplayError, match="layer_number 3 is recomputed a second time"):
            output.backward()


def test_a_checkpoint_that_is_not_reentrant_is_refused(sequences, tokens):
    model = megatron.gpt(megatron.config())
    replay = RouteReplay(model)
    with replay.schedule():
        with replay.micro_batch(sequences.add(12)):
            output = torch.utils.checkpoint.checkpoint(
                megatron.logits, model, tokens, use_reentrant=False
            )
        with pytest.raises(ReplayError, match="whose forward had gradients on"):
            output.sum().backward()


def test_a_checkpoint_within_a_checkpoint_is_refused(sequences, tokens):
    model = megatron.gpt(megatron.config(**RECOMPUTATIONS["each layer"]))
    replay = RouteReplay(model)
    with replay.schedule():
        with replay.micro_batch(sequences.add(12)):
            output = torch.utils.checkpoint.checkpoint(
                lambda _: megatron.logits(model, tokens),
                torch.ones(1, requires_grad=True),
                use_reentrant=True,
            )
        with pytest.raises(ReplayError, match="within another one"):
            output.sum().backward()


def test_a_backward_after_its_schedule_is_refused(sequences, tokens):
    model = megatron.gpt(megatron.config(**RECOMPUTATIONS["each layer"]))
    replay = RouteReplay(model)
    with replay.schedule(), replay.micro_batch(sequences.add(12)):
        output = megatron.logits(model, tokens)
    with pytest.raises(ReplayError, match="after the end of the schedule"):
        output.sum().backward()


def test_a_model_that_replays_recomputes_other_forwards_by_its_own_choice(sequences, tokens):
    model = megatron.gpt(megatron.config(**RECOMPUTATIONS["each layer"]))
    natively = trained(model, tokens)
    replay = RouteReplay(model)
    with replay.schedule():
        with replay.micro_batch(sequences.add(12)):
            replayed = megatron.logits(model, tokens)
        assert equal(trained(model, tokens), natively)
        replayed.sum().backward()
    assert equal(trained(model, tokens), natively)


# -- pipelines -------------------------------------------------------------------------------------


@pytest.fixture
def chunks() -> list[Any]:
    """The two chunks of the last of two pipeline stages."""
    settings = megatron.pipelined(**RECOMPUTATIONS["each layer"])
    return [megatron.gpt(settings, vp_stage=stage) for stage in range(2)]


# What each says: chunk and micro-batch, F forward, B backward.
INTERLEAVED = "F00 F01 F10 F11 F02 B10 F03 B11 F12 B00 F13 B01 B12 B13 B02 B03"
LAST_FIRST = "F00 F10 F01 F11 F02 F12 F03 F13 B13 B03 B12 B02 B11 B01 B10 B00"


@pytest.mark.parametrize("order", [INTERLEAVED, LAST_FIRST], ids=["interleaved", "last first"])
def test_chunks_replay_their_own_layers_of_each_micro_batch(sequences_of, chunks, order):
    sequences = sequences_of(PIPELINED)
    tickets = sequences.add(6, 6, 6, 6)  # of one length: no shape tells them apart
    routed, replay = megatron.Routed(*chunks), RouteReplay(chunks)
    outputs: dict[str, torch.Tensor] = {}
    with replay.schedule():
        for step in order.split():
            kind, chunk, micro_batch = step[0], int(step[1]), int(step[2])
            if kind == "F":
                hidden = torch.randn(6, 1, megatron.HIDDEN, requires_grad=True)
                with replay.micro_batch(tickets[micro_batch], chunk=chunks[chunk]):
                    outputs[step[1:]] = megatron.through(chunks[chunk], hidden)
            else:
                outputs.pop(step[1:]).sum().backward()
            maps = routed.take()
            assert [layer for layer, taken in maps.items() if taken] == [[3, 4], [7, 8]][chunk]
            for layer_number, taken in maps.items():
                for routing_map in taken:
                    expected = sequences.expected(micro_batch, 1, layer_number - 1)
                    assert torch.equal(routing_map, expected)
            held = len(outputs) * 6 * 2 * TOP_K
            assert replay.held_bytes == held
    assert not outputs


def test_an_exception_in_a_schedule_leaves_nothing_behind(sequences_of, chunks):
    sequences = sequences_of(PIPELINED)
    tickets = sequences.add(6, 6)
    replay, hidden = RouteReplay(chunks), torch.randn(6, 1, megatron.HIDDEN, requires_grad=True)

    def interrupted() -> None:
        with replay.schedule():
            with replay.micro_batch(tickets[0], chunk=chunks[0]):
                megatron.through(chunks[0], hidden)
            with replay.micro_batch(tickets[1], chunk=chunks[1]):
                megatron.through(chunks[1], hidden)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert replay.held_bytes == 0
    routed = megatron.Routed(*chunks)
    with replay.schedule():
        with replay.micro_batch(tickets[1], chunk=chunks[0]):
            output = megatron.through(chunks[0], hidden)
        output.sum().backward()
    for layer_number in (3, 4):
        for routing_map in routed.maps[layer_number]:
            assert torch.equal(routing_map, sequences.expected(1, 1, layer_number - 1))


def test_a_chunk_other_than_the_one_that_runs_is_refused(sequences_of, chunks):
    (ticket,) = sequences_of(PIPELINED).add(6)
    replay = RouteReplay(chunks)
    with replay.schedule():
        with pytest.raises(ReplayError, match=r"layer_number 7 runs in .* \[3, 4\]"):
            with replay.micro_batch(ticket, chunk=chunks[0]):
                megatron.through(chunks[1], torch.randn(6, 1, megatron.HIDDEN))
        with pytest.raises(ReplayError, match="chunk is None: it is to be one of the 2"):
            with replay.micro_batch(ticket):
                pass


def test_a_chunk_may_be_given_wrapped(sequences, tokens):
    model = megatron.gpt(megatron.config())
    wrapped = torch.nn.Module()
    wrapped.module = model
    for inner, outer in ((model, wrapped), (wrapped, model)):
        replay = RouteReplay([inner])
        with replay.schedule(), replay.micro_batch(sequences.add(12), chunk=outer):
            megatron.logits(model, tokens)
        replay.close()


# -- who replays -----------------------------------------------------------------------------------


def test_passes_outside_of_micro_batches_choose_by_themselves(sequences, tokens):
    model = megatron.gpt(megatron.config())
    natively = megatron.logits(model, tokens)
    replay = RouteReplay(model)
    assert torch.equal(megatron.logits(model, tokens), natively)
    with replay.schedule():
        assert torch.equal(megatron.logits(model, tokens), natively)
        with replay.micro_batch(sequences.add(12)):
            assert not torch.equal(megatron.logits(model, tokens), natively)
        assert torch.equal(megatron.logits(model, tokens), natively)


def test_multi_token_prediction_and_discarded_models_are_left_alone(sequences, tokens):
    discarded = megatron.gpt(megatron.config(moe_enable_routing_replay=True))
    settings = megatron.config(mtp_num_layers=1, moe_enable_routing_replay=True)
    model = megatron.gpt(settings)
    of_megatron = list(RouterReplay.global_router_replay_instances)
    assert len(of_megatron) == 5
    replay = RouteReplay(model)
    assert of_megatron == RouterReplay.global_router_replay_instances
    *decoder, prediction = megatron.routers(model)
    assert [type(router.router_replay) for router in decoder] == [LayerReplay] * 2
    assert prediction.router_replay is of_megatron[-1]
    assert [each.router_replay for each in megatron.routers(discarded)] == of_megatron[:2]
    with replay.schedule(), replay.micro_batch(sequences.add(12)):
        megatron.loss(model, tokens).sum().backward()
    assert prediction.weight.grad.abs().sum() > 0


def test_megatrons_own_replay_goes_on_outside_and_after(sequences, tokens):
    model = megatron.gpt(megatron.config(moe_enable_routing_replay=True))
    own = list(RouterReplay.global_router_replay_instances)
    replay = RouteReplay(model)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    with replay.schedule(), replay.micro_batch(sequences.add(12)):
        megatron.logits(model, tokens)
    assert RouterReplay.get_recorded_data() == [None, None]
    megatron.logits(model, tokens)
    assert [each.shape for each in RouterReplay.get_recorded_data()] == [(12, TOP_K)] * 2
    replay.close()
    assert [router.router_replay for router in megatron.routers(model)] == own


# -- what does not fit -----------------------------------------------------------------------------


def forward(replay: RouteReplay, model: Any, sources: Any, count: int, **options: Any) -> None:
    with replay.schedule(), replay.micro_batch(sources, **options):
        megatron.logits(model, torch.arange(count)[None])


def test_a_model_without_experts_is_refused():
    with pytest.raises(ReplayError, match="no MoE router in GPTModel"):
        RouteReplay(megatron.gpt(megatron.config(num_moe_experts=None, moe_ffn_hidden_size=None)))


def test_a_stage_with_dense_layers_only_has_nothing_to_replay(sequences):
    model = megatron.gpt(megatron.config(moe_layer_freq=[0, 0, 0]))
    forward(RouteReplay(model), model, sequences.add(12), 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_router_load_balancing_type": "sinkhorn"}, "chooses without asking"),
        ({"moe_router_fusion": True}, "set moe_router_fusion=False"),
        ({"overlap_moe_expert_parallel_comm": True}, "schedule plans that mix micro-batches"),
    ],
)
def test_routers_that_would_not_ask_are_refused(settings, message):
    model = megatron.gpt(megatron.config())
    for router in megatron.routers(model):
        router.config = copy.copy(router.config)
        for name, value in settings.items():
            setattr(router.config, name, value)
    with pytest.raises(ReplayError, match=message):
        RouteReplay(model)


def test_a_second_replay_of_one_model_is_refused():
    model = megatron.gpt(megatron.config())
    first = RouteReplay(model)
    with pytest.raises(ReplayError, match="layer_number 2 replays already"):
        RouteReplay(model)
    first.close()
    RouteReplay(model)


def test_layers_that_did_not_ask_or_asked_twice_are_named(sequences, tokens):
    model = megatron.gpt(megatron.config())
    replay = RouteReplay(model)
    with replay.schedule():
        with pytest.raises(ReplayError, match=r"2 of 2 MoE layers did not ask .* \[2, 3\]"):
            with replay.micro_batch(sequences.add(12)):
                pass
        with replay.micro_batch(sequences.add(12)):
            megatron.logits(model, tokens)
            with pytest.raises(ReplayError, match="layer_number 2 runs a second time in one"):
                megatron.logits(model, tokens)


def test_a_micro_batch_has_its_place(sequences):
    replay = RouteReplay(megatron.gpt(megatron.config()))
    tickets = sequences.add(12)
    with pytest.raises(ReplayError, match="outside a schedule"):
        with replay.micro_batch(tickets):
            pass
    with replay.schedule(), pytest.raises(ReplayError, match="while another one is running"):
        with replay.micro_batch(tickets), replay.micro_batch(tickets):
            pass
    with replay.schedule(), pytest.raises(ReplayError, match="a schedule within a schedule"):
        with replay.schedule():
            pass
    with replay.schedule(), pytest.raises(ReplayError, match="routes of no sequences"):
        with replay.micro_batch([]):
            pass


def test_forwards_of_a_schedule_run_in_one_thread(sequences, tokens):
    model = megatron.gpt(megatron.config())
    replay, tickets = RouteReplay(model), sequences.add(12)

    def run() -> None:
        with replay.micro_batch(tickets):
            megatron.logits(model, tokens)

    with ThreadPoolExecutor(1) as other:
        with replay.schedule():
            run()
            with pytest.raises(ReplayError, match="run a schedule's forwards in one thread"):
                other.submit(run).result()
        with replay.schedule():
            other.submit(run).result()


def test_other_tokens_are_refused_with_their_number(sequences):
    model = megatron.gpt(megatron.config())
    replay = RouteReplay(model)
    with pytest.raises(ReplayError, match=r"layer 1 has 13 tokens on this rank.*2 sequences 12"):
        forward(replay, model, sequences.add(7, 5), 13)
    padded = Partition(batch_multiple=16)
    forward(replay, model, sequences.add(7, 5), 16, tokens=padded)


def test_sequences_side_by_side_need_one_length(sequences):
    model = megatron.gpt(megatron.config())
    replay = RouteReplay(model)
    tickets = sequences.add(5, 7)
    for sources, cut in (
        (tickets, None),
        (tickets[:1], Partition(sequence_multiple=6)),
        (tickets, Partition(sequence_multiple=6)),
        (tickets, Partition(cp_size=2, zigzag=False, sequence_multiple=12)),
    ):
        with replay.schedule(), pytest.raises(ReplayError, match="2 sequences side by side"):
            with replay.micro_batch(sources, tokens=cut):
                megatron.logits(model, torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (RouteLayout(EXPERTS, TOP_K, [0, 1], num_layers=3), r"of decoder layers \[2\].*\[0, 1\]"),
        (
            RouteLayout(EXPERTS, TOP_K, [1, 2], num_layers=6),
            "model counts 3 layers, the records' 6",
        ),
        (RouteLayout(EXPERTS, 2, [1, 2]), "layer 1 chooses 4 of 16 experts, the records have 2 of"),
        (RouteLayout(64, TOP_K, [1, 2]), "layer 1 chooses 4 of 16 experts, the records have 4 of"),
    ],
    ids=["layers", "number of layers", "top-k", "experts"],
)
def test_records_of_another_model_are_refused(sequences_of, layout, message):
    model = megatron.gpt(megatron.config())
    arena = sequences_of(layout).arena
    with arena.reserve("other", tokens=11) as slot:
        slot.rows[...] = routes(11, layout, 0)
    with pytest.raises(ReplayError, match=message):
        forward(RouteReplay(model), model, slot.ticket, 12)


def test_ids_out_of_range_are_refused(sequences):
    model = megatron.gpt(megatron.config())
    with sequences.arena.reserve("broken", tokens=11) as slot:
        slot.rows[...] = routes(11, LAYOUT, 0)
        slot.rows[3, 1, 2] = EXPERTS
    with pytest.raises(ReplayError, match="layer 2 has experts 0 to 15, its routes expert 16"):
        forward(RouteReplay(model), model, slot.ticket, 12)


def test_rows_that_name_an_expert_twice_are_refused(sequences):
    model = megatron.gpt(megatron.config())
    with sequences.arena.reserve("twice", tokens=11) as slot:
        slot.rows[...] = routes(11, LAYOUT, 0)
        slot.rows[5, 0] = [5, 7, 5, 6]
    with pytest.raises(ReplayError, match=r"layer 1: 1 rows .* token 5 .*: \[5, 7, 5, 6\]"):
        forward(RouteReplay(model), model, slot.ticket, 12)


def test_a_router_without_a_layer_number_is_refused():
    router = TopKRouter(megatron.config(), pg_collection=megatron.process_groups())
    with pytest.raises(ReplayError, match="a router without layer_number"):
        RouteReplay(router)
