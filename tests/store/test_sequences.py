"""Sequences as a trainer computes them: turns joined, tokens without a row padded."""

from __future__ import annotations

import numpy as np
import pytest
from actors import WIDE, add, pattern
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmroute
from shmroute import IncompleteRoutes, InvalidTicket, LayoutMismatch, Partition, read_batch
from shmroute.attached import attach
from shmroute.ticket import decode

torch = pytest.importorskip("torch")

DISTINCT = list(range(8))


@pytest.fixture
def seal(arena):
    """Seal a record of rows of tokens ``[start, end)``: ``seal(rid, start, end)``."""

    def sealed(rid, start, end, **sealing):
        record = arena.reserve(rid, tokens=end - start, start=start)
        record.rows[...] = pattern(rid, record.generation, end - start)
        record.seal(**sealing)
        return record

    return sealed


def leases_on(arena):
    return attach(arena.segment).leases.held()


# -- turns -------------------------------------------------------------------------------------


def test_turns_are_joined_to_the_rows_of_one_request(arena, seal):
    full = seal("full", 0, 40)
    turns = []
    for number, (start, end) in enumerate(((0, 9), (9, 25), (25, 40))):
        with arena.reserve(f"turn-{number}", tokens=end - start, start=start) as turn:
            turn.rows[...] = full.rows[start:end]
        turns.append(turn.ticket)
    joined, one = read_batch([turns]), read_batch(full.ticket)
    assert torch.equal(joined.rows, one.rows)
    assert joined.cu_seqlens.tolist() == one.cu_seqlens.tolist() == [0, 40]
    assert joined.lengths == one.lengths == (41,)
    assert joined.starts == one.starts == (0,)
    assert joined.rids == ("turn-2",)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_of_overlapping_turns_the_later_one_counts_and_the_last_one_ends(arena, data):
    expected, tickets, start, end = {}, [], 0, 0
    for number in range(data.draw(st.integers(1, 5), "turns")):
        start = data.draw(st.integers(start, end), "start")  # an overlap, never a gap
        end = start + data.draw(st.integers(1, 30), "tokens")
        record = arena.reserve(f"turn-{number}", tokens=end - start, start=start)
        record.rows[...] = pattern(f"turn-{number}", record.generation, end - start)
        record.seal()
        expected = {token: row for token, row in expected.items() if token < start}
        expected |= dict(zip(range(start, end), record.rows.copy(), strict=True))
        tickets.append(record.ticket)
    batch = read_batch([tickets])
    assert batch.rows.numpy().tolist() == [row.tolist() for _, row in sorted(expected.items())]
    assert batch.lengths == (end + 1,)
    shmroute.release(tickets)
    arena.writer.reclaim()


def test_lists_and_single_records_mix(seal):
    records = [seal("a", 0, 5), seal("b", 0, 3), seal("c", 3, 8), seal("d", 0, 2)]
    a, b, c, d = (record.ticket for record in records)
    batch = read_batch([a, (b, c), [d]])
    assert np.array_equal(batch.rows.numpy(), np.concatenate([record.rows for record in records]))
    assert batch.cu_seqlens.tolist() == [0, 5, 13, 15]
    assert batch.rids == ("a", "c", "d")
    assert len(batch) == 3


def test_turns_may_be_inline_and_empty(arena, seal):
    rows = pattern("inline", 0, 6)
    first = seal("first", 0, 4)
    empty = decode(arena.inline("empty", rows[:0], start=10))
    batch = read_batch([[first.ticket, arena.inline("inline", rows, start=4), empty]])
    assert np.array_equal(batch.rows.numpy(), np.concatenate([first.rows, rows]))
    assert batch.lengths == (11,)


def test_a_gap_between_turns_is_named_with_its_tokens(arena, seal):
    turns = [seal("a", 0, 9), seal("b", 10, 20)]
    with pytest.raises(ValueError, match=r"source 1: .*tokens \[9, 10\) have none") as caught:
        read_batch([seal("other", 0, 2).ticket, [turn.ticket for turn in turns]], pad="mask")
    assert "routed_experts_start_len=9" in str(caught.value)
    assert leases_on(arena) == 0


