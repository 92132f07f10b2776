"""Made-up input for everything that reads what others wrote: named errors, and never out of bounds.

What an attacker would think of is in ``tests/attacks``; this is what nobody thinks of. The same 300
examples of each kind every time, or as many others as ``SHMROUTE_FUZZ_EXAMPLES`` says.
"""

from __future__ import annotations

import ast
import os
import random
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from actors import LAYOUT, add, pattern
from attacks import corpus, forge_header, forge_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmroute
from shmroute import LayoutMismatch, RouteArray, ShmRouteError, ShmRouteReader, layout, release
from shmroute.metadata import Metadata
from shmroute.segments import SHM_DIR, parse_segment, path_of
from shmroute.ticket import Ticket, decode
from shmroute.views import _map_again

MORE = int(os.environ.get("SHMROUTE_FUZZ_EXAMPLES", 0))
EXAMPLES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    derandomize=not MORE,
    database=None,
    max_examples=MORE or 300,
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.binary(max_size=20),
    TEXT,
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=3)
)
# Where lengths and offsets break: around powers of two, alignment and signs.
EDGES = [
    *(0, 1, 8, 63, 64, 65, 4095, 4096, 4097),
    *((1 << bits) + off for bits in (15, 16, 20, 31, 32, 62, 63) for off in (-1, 0, 1)),
    *((1 << 64) - off for off in (1, 2, 8, 63, 64)),
]


@pytest.fixture
def arena(make_arena):
    return make_arena(capacity="256KiB")  # from 2 MiB on, mappings are aligned and leave gaps


# -- envelopes -----------------------------------------------------------------------------------


@EXAMPLES
@given(ANYTHING)
def test_anything_that_msgpack_can_say_is_a_named_error(said):
    with pytest.raises(ShmRouteError):
        decode(msgpack.packb(said))


@pytest.fixture
def envelopes(arena):
    return add(arena, "rid").ticket, arena.inline("inline", pattern("inline", 0, 3))


@EXAMPLES
@given(data=st.data())
def test_any_field_is_a_named_error_or_as_it_must_be(envelopes, data):
    envelope = msgpack.unpackb(data.draw(st.sampled_from(envelopes)))
    body = envelope[3]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.sampled_from([*EDGES, *body]) | ANYTHING)
    try:
        found = decode(msgpack.packb(envelope))
    except ShmRouteError:
        return
    assert 0 <= found.start <= layout.MAX_TOKENS
    assert 0 <= found.tokens <= layout.MAX_TOKENS
    assert type(found.rid) is str
    if isinstance(found, Ticket):
        assert parse_segment(found.segment.data) == found.segment
        assert 0 <= found.slot < layout.MAX_SLOTS
        assert found.generation % 2 == 0
    else:
        assert found.rows.shape == (found.tokens, *found.routes.row_shape)


@st.composite
def edited(draw, whole):
    """The bytes with pieces of them left out, doubled, moved, or replaced by others."""
    envelope = bytes(whole)
    for _ in range(draw(st.integers(1, 4))):
        first, end = sorted(draw(st.integers(0, len(envelope))) for _ in range(2))
        piece = draw(st.sampled_from([b"", envelope[first:end] * 2, draw(st.binary(max_size=9))]))
        envelope = envelope[:first] + piece + envelope[end:]
    return envelope


@EXAMPLES
@given(data=st.data())
def test_an_edited_envelope_is_a_named_error_or_the_record_itself(envelopes, data):
    for whole in envelopes:
        try:
            with ShmRouteReader(data.draw(edited(whole)), timeout=0, allow_missing=True) as routes:
                assert routes.native().shape == (routes.tokens, routes.layout.num_layers, 8)
                assert routes.inline or routes.rid == "rid"
        except ShmRouteError:
            continue


# -- names ---------------------------------------------------------------------------------------

NEAR_A_NAME = st.lists(
    st.sampled_from(["shmroute", "-", "0", "007", "a", ".", "..", "/", "\0", "\n", ".tmp", ".ctl"])
    | st.just("0123456789abcdef")
    | st.characters(),
    max_size=12,
).map("".join)


@EXAMPLES
@given(
    NEAR_A_NAME
    | st.from_regex(r"shmroute-\d{1,11}-[\w.-]{1,41}-[0-9a-f]{16}(\.tmp)?", fullmatch=True)
)
def test_a_segment_s_name_is_one_file_of_dev_shm_or_none(name):
    segment = parse_segment(name)
    if segment is not None:
        assert segment.data == name
        for file in (segment.data, segment.control, segment.lease_file(0)):
            assert Path(path_of(file)).parent == Path(SHM_DIR)
            assert "\0" not in file


