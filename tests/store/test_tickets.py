"""Tickets: small, loud for old clients, and never trusted."""

from __future__ import annotations

import base64
import sys
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from actors import add, is_intact, pattern
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgpack import fallback

from shmroute import (
    ArenaNotFound,
    InvalidTicket,
    NotOnThisNode,
    RouteFailed,
    RouteGone,
    RouteLayout,
    ShmRouteError,
    ShmRouteReader,
)
from shmroute.layout import MAX_SLOTS, MAX_TOKENS
from shmroute.segments import SegmentName, boot_id
from shmroute.ticket import ArenaTickets, Ticket, decode, failed_ticket, skim_source

# The largest value of every field, beside a rid of 64 bytes.
LARGEST = Ticket(
    boot_id="ffffffff-ffff-ffff-ffff-ffffffffffff",
    host="h" * 64,
    segment=SegmentName(4294967294, "n" * 40, b"\xff" * 8),
    slot=MAX_SLOTS - 1,
    generation=(1 << 64) - 2,
    rid="r" * 64,
    start=MAX_TOKENS - 1,
    tokens=MAX_TOKENS - 1,
    layers=4096,
    top_k=256,
    dtype="uint16",
    complete=None,
)
FIXTURE_IS_SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200
)


def test_tickets_of_several_threads_do_not_mix_with_a_msgpack_that_is_all_python(monkeypatch):
    """Its packers must not be shared: many steps of the interpreter fill their buffer."""
    monkeypatch.setattr(msgpack, "Packer", fallback.Packer)
    monkeypatch.setattr(msgpack, "packb", lambda given: fallback.Packer().pack(given))
    made = ArenaTickets(boot_id(), "node", LARGEST.segment, 48, 8, "uint8")

    def ticket_of(slot):
        return made.encode(slot, 2 * slot + 2, f"rid-{slot}", 0, 9, None)

    def tickets_of(slot):
        return {ticket_of(slot) for _ in range(2000)}

    expected = [{ticket_of(slot)} for slot in range(4)]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(tickets_of, range(4))) == expected
    finally:
        sys.setswitchinterval(usual)


def test_the_largest_ticket_of_a_64_byte_rid_has_at_most_256_bytes():
    assert len(LARGEST.encode()) <= 256


def test_a_ticket_survives_its_own_encoding():
    assert decode(LARGEST.encode()) == LARGEST._replace(host="h" * 27)


@given(
    slot=st.integers(0, MAX_SLOTS - 1),
    generation=st.integers(2, (1 << 64) - 2),
    rid=st.text(st.characters(codec="utf-8"), max_size=300),
    start=st.integers(0, MAX_TOKENS),
    tokens=st.integers(1, MAX_TOKENS),
    complete=st.sampled_from([None, True, False]),
)
def test_tickets_of_an_arena_are_what_msgpack_makes_of_all_their_fields(
    slot, generation, rid, start, tokens, complete
):
    segment = SegmentName(1000, "rollouts", b"\1" * 8)
    arena = ArenaTickets(boot_id(), "host", segment, 48, 8, "uint8")
    boot = bytes.fromhex(boot_id().replace("-", ""))
    record = [slot, generation, rid, start, tokens, 48, 8, 1, complete]
    body = [boot, b"host", segment.base, segment.arena_id, *record]
    whole = [msgpack.packb(["shmr", 1, 0, body, pad]) for pad in (b"", b"\0")]
    envelope = arena.encode(slot, generation, rid, start, tokens, complete)
    assert envelope == whole[len(whole[0]) % 4 == 0]


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=80))
def test_a_ticket_s_length_is_never_a_multiple_of_4(rid):
    assert len(LARGEST._replace(rid=rid).encode()) % 4


def test_an_inline_envelope_s_length_is_never_a_multiple_of_4(make_arena):
    arena = make_arena(RouteLayout(256, 1, [0]))
    for tokens in range(300):
        assert len(arena.inline("r", np.zeros((tokens, 1, 1), np.uint8))) % 4


