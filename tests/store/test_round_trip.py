"""What is sealed is what is read, however the record is named."""

from __future__ import annotations

import numpy as np
import pytest
from actors import LAYOUT, WIDE, add, is_intact, pattern

from shmroute import (
    ChecksumMismatch,
    IncompleteRoutes,
    RouteFailed,
    RouteLayout,
    ShmRouteError,
    ShmRouteReader,
    WeightRun,
)

SOURCES = ("rid", "ticket", "text", "bytearray", "meta_info", "response", "sglext", "openai")


@pytest.fixture(params=SOURCES)
def source(request, arena, text):
    """One record, named in every way that a user may name it."""
    rid = f"rid-of-{arena.name}"  # other arenas of this machine are searched, too
    record = add(arena, rid)
    ticket = text(record.ticket)
    return {
        "rid": rid,
        "ticket": record.ticket,
        "text": ticket,
        "bytearray": bytearray(record.ticket),
        "meta_info": {"id": rid, "routed_experts": ticket},
        "response": {"text": "...", "meta_info": {"id": rid, "routed_experts": ticket}},
        "sglext": {"routed_experts": ticket},
        "openai": {"choices": [], "sglext": {"routed_experts": ticket}},
    }[request.param]


def test_a_record_is_read_by_any_name_of_it(arena, source):
    with ShmRouteReader(source) as routes:
        assert routes.rid == f"rid-of-{arena.name}"
        assert is_intact(routes)
        assert not routes.inline


def test_a_reader_says_what_the_rows_are(arena):
    record = arena.reserve("r", tokens=7, start=3, prompt_tokens=5)
    record.rows[...] = 1
    record.seal()
    with ShmRouteReader(record.ticket) as routes:
        assert (routes.tokens, routes.start, routes.prompt_tokens) == (7, 3, 5)
        assert routes.layer_ids == LAYOUT.layer_ids
        assert routes.layout == LAYOUT
        assert routes.complete
        assert routes.missing == ()
        assert routes.weight_versions == ()


def test_256_experts_use_all_values_of_uint8(arena):
    with arena.reserve("r", tokens=8) as record:
        record.rows[...] = np.arange(256).reshape(8, 4, 8)
    with ShmRouteReader("r", arena=arena.name) as routes:
        assert routes.numpy().dtype == np.uint8
        assert np.array_equal(routes.numpy().ravel(), np.arange(256))


def test_more_than_256_experts_are_uint16(make_arena):
    record = add(make_arena(WIDE), "r", tokens=100)
    with ShmRouteReader(record.ticket) as routes:
        assert routes.numpy().dtype == np.uint16
        assert routes.numpy().max() > 255
        assert is_intact(routes)


def test_65536_experts_fit_uint16(make_arena):
    arena = make_arena(RouteLayout(65536, 2, [0]))
    with arena.reserve("r", tokens=1) as record:
        record.rows[...] = [[[0, 65535]]]
    with ShmRouteReader("r", arena=arena.name) as routes:
        assert routes.numpy().tolist() == [[[0, 65535]]]


def test_native_has_every_layer_as_int32_and_dense_ones_zero(make_arena):
    arena = make_arena(RouteLayout(256, 8, [1, 3, 4], num_layers=6))
    record = add(arena, "r")
    with ShmRouteReader(record.ticket) as routes:
        native = routes.native()
        assert native.dtype == np.int32
        assert native.shape == (20, 6, 8)
        assert np.array_equal(native[:, [1, 3, 4]], routes.numpy())
        assert not native[:, [0, 2, 5]].any()


def test_a_reservation_seals_on_leaving_and_fails_with_an_exception(arena):
    with arena.reserve("good", tokens=1) as good:
        good.rows[...] = 1
    with pytest.raises(RuntimeError, match="engine"):
        with arena.reserve("bad", tokens=1):
            raise RuntimeError("engine trouble")
    with ShmRouteReader(good.ticket) as routes:
        assert routes.tokens == 1
    with pytest.raises(RouteFailed, match="aborted by RuntimeError: engine trouble"):
        ShmRouteReader("bad", arena=arena.name)


