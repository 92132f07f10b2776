"""``read_batch``: packed rows of several records, on the CPU."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from actors import LAYOUT, WIDE, add, pattern

import shmroute
from shmroute import (
    IncompleteRoutes,
    InvalidTicket,
    LayoutMismatch,
    RouteGone,
    RouteLayout,
    RouteTimeout,
    ShmRouteReader,
    read_batch,
    selection,
)
from shmroute.attached import attach
from shmroute.ticket import decode

torch = pytest.importorskip("torch")

WIDEST = RouteLayout(65536, 3, range(5), model="tests/store, 65536 experts")


@pytest.fixture
def records(arena):
    return [add(arena, f"rid-{index}", tokens=tokens) for index, tokens in enumerate((7, 20, 3))]


@pytest.fixture
def tickets(records):
    return [record.ticket for record in records]


def leases_on(arena):
    """Slots of the arena that this process holds."""
    return attach(arena.segment).leases.held()


# -- what comes out ----------------------------------------------------------------------------


def test_a_batch_is_the_records_one_behind_the_other(records, tickets):
    batch = read_batch(tickets)
    assert batch.rows.dtype == torch.uint8
    assert batch.rows.is_contiguous()
    assert np.array_equal(batch.rows.numpy(), np.concatenate([record.rows for record in records]))
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, 7, 27, 30]
    assert batch.rids == ("rid-0", "rid-1", "rid-2")
    assert batch.layer_ids == (0, 1, 2, 3)
    assert batch.missing == ()
    assert len(batch) == 3


def test_a_batch_says_which_token_each_record_begins_with(arena):
    for rid, start in (("a", 0), ("b", 12)):
        with arena.reserve(rid, tokens=2, start=start) as record:
            record.rows[...] = 1
    assert read_batch(["a", "b"], arena=arena.name).starts == (0, 12)


def test_sources_may_be_rids_tickets_and_responses(arena, records, tickets, text):
    mixed = ["rid-0", tickets[1], {"meta_info": {"routed_experts": text(tickets[2])}}]
    batch = read_batch(mixed, arena=arena.name)
    assert torch.equal(batch.rows, read_batch(tickets).rows)


def test_a_single_source_is_a_batch_of_one(records, tickets):
    batch = read_batch(tickets[1])
    assert batch.cu_seqlens.tolist() == [0, 20]
    assert np.array_equal(batch.rows.numpy(), records[1].rows)


@pytest.mark.parametrize("nothing", [None, 5, 1.5, object()], ids=lambda it: type(it).__name__)
def test_what_is_no_source_is_refused_by_its_type(nothing):
    with pytest.raises(InvalidTicket, match=rf"a {type(nothing).__name__} is no rid, ticket"):
        read_batch(nothing)


def test_a_decoded_ticket_is_a_batch_of_one(records, tickets):
    assert torch.equal(read_batch(decode(tickets[1])).rows, read_batch(tickets[1]).rows)


def test_inline_and_empty_records_mix_with_mapped_ones(arena, records, tickets):
    rows = pattern("inline", 0, 5)
    mixed = [
        arena.inline("empty", rows[:0]),
        tickets[0],
        arena.inline("inline", rows),
        tickets[2],
    ]
    batch = read_batch(mixed)
    expected = np.concatenate([records[0].rows, rows, records[2].rows])
    assert np.array_equal(batch.rows.numpy(), expected)
    assert batch.cu_seqlens.tolist() == [0, 0, 7, 12, 15]


def test_inline_rows_may_lie_at_any_address(make_arena):
    arena = make_arena(RouteLayout(256, 8, range(6), model="tests"))
    record = decode(arena.inline("inline", np.zeros((300, 6, 8), dtype=np.uint8)))
    memory = np.random.default_rng(3).integers(0, 256, record.rows.nbytes + 16, dtype=np.uint8)
    for offset in (0, 1, 8, 15):
        rows = memory[offset : offset + record.rows.nbytes].reshape(record.rows.shape)
        moved = dataclasses.replace(record, rows=rows)
        for layers in (slice(None), slice(0, 2), slice(2, 6)):
            assert np.array_equal(read_batch(moved, layers=layers).rows.numpy(), rows[:, layers])


def test_a_batch_of_empty_records_is_empty(arena):
    nothing = pattern("r", 0, 5)[:0]
    batch = read_batch([arena.inline("a", nothing), arena.inline("b", nothing)], layers=[1, 3])
    assert batch.rows.shape == (0, 2, 8)
    assert batch.cu_seqlens.tolist() == [0, 0, 0]


def test_records_of_several_arenas_make_one_batch(make_arena):
    one, other = make_arena(), make_arena()
    first, second = add(one, "a"), add(other, "b")
    batch = read_batch([first.ticket, second.ticket])
    assert np.array_equal(batch.rows.numpy(), np.concatenate([first.rows, second.rows]))


@pytest.mark.parametrize("layout", [LAYOUT, WIDE, WIDEST], ids=["uint8", "uint16", "65536"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_are_widened_exactly(make_arena, layout, dtype):
    record = add(make_arena(layout), "r", tokens=200)
    assert int(record.rows.max()) > 0.9 * layout.num_experts
    batch = read_batch(record.ticket, dtype=dtype)
    assert batch.rows.dtype == dtype
    assert np.array_equal(batch.rows.numpy(), record.rows)


def test_wide_ids_as_stored_are_uint16(make_arena):
    record = add(make_arena(WIDEST), "r", tokens=200)
    batch = read_batch(record.ticket)
    assert batch.rows.dtype == torch.uint16
    assert np.array_equal(batch.rows.numpy(), record.rows)


@pytest.mark.parametrize("pattern", [(1, 0, 0, 0, 0, 0, 0xF0, 0x7F), (0, 0, 0, 0, 0, 0, 0, 0x80)])
def test_bytes_that_are_no_numbers_to_a_float_stay_what_they_are(make_arena, pattern):
    """Words of 16 bytes are doubles to torch: a signalling NaN, a negative zero."""
    arena = make_arena(RouteLayout(256, 8, range(6)))
    with arena.reserve("odd", tokens=50) as record:
        record.rows[...] = np.array(pattern, dtype=np.uint8)
    for layers in (None, slice(2, 4), [1]):
        rows = read_batch(record.ticket, layers=layers).rows
        assert (rows.numpy() == np.array(pattern, dtype=np.uint8)).all()


def test_a_batch_is_writable_and_a_copy(records, tickets):
    batch = read_batch(tickets)
    batch.rows.fill_(9)
    assert np.array_equal(
        records[0].rows, pattern("rid-0", records[0].generation, records[0].tokens)
    )


# -- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers",
    [
        slice(1, 3),
        slice(0, 4),
        slice(-1, None),
        slice(None, None, 2),
        slice(None, None, -1),
        [0],
        [3, 1],
        [-1, 0, 1],
        range(2, 4),
        np.array([2, 0]),
    ],
)
def test_layers_are_positions_on_axis_1(make_arena, layers):
    records = [add(make_arena(WIDE), rid) for rid in ("a", "b")]
    picked = layers if isinstance(layers, slice) else list(layers)
    batch = read_batch([record.ticket for record in records], layers=layers, dtype=torch.int64)
    expected = np.concatenate([record.rows[:, picked] for record in records])
    assert np.array_equal(batch.rows.numpy(), expected)
    assert batch.layer_ids == tuple(np.array(WIDE.layer_ids)[picked])


@pytest.mark.parametrize(
    "layers",
    [
        slice(2, 2),
        slice(4, 8),
        slice(2, 5),
        slice(-5, 2),
        slice(0.0, 2),
        slice(0, 2, 1.0),
        [],
        [4],
        [-5],
        [1, 1],
        [1, -3],
        [0.0],
        ["0"],
        {0, 1},
        slice(0, 2, 0),
        [None],
        1.5,
    ],
)
def test_layers_that_cannot_be_are_refused_with_figures(arena, tickets, layers):
    with pytest.raises(ValueError, match="layers"):
        read_batch(tickets, layers=layers)
    assert leases_on(arena) == 0


@pytest.mark.parametrize(
    "mask", [[True, False], np.array([True, False]), torch.tensor([True, False])], ids=type
)
def test_a_mask_of_layers_is_refused(arena, tickets, mask):
    with pytest.raises(ValueError, match=r"are a mask: give positions, 0 to 3"):
        read_batch(tickets, layers=mask)


def test_a_single_position_is_refused(tickets):
    with pytest.raises(ValueError, match=r"layers 2: give several positions, or \[2\] for one"):
        read_batch(tickets, layers=2)


def test_neighbouring_layers_are_read_as_one_run():
    assert selection.runs([2, 3, 4, 0, 7, 8]) == ((0, 2, 5), (3, 0, 1), (4, 7, 9))


# -- memory of the caller's --------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, WIDE, WIDEST], ids=["uint8", "uint16", "65536"])
@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("layers", [None, slice(1, 3), [3, 0]], ids=["all", "neighbours", "two"])
def test_rows_go_into_memory_that_is_given(make_arena, layout, dtype, layers):
    arena = make_arena(layout)
    tickets = [add(arena, rid, tokens=tokens).ticket for rid, tokens in (("a", 150), ("b", 61))]
    expected = read_batch(tickets, layers=layers, dtype=dtype, pad="distinct")
    spare = 3
    shape = len(expected.rows) + spare, *expected.rows.shape[1:]
    out = torch.full(shape, 77, dtype=torch.int64).to(expected.rows.dtype)
    batch = read_batch(tickets, layers=layers, pad="distinct", out=out)
    assert batch.rows.data_ptr() == out.data_ptr()
    assert batch.rows.dtype == expected.rows.dtype
    assert np.array_equal(batch.rows.numpy(), expected.rows.numpy())
    assert batch.cu_seqlens.tolist() == expected.cu_seqlens.tolist()
    assert (out.numpy()[-spare:] == 77).all(), "rows behind the batch were written"


def test_memory_that_is_long_enough_serves_batch_after_batch(records, tickets):
    out = torch.empty((40, 4, 8), dtype=torch.int32)
    for some in (tickets, tickets[:1], tickets[1:]):
        batch = read_batch(some, out=out)
        assert torch.equal(batch.rows, read_batch(some, dtype=torch.int32).rows)


@pytest.mark.parametrize("first", range(9))
def test_memory_may_begin_anywhere(records, tickets, first):
    memory = torch.empty(first + 30 * 32, dtype=torch.uint8)
    within = memory[first:].view(30, 4, 8)
    alone = torch.from_numpy(memory.numpy()[first:]).view(30, 4, 8)
    for out in (within, alone):
        assert torch.equal(read_batch(tickets, out=out.fill_(255)).rows, read_batch(tickets).rows)


def test_a_batch_of_no_rows_takes_nothing_of_the_memory(arena):
    nothing = arena.inline("a", pattern("r", 0, 5)[:0])
    out = torch.full((2, 4, 8), 7, dtype=torch.uint8)
    assert read_batch([nothing], out=out).rows.shape == (0, 4, 8)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        (np.empty((30, 4, 8), np.uint8), {}, r"give a contiguous tensor \[rows, layers, top_k\]"),
        (torch.empty(30, 32, dtype=torch.uint8), {}, r"out is \(30, 32\), strides \(32, 1\)"),
        (torch.empty(30, 4, 16, dtype=torch.uint8)[..., :8], {}, r"strides \(64, 16, 1\)"),
        (torch.empty(29, 4, 8, dtype=torch.uint8), {}, r"\(29, 4, 8\), the batch \(30, 4, 8\)"),
        (torch.empty(30, 3, 8, dtype=torch.uint8), {}, r"\(30, 3, 8\), the batch \(30, 4, 8\)"),
        (torch.empty(30, 4, 8, dtype=torch.uint8), {"layers": [0]}, r"the batch \(30, 1, 8\)"),
        (torch.empty(30, 4, 8, dtype=torch.uint16), {}, "out is uint16, the records are uint8"),
        (torch.empty(30, 4, 8, dtype=torch.int8), {}, "int8"),
        (torch.empty(30, 4, 8, dtype=torch.int32), {"dtype": torch.int64}, "dtype says"),
        (torch.empty(30, 4, 8, dtype=torch.uint8), {"dtype": torch.int32}, "dtype says"),
        (torch.empty(30, 4, 8, dtype=torch.int32, device="meta"), {}, "device meta"),
        (torch.empty(30, 4, 8, dtype=torch.int32), {"device": "meta"}, "device meta"),
        (torch.empty(30, 4, 8, dtype=torch.uint8), {"pad": "minus_one"}, "pad='minus_one'"),
    ],
)
def test_memory_that_cannot_hold_the_batch_is_refused(arena, tickets, out, options, message):
    with pytest.raises(ValueError, match=message):
        read_batch(tickets, out=out, **options)
    assert leases_on(arena) == 0


# -- leases ------------------------------------------------------------------------------------


def test_a_batch_on_the_cpu_keeps_no_lease(arena, tickets):
    batch = read_batch(tickets)
    assert leases_on(arena) == 0
    assert shmroute.release(tickets) == 3
    assert arena.writer.reclaim() == 3
    assert len(batch.rows) == 30


@pytest.fixture
def failing(arena, make_arena, records):
    """Sources that end a batch half way, by name, and the error that each gives."""
    other = RouteLayout(256, 8, range(3), model="another model")
    gone = add(arena, "gone")
    shmroute.release(gone.ticket)
    return {
        "gone": (gone.ticket, RouteGone),
        "garbage": (b"garbage", InvalidTicket),
        # Found when its record's turn comes: until then only its number of rows is looked at.
        "odd generation": (decode(gone.ticket)._replace(generation=7).encode(), InvalidTicket),
        "unsealed": (arena.reserve("unsealed", tokens=3).ticket, RouteTimeout),
        "incomplete": (add(arena, "holes", missing=[(2, 4)]).ticket, IncompleteRoutes),
        "another model": (add(make_arena(other), "other").ticket, LayoutMismatch),
        "another dtype": (add(make_arena(WIDE), "wide").ticket, LayoutMismatch),
        "twice": (records[0].ticket, ValueError),
        "no source": (17, InvalidTicket),
    }


@pytest.mark.parametrize(
    "what",
    [
        "gone",
        "garbage",
        "odd generation",
        "unsealed",
        "incomplete",
        "another model",
        "another dtype",
        "twice",
        "no source",
    ],
)
def test_an_error_half_way_leaves_no_lease(arena, tickets, failing, what):
    source, expected = failing[what]
    with pytest.raises(expected) as caught:
        read_batch([*tickets, source, tickets[0]], timeout=0.01)
    assert caught.value.__traceback__ is not None  # alive, with every frame of it
    assert leases_on(arena) == 0


def test_an_error_while_rows_are_copied_leaves_no_lease(arena, tickets):
    class Interrupted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function is torch.Tensor.copy_:
                raise MemoryError("as if it were")
            return function(*arguments, **(options or {}))

    with pytest.raises(MemoryError) as caught, Interrupted():
        read_batch(tickets)
    assert caught.value.__traceback__ is not None
    assert leases_on(arena) == 0


# -- errors ------------------------------------------------------------------------------------


def test_records_of_different_models_are_named_with_figures(make_arena):
    narrow, wide = add(make_arena(), "a"), add(make_arena(WIDE), "b")
    with pytest.raises(LayoutMismatch) as caught:
        read_batch([narrow.ticket, wide.ticket])
    said = str(caught.value)
    for part in ("source 0 (rid 'a')", "top-8 of 256", "source 1 (rid 'b')", "top-8 of 512"):
        assert part in said


def test_the_model_s_name_may_differ(make_arena):
    layouts = [RouteLayout(256, 8, range(4), model=path) for path in ("/a/model", "org/model")]
    records = [add(make_arena(layout), rid) for layout, rid in zip(layouts, "ab", strict=True)]
    assert len(read_batch([record.ticket for record in records])) == 2


def test_the_same_record_twice_is_refused(arena, tickets):
    with pytest.raises(ValueError, match=r"sources 0 and 3 are the same record, of rid 'rid-0'"):
        read_batch([*tickets, "rid-0"], arena=arena.name)
    inline = arena.inline("inline", pattern("inline", 0, 5))
    with pytest.raises(ValueError, match="sources 0 and 1 are the same record"):
        read_batch([inline, inline])


def test_two_records_of_one_rid_are_two_records(arena):
    turns = [add(arena, "r", tokens=tokens) for tokens in (4, 9)]
    assert read_batch([turn.ticket for turn in turns]).cu_seqlens.tolist() == [0, 4, 13]


def test_no_sources_are_refused():
    with pytest.raises(ValueError, match="no sources"):
        read_batch([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int16, "int32"])
def test_dtypes_that_no_trainer_indexes_with_are_refused(tickets, dtype):
    with pytest.raises(ValueError, match=r"torch\.int32, torch\.int64"):
        read_batch(tickets, dtype=dtype)


def test_devices_other_than_cpu_and_cuda_are_refused(tickets):
    with pytest.raises(ValueError, match="device meta"):
        read_batch(tickets, device="meta")


@pytest.mark.parametrize("tokens", [2, 4, 4000])
def test_a_ticket_that_lies_about_its_rows_is_refused(arena, tickets, tokens):
    forged = decode(tickets[2])._replace(tokens=tokens).encode()
    with pytest.raises(InvalidTicket, match="the ticket speaks of"):
        read_batch([tickets[0], forged, tickets[1]])
    assert leases_on(arena) == 0


@pytest.mark.parametrize("tokens", [1 << 17, (1 << 31) - 100])
def test_memory_is_not_taken_for_rows_that_only_a_ticket_speaks_of(tickets, tokens):
    forged = decode(tickets[1])._replace(tokens=tokens).encode()
    with pytest.raises(InvalidTicket, match="the ticket speaks of"):
        read_batch([tickets[0], forged])


def test_missing_rows_are_ranges_of_the_batch(arena):
    tickets = [
        add(arena, "a", tokens=10).ticket,
        add(arena, "b", tokens=10, missing=[(2, 4), (9, 10)]).ticket,
        add(arena, "c", tokens=10, missing=[(0, 1)]).ticket,
    ]
    with pytest.raises(IncompleteRoutes, match="'b' misses 3 of 10 rows"):
        read_batch(tickets)
    assert read_batch(tickets, allow_missing=True).missing == ((12, 14), (19, 20), (20, 21))


def test_the_timeout_is_for_all_records_together(arena):
    waiting = [arena.reserve(f"unsealed-{index}", tokens=3).ticket for index in range(8)]
    began = time.monotonic()
    with pytest.raises(RouteTimeout):
        read_batch(waiting, timeout=0.2)
    assert time.monotonic() - began < 1.0


def test_records_that_are_still_being_written_are_waited_for(arena):
    records = [arena.reserve(f"rid-{index}", tokens=4) for index in range(3)]

    def seal():
        for record in reversed(records):
            time.sleep(0.02)
            record.rows[...] = record.slot
            record.seal()

    sealing = threading.Thread(target=seal)
    sealing.start()
    batch = read_batch([record.ticket for record in records])
    sealing.join()
    assert batch.rows[:, 0, 0].tolist() == [
        slot for record in records for slot in [record.slot] * 4
    ]


# -- one record --------------------------------------------------------------------------------


def test_a_tensor_as_stored_on_the_cpu_is_not_copied(records):
    with ShmRouteReader(records[0].ticket) as routes:
        assert routes.torch("cpu").data_ptr() == routes.torch().data_ptr()


@pytest.mark.parametrize("layout", [LAYOUT, WIDE, WIDEST], ids=["uint8", "uint16", "65536"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_tensor_of_another_dtype_is_an_exact_copy(make_arena, layout, dtype):
    arena = make_arena(layout)
    record = add(arena, "r", tokens=50)
    with ShmRouteReader(record.ticket) as routes:
        tensor = routes.torch(dtype=dtype)
    assert tensor.dtype == dtype
    assert np.array_equal(tensor.numpy(), record.rows)
    assert leases_on(arena) == 0


def test_an_inline_record_is_a_tensor_of_any_dtype(arena):
    rows = pattern("r", 0, 5)
    with ShmRouteReader(arena.inline("r", rows)) as routes:
        for dtype in (None, torch.int32, torch.int64):
            assert np.array_equal(routes.torch(dtype=dtype).numpy(), rows)