def test_the_response_grows_by_at_most_350_bytes(text):
    ticket = LARGEST._replace(rid="0123456789abcdef" * 4)
    assert len(',"routed_experts":""') + len(text(ticket.encode())) <= 350


# -- untrusted input ---------------------------------------------------------------------------


@pytest.fixture
def ticket(arena):
    return add(arena, "some-rid").ticket


@pytest.fixture
def attempt():
    """Open a source: the name of the shmroute error, or 'intact'; anything else escapes."""

    def attempt(source):
        try:
            with ShmRouteReader(source, timeout=0) as routes:
                return "intact" if is_intact(routes) else "other rows"
        except ShmRouteError as error:
            return type(error).__name__

    return attempt


def test_every_truncation_is_an_invalid_ticket(ticket, attempt):
    assert {attempt(ticket[:length]) for length in range(len(ticket))} == {"InvalidTicket"}


def test_every_truncation_of_its_text_is_a_named_error(ticket, attempt, text):
    whole = text(ticket)
    outcomes = {attempt({"routed_experts": whole[:length]}) for length in range(len(whole))}
    assert outcomes == {"InvalidTicket"}


def test_every_truncation_of_an_inline_envelope_is_an_invalid_ticket(arena, attempt):
    envelope = arena.inline("r", pattern("r", 0, 3))
    assert {attempt(envelope[:length]) for length in range(len(envelope))} == {"InvalidTicket"}


@given(st.binary(max_size=300))
def test_random_bytes_are_an_invalid_ticket(garbage):
    with pytest.raises(InvalidTicket):
        decode(garbage)


@FIXTURE_IS_SHARED
@given(st.data())
def test_a_ticket_with_changed_bytes_gets_a_named_error_or_its_own_record(ticket, attempt, data):
    changed = bytearray(ticket)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(ticket) - 1))] = data.draw(st.integers(0, 255))
    assert attempt(bytes(changed)) != "other rows"


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.binary(max_size=20),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.lists(st.integers(-5, 1 << 40), max_size=5),
)


@FIXTURE_IS_SHARED
@given(field=st.integers(0, 12), junk=JUNK)
def test_a_ticket_with_junk_in_a_field_gets_a_named_error_or_its_own_record(
    ticket, attempt, field, junk
):
    envelope = msgpack.unpackb(ticket)
    envelope[3][field] = junk
    assert attempt(msgpack.packb(envelope)) != "other rows"


@FIXTURE_IS_SHARED
@given(field=st.integers(0, 9), junk=JUNK)
def test_an_inline_record_with_junk_in_a_field_is_a_named_error_or_a_record(arena, field, junk):
    envelope = msgpack.unpackb(arena.inline("r", pattern("r", 0, 3)))
    envelope[3][field] = junk
    try:
        ShmRouteReader(msgpack.packb(envelope), allow_missing=True).native()
    except ShmRouteError:
        return


@given(body=JUNK, kind=JUNK, version=st.sampled_from([1, 2, None]))
def test_an_envelope_with_a_junk_body_is_a_named_error(body, kind, version):
    with pytest.raises(ShmRouteError):
        decode(msgpack.packb(["shmr", version, kind, body, b""]))


@pytest.mark.parametrize("source", [None, 7, 1.5, ["a"], {"meta_info": {}}, {"meta_info": 3}, {}])
def test_what_is_no_source_is_an_invalid_ticket(source):
    with pytest.raises(InvalidTicket):
        ShmRouteReader(source)


def test_native_routes_are_an_invalid_ticket_that_says_so(text):
    native = text(np.zeros((100, 4, 8), np.int32).tobytes())
    with pytest.raises(InvalidTicket):
        ShmRouteReader({"routed_experts": native})
    with pytest.raises(InvalidTicket, match="native routes"):
        ShmRouteReader(native)