# -- headers ---------------------------------------------------------------------------------------

SIZE = 256 << 10
NUMBERS = st.sampled_from([*EDGES, SIZE - 1, SIZE, SIZE + 1, -1, -(1 << 63)])
VALUES = {
    "slots": NUMBERS,
    "capacity": NUMBERS,
    "experts": NUMBERS,
    "top_k": NUMBERS,
    "num_layers": NUMBERS,
    "layers": st.lists(NUMBERS, max_size=6) | st.lists(st.integers(0, 9), unique=True).map(sorted),
    "writer": st.lists(NUMBERS | TEXT, min_size=4, max_size=4),
    "id": st.binary(min_size=8, max_size=8),
    "model": TEXT,
    "retention": st.floats(),
    "created_ns": NUMBERS,
}
HEADER = st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] | ANYTHING for name in names})
)


@EXAMPLES
@given(fields=HEADER)
def test_any_header_is_a_layout_mismatch_or_a_geometry_that_fits(arena, fields):
    head = bytearray(arena.memory.data[: layout.HEADER_BYTES])
    own = msgpack.unpackb(head[16 : 16 + int.from_bytes(head[12:16], "little")])
    blob = msgpack.packb({**own, **fields})
    head[12 : 16 + len(blob)] = len(blob).to_bytes(4, "little") + blob
    try:
        found = layout.read_header(head[: layout.HEADER_BYTES], SIZE, "x")
    except LayoutMismatch:
        return
    tables = [
        (found.counters_offset, 8 * layout.COUNTER_BANKS * layout.COUNTERS_PER_BANK),
        (found.words_offset, 8 * found.slots),
        (found.hash_offset, 8 * found.slots),
        (found.slot_offset(0), found.slot_offset(found.slots) - found.slot_offset(0)),
        (found.heap_offset, found.heap_bytes),
    ]
    position = layout.HEADER_BYTES
    for offset, length in tables:
        assert offset >= position
        position = offset + length
    assert position == found.capacity <= SIZE
    assert found.heap_offset % layout.PAGE == 0
    assert found.routes.row_bytes > 0
    assert found.routes.num_layers <= layout.MAX_LAYERS


# -- records -----------------------------------------------------------------------------------

UNSIGNED_32 = ("tokens", "start", "prompt_tokens", "missing_rows", "metadata_bytes", "flags")


@pytest.fixture
def guarded(fork_server, arena, text):
    """A record, and what reading it as forged gives, before a page that nobody may touch."""
    record = add(arena, "rid", tokens=200)
    victim = fork_server.start("victim.Victim")
    assert victim.do("guard", source=text(record.ticket))
    yield record, lambda: victim.do("open", source="rid", arena=arena.name)
    assert victim.end() == 0


@EXAMPLES
@given(data=st.data())
def test_any_row_of_a_slot_is_a_named_error_or_lies_within_the_heap(arena, guarded, data):
    record, read = guarded
    memory, heap = arena.memory, len(arena.memory.heap)
    true = memory.row(record.slot)
    edges = [*EDGES, *true, heap, heap - 64, heap - 1, heap + 1, heap - true.extent_bytes]
    row = true
    for name in data.draw(st.lists(st.sampled_from(true._fields[1:]), min_size=1, max_size=4)):
        number = data.draw(st.sampled_from(edges)) + data.draw(st.sampled_from([0, 0, -1, 1]))
        most = (1 << 32) if name in UNSIGNED_32 else (1 << 64)
        row = row._replace(**{name: number % most})
    layout.write_record(memory.data, memory.slot_offset(record.slot), row)
    try:
        error = read()["error"]
    finally:
        layout.write_record(memory.data, memory.slot_offset(record.slot), true)
    assert error in ("", "LayoutMismatch", "ChecksumMismatch")
    if not error:
        end = row.extent_offset + row.tokens * LAYOUT.row_bytes
        assert end <= row.metadata_offset < row.metadata_offset + row.metadata_bytes <= heap


def test_no_attack_on_a_record_reads_behind_the_mapping(arena, guarded):
    record, read = guarded
    memory = arena.memory
    before = bytes(memory.data)
    for attack in (parameter.values[0] for parameter in corpus("records")):
        forge_record(memory, record.slot, attack.facts)
        read()
        memory.data[:] = before