def test_a_record_is_sealed_once(arena):
    record = add(arena, "r")
    with pytest.raises(ShmRouteError, match="sealed or failed already"):
        record.seal()
    with pytest.raises(ShmRouteError, match="sealed or failed already"):
        record.fail("no")


def test_missing_ranges_are_merged_and_need_allow_missing(arena):
    record = add(arena, "r", missing=[(4, 6), (0, 2), (5, 9)])
    with pytest.raises(IncompleteRoutes, match=r"misses 7 of 20 rows.*\(0, 2\), \(4, 9\)"):
        ShmRouteReader(record.ticket)
    with ShmRouteReader(record.ticket, allow_missing=True) as routes:
        assert not routes.complete
        assert routes.missing == ((0, 2), (4, 9))
        assert routes.missing_rows == 7


def test_a_refused_incomplete_record_is_under_no_lease(arena):
    record = add(arena, "r", missing=[(0, 1)])
    with pytest.raises(IncompleteRoutes):
        ShmRouteReader(record.ticket)
    with ShmRouteReader(record.ticket, allow_missing=True) as routes:
        routes.release()
    assert arena.writer.reclaim() == 1


def test_scattered_missing_rows_become_a_bitmap_and_come_back_the_same(make_arena):
    arena = make_arena()
    spans = tuple((first, first + 1) for first in range(0, 1999, 2))
    record = add(arena, "r", tokens=2000, missing=spans)
    with ShmRouteReader(record.ticket, allow_missing=True) as routes:
        assert routes.missing == spans


def test_weight_versions_are_runs_in_row_order(arena):
    record = add(arena, "r", versions=[(0, 3, "step-3"), (12, 4, "epoch-4")])
    with ShmRouteReader(record.ticket) as routes:
        assert routes.weight_versions == (WeightRun(0, 3, "step-3"), WeightRun(12, 4, "epoch-4"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"missing": [(0, 21)]},
        {"missing": [(-1, 2)]},
        {"versions": [(20, 1, "late")]},
        {"versions": [(-1, 1, "early")]},
        {"versions": ["nonsense"]},
    ],
)
def test_metadata_of_other_rows_is_refused_and_the_record_can_still_be_failed(arena, wrong):
    record = arena.reserve("r", tokens=20)
    with pytest.raises(ValueError, match=r"outside|unpack"):
        record.seal(**wrong)
    record.fail("it could not be sealed")
    assert list(arena.writer.in_flight()) == []


@pytest.mark.parametrize(
    "wrong", [{"versions": [(0, 1, "\ud800")]}, {"versions": [(0, 1 << 63, "")]}]
)
def test_a_seal_that_raises_fails_the_record(arena, wrong):
    record = arena.reserve("r", tokens=20)
    with pytest.raises((ValueError, OverflowError)):
        record.seal(**wrong)
    assert list(arena.writer.in_flight()) == []
    assert arena.reserve("next", tokens=20)


def test_metadata_that_outgrows_its_room_fails_the_record(arena):
    record = arena.reserve("r", tokens=64)
    with pytest.raises(ShmRouteError, match=r"its metadata takes .* weight runs"):
        record.seal(versions=[(row, row, "x") for row in range(64)])
    assert list(arena.writer.in_flight()) == []


@pytest.mark.parametrize(
    "request_",
    [
        {"rid": "", "tokens": 1},
        {"rid": "x" * 4097, "tokens": 1},
        {"rid": "\ud800", "tokens": 1},
        {"rid": "r", "tokens": 0},
        {"rid": "r", "tokens": 1, "start": -1},
        {"rid": "r", "tokens": 1, "prompt_tokens": -1},
        {"rid": "r", "tokens": 1, "prompt_tokens": 1 << 32},
    ],
)
def test_a_request_that_no_record_can_have_is_refused_before_anything_is_taken(arena, request_):
    with pytest.raises(ValueError, match=r"characters|surrogates|rows|prompt_tokens"):
        arena.reserve(request_.pop("rid"), **request_)
    assert list(arena.writer.in_flight()) == []