def test_turns_out_of_order_are_refused(arena, seal):
    turns = [seal("b", 9, 20).ticket, seal("a", 0, 9).ticket]
    with pytest.raises(ValueError, match="in the order of their start"):
        read_batch([turns])
    assert leases_on(arena) == 0


def test_turns_without_the_first_need_a_pad(seal):
    turns = [seal("a", 4, 9).ticket, seal("b", 9, 12).ticket]
    with pytest.raises(ValueError, match=r"tokens \[0, 4\) have none"):
        read_batch([turns])
    assert read_batch([turns], pad="mask").padding_mask.tolist() == [True] * 4 + [False] * 8 + [
        True
    ]


def test_a_sequence_of_no_records_is_refused(seal):
    with pytest.raises(ValueError, match="source 1 is a sequence of no records"):
        read_batch([seal("a", 0, 4).ticket, []])


def test_errors_name_the_turn(make_arena, seal):
    turns = [seal("a", 0, 4).ticket, seal("b", 4, 8).ticket]
    other = add(make_arena(WIDE), "wide", tokens=4).ticket
    with pytest.raises(LayoutMismatch, match=r"source 1\[0\] \(rid 'wide'\)"):
        read_batch([turns[0], [other, turns[1]]])
    with pytest.raises(ValueError, match=r"sources 0\[1\] and 1 are the same record"):
        read_batch([turns, turns[1]])


def test_a_ticket_that_lies_about_its_start_is_refused(arena, seal):
    turns = [seal("a", 0, 9), seal("b", 10, 20)]
    forged = decode(turns[1].ticket)._replace(start=9).encode()
    with pytest.raises(InvalidTicket, match="the ticket speaks of"):
        read_batch([[turns[0].ticket, forged]])
    assert leases_on(arena) == 0


@pytest.mark.parametrize("start", [1 << 17, (1 << 31) - 100])
def test_memory_is_not_taken_for_a_start_that_only_a_ticket_speaks_of(seal, start):
    forged = decode(seal("a", 0, 9).ticket)._replace(start=start).encode()
    with pytest.raises(InvalidTicket, match="the ticket speaks of"):
        read_batch(forged, pad="distinct")


# -- padding -----------------------------------------------------------------------------------


def test_a_padded_sequence_has_a_row_for_each_token(seal):
    records = [seal("a", 0, 7), seal("b", 3, 5)]
    batch = read_batch([record.ticket for record in records], pad="distinct")
    assert batch.cu_seqlens.tolist() == [0, 8, 14]
    assert batch.lengths == (8, 6)
    assert batch.starts == (0, 3)
    assert np.array_equal(batch.rows[:7].numpy(), records[0].rows)
    assert np.array_equal(batch.rows[11:13].numpy(), records[1].rows)
    padding = batch.rows[[7, 8, 9, 10, 13]]
    assert padding.tolist() == [[DISTINCT] * 4] * 5
    assert batch.padding_mask is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_may_be_minus_one(seal, dtype):
    record = seal("a", 2, 7)
    rows = read_batch(record.ticket, pad="minus_one", dtype=dtype).rows
    assert rows.dtype == dtype
    assert bool((rows[[0, 1, 7]] == -1).all())
    assert np.array_equal(rows[2:7].numpy(), record.rows)


def test_a_mask_says_which_rows_are_padding(seal):
    record = seal("a", 2, 7)
    batch = read_batch(record.ticket, pad="mask", tokens=Partition(sequence_multiple=5))
    assert batch.padding_mask.dtype == torch.bool
    assert batch.padding_mask.tolist() == [True] * 2 + [False] * 5 + [True] * 3
    assert batch.rows[batch.padding_mask].tolist() == [[DISTINCT] * 4] * 5