def test_another_version_of_tickets_is_named(ticket):
    envelope = msgpack.unpackb(ticket)
    envelope[1] = 99
    with pytest.raises(InvalidTicket, match="ticket version 99, this shmroute reads 1"):
        decode(msgpack.packb(envelope))


def test_a_ticket_of_another_node_names_that_node(ticket):
    foreign = decode(ticket)._replace(
        host="other-node", boot_id="00000000-0000-0000-0000-000000000001"
    )
    with pytest.raises(NotOnThisNode, match="other-node"):
        ShmRouteReader(foreign.encode())


def test_a_ticket_knows_this_boot(ticket):
    assert decode(ticket).boot_id == boot_id()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"slot": 16}, InvalidTicket),
        ({"slot": 5}, RouteGone),
        ({"generation": 4}, RouteGone),
        ({"rid": "other"}, InvalidTicket),
        ({"start": 1}, InvalidTicket),
        ({"tokens": 19}, InvalidTicket),
        ({"layers": 3}, InvalidTicket),
        ({"top_k": 4}, InvalidTicket),
        ({"dtype": "uint16"}, InvalidTicket),
    ],
)
def test_a_ticket_that_contradicts_its_record_is_refused(ticket, change, error):
    with pytest.raises(error):
        ShmRouteReader(decode(ticket)._replace(**change).encode(), timeout=0)


def test_a_refused_ticket_leaves_no_lease(arena, ticket):
    with pytest.raises(InvalidTicket):
        ShmRouteReader(decode(ticket)._replace(tokens=19).encode())
    with ShmRouteReader(ticket) as routes:
        routes.release()
    assert arena.writer.reclaim() == 1


def test_a_ticket_of_another_arena_than_asked_for_is_refused(arena, ticket):
    with pytest.raises(InvalidTicket, match="not 'elsewhere'"):
        ShmRouteReader(ticket, arena="elsewhere")
    with ShmRouteReader(ticket, arena=arena.name) as routes:
        assert is_intact(routes)


def test_a_ticket_of_a_removed_arena_is_arena_not_found(ticket):
    gone = decode(ticket)._replace(segment=SegmentName(0, "gone", b"\1" * 8))
    with pytest.raises(ArenaNotFound, match="is not under /dev/shm"):
        ShmRouteReader(gone.encode())


def test_a_failed_ticket_says_why_there_are_no_routes():
    with pytest.raises(RouteFailed, match="rid 'r': the engine kept no routes: a CUDA error"):
        ShmRouteReader(failed_ticket("r", "a CUDA error"))


@pytest.mark.parametrize(
    ("field", "value"), [(9, True), (9, 1.0), (10, True), (11, 1.0), (11, True), (2, b"segment")]
)
def test_a_field_of_another_type_is_refused_after_its_equal_was_taken(ticket, field, value):
    """What all tickets of an arena say is checked once and remembered: by type, too."""
    magic, version, kind, body, pad = msgpack.unpackb(ticket)
    body[field] = {9: 1, 10: 1, 11: 1}.get(field, body[field])
    decode(msgpack.packb([magic, version, kind, body, pad]))
    body[field] = value
    with pytest.raises(InvalidTicket):
        decode(msgpack.packb([magic, version, kind, body, pad]))


@pytest.mark.parametrize(
    "body", [[], [1] * 12, [1] * 14, "x" * 13, b"x" * 13, 7, None, [None] * 13]
)
def test_a_body_that_is_no_ticket_s_is_refused(body):
    for read in (decode, skim_source):
        with pytest.raises(InvalidTicket):
            read(msgpack.packb(["shmr", 1, 0, body, b""]))


def test_rows_of_an_engine_without_an_arena_are_named_for_what_they_are():
    rows = np.arange(2 * 3 * 4, dtype=np.int32)
    native = base64.b64encode(rows.tobytes()).decode()
    with pytest.raises(InvalidTicket, match="without --shmroute-arena they are SGLang's own rows"):
        ShmRouteReader({"meta_info": {"routed_experts": native}})