def test_the_page_behind_the_mapping_ends_who_touches_it(fork_server, arena, text):
    """Else the two tests above would prove nothing."""
    victim = fork_server.start("victim.Victim")
    assert victim.do("guard", source=text(add(arena, "rid").ticket))
    assert victim.do("peek", behind=-1) == 0
    with pytest.raises(AssertionError, match="ended the process: status -11"):
        victim.do("peek", behind=0)


NEAR_BOUNDS = st.lists(st.integers(-1, 301), max_size=6).map(sorted) | st.binary(max_size=40)
NEAR_RUNS = st.lists(
    st.tuples(st.integers(-1, 300), st.integers(-9, (1 << 64) - 1), TEXT), max_size=4
)


@EXAMPLES
@given(
    said=ANYTHING | st.tuples(TEXT, NEAR_BOUNDS | ANYTHING, NEAR_RUNS | ANYTHING),
    tokens=st.integers(0, 300),
)
def test_any_metadata_is_a_value_error_or_within_the_record(said, tokens):
    try:
        metadata = Metadata.unpack(msgpack.packb(said), tokens)
    except ValueError:
        return
    bounds = [bound for span in metadata.missing for bound in span]
    assert bounds == sorted(bounds)
    assert all(type(bound) is int and 0 <= bound <= tokens for bound in bounds)
    assert metadata.missing_rows <= tokens
    assert all(0 <= run.first < max(tokens, 1) for run in metadata.versions)
    assert all((type(run.epoch), type(run.label)) == (int, str) for run in metadata.versions)


# -- pickles of arrays ---------------------------------------------------------------------------

WHOLE = st.integers(-(1 << 63), (1 << 63) - 1) | st.sampled_from(EDGES[:-5]) | st.integers(-70, 70)


@EXAMPLES
@given(
    offset=WHOLE | st.integers(0, 700),
    shape=st.lists(WHOLE | st.integers(0, 30), max_size=4).map(tuple),
    strides=st.lists(WHOLE, max_size=4).map(tuple),
    typestr=st.sampled_from(["|u1", "<u2", "<f8", "|O", "|V4", "|S0", "<M8[ns]", "no type"]),
)
def test_any_pickle_of_a_route_array_is_an_error_or_a_view_within_its_record(
    arena, offset, shape, strides, typestr
):
    """Whoever unpickles trusts the pickle; the view is checked all the same."""
    ticket = add(arena, "rid").ticket
    try:
        view = _map_again(ticket, offset, shape, strides, typestr)
    except (ValueError, TypeError, MemoryError, OverflowError):
        return
    finally:
        release(ticket)
        arena.writer.reclaim()
    assert isinstance(view, RouteArray)
    rows = view._source[0]
    low, high = np.lib.array_utils.byte_bounds(view) if view.size else (rows.address,) * 2
    assert rows.address <= low <= high <= rows.address + rows.nbytes


# -- while it is read ----------------------------------------------------------------------------


def test_headers_and_records_that_change_under_their_readers_are_named_errors(
    arena, fork_server, text
):
    record, seconds = add(arena, "rid", tokens=2000), 1.5
    memory = arena.memory
    attacks = [("header", p.values[0]) for p in corpus("headers")]
    attacks += [("record", p.values[0]) for p in corpus("records")]
    victims = [fork_server.start("victim.Victim") for _ in range(2)]
    sources = [text(record.ticket), "rid"]
    for victim in victims:
        victim.begin("open_again_and_again", sources=sources, arena=arena.name, seconds=seconds)
    true = bytes(memory.data[:65536]), bytes(memory.heap[: record.plan.total_bytes])
    chance, changes, until = random.Random(4), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        where, attack = chance.choice(attacks)
        if where == "header":
            forge_header(memory.data, attack.facts)
        else:
            forge_record(memory, record.slot, attack.facts)
        changes += 1
        memory.data[:65536] = true[0]
        memory.heap[: len(true[1])] = true[1]
    seen = [victim.finish() for victim in victims]
    assert [victim.end() for victim in victims] == [0, 0]
    print(changes, "changes;", *seen)
    assert changes > 100
    for one in seen:
        assert one["opened"]
        assert one["LayoutMismatch"]


# -- what is not there -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", sorted(Path(shmroute.__file__).parent.glob("*.py")), ids=lambda path: path.stem
)
def test_no_module_can_unpickle_or_evaluate_anything(module):
    used = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            used |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
        elif isinstance(node, ast.Call):
            used.add(getattr(node.func, "id", getattr(node.func, "attr", None)))
            used |= {keyword.arg for keyword in node.keywords}
    assert not used & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
    assert not used & {"eval", "exec", "load", "loads", "allow_pickle", "object_hook", "ext_hook"}