@pytest.mark.parametrize("dtype", [None, torch.int32])
def test_uint16_rows_are_padded(make_arena, dtype):
    record = add(make_arena(WIDE), "r")
    rows = read_batch(record.ticket, pad="distinct", dtype=dtype).rows
    assert np.array_equal(rows[:-1].numpy(), record.rows)
    assert rows.numpy()[-1].tolist() == [DISTINCT] * 4


def test_padding_of_the_batch_lies_behind_the_last_sequence(seal):
    tickets = [seal("a", 0, 7).ticket, seal("b", 0, 2).ticket]
    batch = read_batch(tickets, pad="mask", tokens=Partition(batch_multiple=16))
    assert len(batch.rows) == 16
    assert batch.cu_seqlens.tolist() == [0, 8, 11]
    cut = read_batch(
        tickets, pad="mask", tokens=Partition(batch_multiple=16, pad_last_sequence=True)
    )
    assert cut.cu_seqlens.tolist() == [0, 8, 16]
    assert torch.equal(cut.rows, batch.rows)
    assert torch.equal(cut.padding_mask, batch.padding_mask)


def test_missing_rows_are_padded_and_still_named(arena, seal):
    record = seal("a", 0, 10, missing=[(2, 4), (7, 8)])
    tokens = Partition(cp_rank=0, cp_size=2, sequence_multiple=12)  # tokens 0 to 2 and 9 to 11
    with pytest.raises(IncompleteRoutes):
        read_batch(record.ticket, pad="mask", tokens=tokens)
    batch = read_batch(record.ticket, pad="mask", tokens=tokens, allow_missing=True)
    assert batch.missing == ((2, 3),)
    assert batch.padding_mask.tolist() == [False, False, True, False, True, True]
    assert batch.rows[2].tolist() == [DISTINCT] * 4
    assert np.array_equal(batch.rows[[0, 1, 3]].numpy(), record.rows[[0, 1, 9]])


def test_missing_rows_of_a_turn_that_a_later_one_has_are_not_missing(seal):
    turns = [seal("a", 0, 10, missing=[(2, 4), (6, 8)]).ticket, seal("b", 3, 9).ticket]
    assert read_batch([turns], allow_missing=True).missing == ((2, 3),)


def test_a_rank_without_a_token_gets_padding_alone(seal):
    tokens = Partition(sp_rank=3, sp_size=4, batch_multiple=64)
    batch = read_batch(seal("a", 0, 7).ticket, pad="mask", tokens=tokens)
    assert batch.cu_seqlens.tolist() == [0, 0]
    assert batch.padding_mask.tolist() == [True] * 16


def test_every_rank_meets_the_same_errors(arena, seal):
    """Else some would go on to the next collective and wait there for the others."""
    tickets = [seal("a", 0, 7).ticket, seal("gone", 0, 7).ticket]
    shmroute.release(tickets[1])
    for rank in range(2):
        with pytest.raises(shmroute.RouteGone):
            read_batch(tickets, pad="mask", tokens=Partition(sp_rank=rank, sp_size=2))
    assert leases_on(arena) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pad": "zeros"}, "pad is 'zeros': one of distinct, minus_one, mask"),
        ({"pad": "minus_one"}, r"-1 would be an expert's id. Give dtype=torch\.int32"),
        ({"tokens": slice(0, 3), "pad": "mask"}, "tokens is a slice: give a shmroute.Partition"),
        ({"tokens": Partition()}, "without pad: .* a sequence's last token has no row"),
    ],
)
def test_pads_that_cannot_be_are_refused(seal, options, said):
    with pytest.raises(ValueError, match=said):
        read_batch(seal("a", 0, 7).ticket, **options)


def test_sequences_are_released_as_they_are_read(arena, seal):
    sources = [seal("a", 0, 5).ticket, [seal("b", 0, 3).ticket, seal("c", 3, 8).ticket]]
    read_batch(sources)
    assert shmroute.release(sources) == 3
    assert arena.writer.reclaim() == 3
