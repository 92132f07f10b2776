"""What each rank of a trainer reads, and that all ranks' shares together are the whole."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from actors import LAYOUT, WIDE, pattern
from hypothesis import given, settings
from hypothesis import strategies as st

from shmroute import Partition, RouteLayout, read_batch

torch = pytest.importorskip("torch")

PADDING = -1


# -- the cut, beside token ids that are cut as trainers cut theirs -----------------------------


def labels_of(sequence, length):
    """One number for each token of a sequence, which no other token of a batch has."""
    return sequence * 100_000 + np.arange(length)


def padded(labels, multiple):
    return np.pad(labels, (0, -len(labels) % multiple), constant_values=PADDING)


def computed(partition, lengths):
    """Labels of the tokens that a rank computes, padding as ``PADDING``."""
    cp, sp = partition.cp_size, partition.sp_size
    mirrored = partition.zigzag and cp > 1
    multiple = math.lcm(partition.sequence_multiple, 2 * cp if mirrored else 1)
    even = math.lcm(partition.batch_multiple, sp)
    batch = [padded(labels_of(*one), multiple) for one in enumerate(lengths)]
    if partition.pad_last_sequence:
        total = sum(map(len, batch))
        missing = -total % math.lcm(multiple, cp * even)
        batch[-1] = padded(batch[-1], len(batch[-1]) + missing)
    if mirrored:
        mine = [partition.cp_rank, 2 * cp - 1 - partition.cp_rank]
        rows = np.concatenate([one.reshape(2 * cp, -1)[mine].ravel() for one in batch])
    else:
        rows = np.split(padded(np.concatenate(batch), cp * even), cp)[partition.cp_rank]
    return np.split(padded(rows, even), sp)[partition.sp_rank]


def ranks(cp_size=1, sp_size=1, **how):
    for cp_rank, sp_rank in itertools.product(range(cp_size), range(sp_size)):
        yield Partition(cp_rank=cp_rank, cp_size=cp_size, sp_rank=sp_rank, sp_size=sp_size, **how)


LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=6)
HOW = st.fixed_dictionaries(
    {
        "cp_size": st.integers(1, 5),
        "sp_size": st.integers(1, 4),
        "zigzag": st.booleans(),
        "sequence_multiple": st.sampled_from([1, 2, 3, 16]),
        "batch_multiple": st.sampled_from([1, 4, 10, 64]),
        "pad_last_sequence": st.booleans(),
    }
)


@settings(deadline=None)
@given(lengths=LENGTHS, how=HOW)
def test_a_rank_computes_the_tokens_that_trainers_give_it(lengths, how):
    for partition in ranks(**how):
        cut = partition.cut(lengths)
        rows = np.full(cut.rows, PADDING)
        for to, sequence, first, end in cut.pieces:
            labels = padded(labels_of(sequence, lengths[sequence]), max(end, 1))[first:end]
            rows[to : to + end - first] = labels
        assert np.array_equal(rows, computed(partition, lengths)), partition


@settings(deadline=None)
@given(lengths=LENGTHS, how=HOW)
def test_each_token_is_computed_by_one_rank_and_all_ranks_have_as_many_rows(lengths, how):
    cuts = [partition.cut(lengths) for partition in ranks(**how)]
    assert len({cut.rows for cut in cuts}) == 1
    tokens = [
        (sequence, token)
        for cut in cuts
        for _, sequence, first, end in cut.pieces
        for token in range(first, min(end, lengths[sequence]))
    ]
    assert sorted(tokens) == [
        (sequence, token) for sequence, length in enumerate(lengths) for token in range(length)
    ]


def test_without_parallelism_a_batch_is_its_sequences():
    assert Partition().cut([5, 3]) == (8, ((0, 0, 0, 5), (5, 1, 0, 3)))


def test_sequences_may_all_be_padded_to_one_length():
    cut = Partition(cp_rank=0, cp_size=2, sequence_multiple=16).cut([5, 16, 1])
    assert cut.rows == 3 * 16 / 2


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"cp_rank": 4, "cp_size": 4}, "cp_rank is 4 with a cp_size of 4: ranks are 0 to 3"),
        ({"sp_rank": -1}, "sp_rank is -1 with a sp_size of 1"),
        ({"cp_size": 0}, "cp_size is 0"),
        ({"sequence_multiple": 0}, "sequence_multiple is 0"),
        ({"batch_multiple": -128}, "batch_multiple is -128"),
        ({"cp_size": 2.0}, r"cp_size is 2\.0: it must be an integer"),
        ({"sequence_multiple": None}, "sequence_multiple is None: it must be an integer"),
        ({"cp_rank": "0"}, "cp_rank is '0': it must be an integer"),
    ],
)
def test_a_partition_that_cannot_be_is_refused_with_figures(how, said):
    with pytest.raises(ValueError, match=said):
        Partition(**how)


# -- reading: every rank's share, put together -------------------------------------------------


def seal(arena, rid, tokens, start=0, **sealing):
    record = arena.reserve(rid, tokens=tokens, start=start)
    routes = arena.memory.description.routes
    record.rows[...] = pattern(rid, record.generation, tokens, routes)
    record.seal(**sealing)
    return record


@pytest.fixture(params=[LAYOUT, WIDE], ids=["uint8", "uint16"])
def batch_of(make_arena, request):
    """Sources of ragged sequences, and the rows of all their tokens, padding as arange."""
    arena = make_arena(request.param)
    layout = request.param
    row = np.broadcast_to(np.arange(layout.top_k, dtype=layout.dtype), layout.row_shape)
    records = [seal(arena, f"rid-{number}", tokens) for number, tokens in enumerate((37, 1, 90))]
    turns = [seal(arena, "turn-0", 20), seal(arena, "turn-1", 31, start=20)]
    late = seal(arena, "late", 9, start=12)
    sources = [*(one.ticket for one in records), [one.ticket for one in turns], late.ticket]
    whole = [
        *(np.concatenate([one.rows, row[None]]) for one in records),
        np.concatenate([*(one.rows for one in turns), row[None]]),
        np.concatenate([np.repeat(row[None], 12, 0), late.rows, row[None]]),
    ]
    return sources, whole, row


LAYOUTS = [
    {},
    {"cp_size": 2},
    {"cp_size": 4, "sp_size": 2},
    {"cp_size": 2, "sp_size": 4, "batch_multiple": 128},  # slime, miles
    {"cp_size": 2, "sp_size": 2, "sequence_multiple": 2 * 2 * 2},  # verl
    {
        "cp_size": 2,
        "sp_size": 2,
        "sequence_multiple": 16,
        "batch_multiple": 512,
        "pad_last_sequence": True,
    },
    {"cp_size": 3, "zigzag": False},  # Ulysses
    {"cp_size": 2, "sp_size": 2, "zigzag": False, "batch_multiple": 32},
    {"sp_size": 8},
    {"cp_size": 2, "sequence_multiple": 96},  # padded batches
]


@pytest.mark.parametrize("how", LAYOUTS, ids=str)
@pytest.mark.parametrize("stages", [1, 2])
def test_all_ranks_shares_together_are_the_whole(batch_of, how, stages):
    sources, whole, row = batch_of
    lengths = [len(rows) for rows in whole]
    seen = {}
    for partition, stage in itertools.product(ranks(**how), range(stages)):
        layers = slice(stage * 4 // stages, (stage + 1) * 4 // stages)
        batch = read_batch(sources, layers=layers, tokens=partition, pad="mask", dtype=torch.int32)
        labels = computed(partition, lengths)
        assert batch.lengths == tuple(lengths)
        assert batch.rows.shape == (len(labels), 4 // stages, 8)
        for label, got in zip(labels.tolist(), batch.rows.numpy(), strict=True):
            if label == PADDING:
                assert np.array_equal(got, row[layers])
            else:
                assert (label, stage) not in seen
                seen[label, stage] = got
        assert_sequences_lie_in_place(batch.cu_seqlens, labels)
    for sequence, stage in itertools.product(range(len(whole)), range(stages)):
        layers = slice(stage * 4 // stages, (stage + 1) * 4 // stages)
        got = [seen.pop((int(label), stage)) for label in labels_of(sequence, lengths[sequence])]
        assert np.array_equal(np.array(got), whole[sequence][:, layers])
    assert not seen


def assert_sequences_lie_in_place(cu_seqlens, labels):
    bounds = cu_seqlens.tolist()
    for sequence, (first, end) in enumerate(itertools.pairwise(bounds)):
        here = labels[first:end]
        assert set(here[here != PADDING] // 100_000) <= {sequence}
    assert all(labels[bounds[-1] :] == PADDING)


def test_pages_of_other_tokens_and_layers_are_not_touched(make_arena, actor):
    """Every other page of the heap is made unreadable while a rank reads."""
    layout = RouteLayout(256, 256, range(64))  # a row of 4 pages: each stage's layers are one
    arena = make_arena(layout, capacity="16MiB")
    for rid, tokens in (("a", 200), ("b", 120)):
        with arena.reserve(rid, tokens=tokens) as record:
            record.rows[...] = np.arange(tokens)[:, None, None] + np.arange(64)[:, None]
    rank = actor("""
        import ctypes, itertools, mmap
        from shmroute.attached import attach
        libc = ctypes.CDLL(None, use_errno=True)

        def protect(first, end, readable):
            size = ctypes.c_size_t(end - first)
            if libc.mprotect(ctypes.c_void_p(first), size, mmap.PROT_READ * readable):
                raise OSError(ctypes.get_errno(), "mprotect")

        def pages(first, end):
            return range(first // 4096, -(-end // 4096))

        records = [ShmRouteReader(rid, arena=NAME) for rid in "ab"]
        memory = records[0].stored().arena.memory
        heap = memory.heap_address, memory.heap_address + len(memory.heap)
        metadata = {
            page
            for record in records
            for page in pages(
                memory.heap_address + record._row.metadata_offset,
                memory.heap_address + record._row.metadata_offset + record._row.metadata_bytes,
            )
        }
        lengths = [record.tokens + 1 for record in records]

        def share(partition, stage):
            return {
                page
                for _, number, first, end in partition.cut(lengths).pieces
                for token in range(first, min(end, records[number].tokens))
                for at in [records[number].stored().address + token * 16384 + stage * 4096]
                for page in pages(at, at + 4096)
            }

        def read(partition, stage):
            return read_batch(
                ["a", "b"], arena=NAME, layers=slice(16 * stage, 16 * stage + 16),
                tokens=partition, pad="distinct",
            )

        pipe = os.pipe()[1]
        read(Partition(), 0)  # torch is loaded
        for zigzag, rank, stage in itertools.product((True, False), range(4), range(4)):
            partition = Partition(cp_rank=rank // 2, cp_size=2, zigzag=zigzag,
                                  sp_rank=rank % 2, sp_size=2)
            expected = read(partition, stage).rows
            mine = share(partition, stage)
            for page in pages(*heap):
                protect(page * 4096, page * 4096 + 4096, page in mine | metadata)
            again = read(partition, stage).rows
            away = records[0].stored().address + (stage ^ 1) * 4096 + 4095
            readable = libc.write(pipe, ctypes.c_void_p(away), ctypes.c_size_t(1)) == 1
            protect(*heap, True)
            say(equal=bool((again == expected).all()), rows=len(again), pages=len(mine),
                others_readable=readable)
    """)
    for _ in range(2 * 4 * 4):
        said = rank.hear()
        assert said["equal"]
        assert not said["others_readable"]
        # Rows begin anywhere in a page: a stage's 4096 bytes of each lie in up to two.
        assert said["rows"] - 2 <= said["pages"] <= 2 * said["rows"]