@pytest.mark.parametrize("rid", ["x" * 512, "ü" * 4096, "a/b c\n", "laRzaG1"])
def test_rids_of_any_text_and_up_to_4096_characters(arena, rid):
    add(arena, rid)
    with ShmRouteReader(rid, arena=arena.name) as routes:
        assert is_intact(routes)


def test_a_flipped_byte_is_found_by_the_checksum(make_arena):
    arena = make_arena(checksum=True)
    record = add(arena, "r")
    with ShmRouteReader(record.ticket) as routes:
        routes.verify()
        record.rows[7, 1, 3] ^= 1
        with pytest.raises(ChecksumMismatch):
            routes.verify()


def test_without_a_checksum_verify_has_nothing_to_say(arena):
    record = add(arena, "r")
    with ShmRouteReader(record.ticket) as routes:
        routes.verify()


def test_a_closed_reader_hands_out_nothing(arena):
    record = add(arena, "r")
    routes = ShmRouteReader(record.ticket)
    routes.close()
    routes.close()
    with pytest.raises(ShmRouteError, match="closed"):
        routes.numpy()
    with pytest.raises(ShmRouteError, match="closed"):
        routes.release()


def test_adjacent_reservations_lie_side_by_side(arena):
    first = arena.reserve("a", tokens=10)
    second = arena.reserve("b", tokens=10, after=first)
    assert second.offset == first.offset + first.plan.total_bytes


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_a_record_takes_at_most_two_percent_beside_its_rows(make_arena, tokens):
    routes = RouteLayout(128, 8, range(48))
    record = make_arena(routes, capacity="8MiB").reserve("x" * 64, tokens=tokens)
    assert record.plan.total_bytes <= 1.02 * tokens * routes.row_bytes


# -- inline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, WIDE])
def test_an_inline_record_reads_like_one_in_the_arena(make_arena, layout, text):
    arena = make_arena(layout)
    rows = pattern("r", 0, 20, layout)
    envelope = arena.inline(
        "r", rows, start=2, prompt_tokens=9, missing=[(1, 2)], versions=[(0, 1, "one")]
    )
    with ShmRouteReader({"routed_experts": text(envelope)}, allow_missing=True) as routes:
        assert routes.inline
        assert (routes.rid, routes.start, routes.prompt_tokens) == ("r", 2, 9)
        assert (routes.missing, routes.weight_versions) == (((1, 2),), ((0, 1, "one"),))
        assert routes.layout == layout
        assert np.array_equal(routes.numpy(), rows)
        assert not routes.numpy().flags.writeable
        routes.release()


def test_an_inline_record_outlives_its_arena(arena):
    envelope = arena.inline("r", pattern("r", 0, 3))
    arena.close()
    with ShmRouteReader(envelope) as routes:
        assert np.array_equal(routes.numpy(), pattern("r", 0, 3))


def test_zero_rows_are_an_empty_inline_record(arena):
    envelope = arena.inline("r", np.empty((0, 4, 8), np.uint8), start=5)
    with ShmRouteReader(envelope) as routes:
        assert (routes.tokens, routes.start, routes.numpy().shape) == (0, 5, (0, 4, 8))
        assert routes.native().shape == (0, 4, 8)


def test_inline_rows_of_another_shape_are_refused(arena):
    with pytest.raises(ValueError, match="rows of shape"):
        arena.inline("r", np.zeros((5, 8, 4), np.uint8))


def test_an_incomplete_inline_record_needs_allow_missing(arena):
    with pytest.raises(IncompleteRoutes):
        ShmRouteReader(arena.inline("r", pattern("r", 0, 3), missing=[(0, 1)]))


def test_a_reader_s_own_ticket_opens_the_same_record(arena):
    for source in (add(arena, "r").ticket, arena.inline("i", pattern("i", 0, 5))):
        with ShmRouteReader(source) as first, ShmRouteReader(first.ticket) as second:
            assert np.array_equal(first.numpy(), second.numpy())
