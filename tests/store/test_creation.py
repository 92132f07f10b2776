"""Creation: memory taken whole, files that only their owner (or group) can use, foreign files."""

from __future__ import annotations

import os
import re
import secrets
import stat

import msgpack
import pytest
from actors import LAYOUT, add
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmroute import (
    Arena,
    ArenaNotFound,
    LayoutMismatch,
    RouteLayout,
    ShmRouteError,
    ShmRouteReader,
    reaper,
)
from shmroute import layout as bytes_of
from shmroute.arena import parse_size
from shmroute.segments import SegmentName, check_arena_name, parse_segment, path_of

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# -- memory ------------------------------------------------------------------------------------


def test_all_memory_is_taken_at_creation(make_arena):
    arena = make_arena(capacity="4MiB")
    status = os.stat(f"/dev/shm/{arena.segment.data}")
    assert status.st_size == 4 << 20
    assert status.st_blocks * 512 >= 4 << 20


def test_a_file_that_has_the_temporary_name_already_is_not_removed(name, monkeypatch):
    monkeypatch.setattr(secrets, "token_bytes", bytes)  # zeros, which somebody has guessed
    monkeypatch.setattr(reaper, "reap", lambda _name: None)  # who is not dead
    theirs = path_of(SegmentName(os.geteuid(), name, bytes(8), temporary=True).data)
    with open(theirs, "xb"):
        pass
    try:
        with pytest.raises(ShmRouteError, match="random part"):
            Arena.create(name, LAYOUT, capacity="2MiB", slots=16)
        assert os.path.exists(theirs)
    finally:
        os.unlink(theirs)


def test_the_capacity_is_all_that_an_arena_takes(make_arena, files):
    make_arena(capacity="4MiB", slots=16384)
    assert sum(path.stat().st_blocks * 512 for path in files()) <= (4 << 20) + (8 * 16384)


def test_a_dev_shm_that_is_too_small_is_arena_too_small_with_figures_and_remedy(private_shm):
    said = private_shm("""
        try:
            Arena.create(NAME, LAYOUT, capacity="16MiB", slots=16)
        except ArenaTooSmall as error:
            say(error=str(error), os_error=isinstance(error, OSError), left=os.listdir("/dev/shm"))
    """).hear()
    assert "needs 16.0 MiB of shared memory, 8.0 MiB can be had" in said["error"]
    assert "limited by the size of /dev/shm" in said["error"]
    assert re.search(r"--shm-size.*--ipc=host.*--shmroute-capacity", said["error"])
    assert said["os_error"]
    assert said["left"] == []


def test_memory_that_is_gone_when_it_is_taken_is_arena_too_small(private_shm):
    said = private_shm("""
        from shmroute import segments
        # The check before saw free memory that somebody else then took.
        segments.memory_available = lambda: (1 << 40, "nothing")
        try:
            Arena.create(NAME, LAYOUT, capacity="16MiB", slots=16)
        except ArenaTooSmall as error:
            say(error=str(error), left=os.listdir("/dev/shm"))
    """).hear()
    assert "needs 16.0 MiB" in said["error"]
    assert said["left"] == []


def test_a_dev_shm_that_is_just_large_enough_is_used(private_shm):
    said = private_shm("""
        with Arena.create(NAME, LAYOUT, capacity="7MiB", slots=16) as arena:
            with ShmRouteReader(add(arena, "r").ticket) as routes:
                say(intact=is_intact(routes))
                routes.release()
    """).hear()
    assert said["intact"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GiB", 8 << 30),
        ("512MB", 512 * 10**6),
        ("64k", 64000),
        ("1.5 MiB", 3 << 19),
        (77, 77),
        ("9", 9),
    ],
)
def test_sizes_are_read_as_written(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "8 apples", "-1", "GiB", "1e9"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="use a number of bytes"):
        parse_size(size)


@pytest.mark.parametrize(
    "options",
    [{"slots": 0}, {"slots": 1 << 21}, {"capacity": 8192}, {"capacity": "1MiB", "slots": 9999}],
)
def test_a_geometry_that_cannot_be_is_refused(name, files, options):
    with pytest.raises(ValueError, match=r"slots|capacity"):
        Arena.create(name, LAYOUT, **{"capacity": "2MiB", "slots": 16, **options})
    assert files() == []


@pytest.mark.parametrize("bad", ["", "-a", "a-", "a/b", "a b", "x" * 41, "ä", "a\n"])
def test_a_name_that_cannot_name_an_arena_is_refused(bad):
    with pytest.raises(ValueError, match="arena name"):
        check_arena_name(bad)


@pytest.mark.parametrize("good", ["a", "a-b", "a.tmp", "..", "x" * 40, "r-0123456789abcdef"])
def test_a_segment_s_name_is_parsed_back(good):
    segment = parse_segment(f"shmroute-7-{check_arena_name(good)}-0123456789abcdef")
    assert (segment.uid, segment.arena, segment.arena_id.hex()) == (7, good, "0123456789abcdef")


@pytest.mark.parametrize("suffix", [".ctl", ".L000", ".tmp.tmp", "0"])
def test_only_data_segments_are_taken_for_arenas(suffix):
    assert parse_segment(f"shmroute-0-a-0123456789abcdef{suffix}") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 0},
        {"num_experts": 65537},
        {"top_k": 0},
        {"top_k": 9},
        {"layer_ids": []},
        {"layer_ids": [1, 1]},
        {"layer_ids": [2, 1]},
        {"layer_ids": [-1]},
        {"layer_ids": range(4097)},
        {"num_layers": 2},
    ],
)
def test_a_layout_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=r"num_experts|top_k|MoE layers|layer_ids"):
        RouteLayout(**{"num_experts": 8, "top_k": 2, "layer_ids": [0, 2], **fields})


# -- files -------------------------------------------------------------------------------------


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o777], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_every_file_has_mode_0600_whatever_the_umask(umask, make_arena, files):
    make_arena(slots=300)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files()} == {0o600}
    assert len(files()) == 4


@root_only
def test_the_group_option_lets_the_group_read_and_release_and_nothing_more(
    umask, make_arena, files
):
    make_arena(group=12345)
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in files()}
    assert {path.stat().st_gid for path in files()} == {12345}
    assert modes == {"": 0o640, ".ctl": 0o660, ".L000": 0o640}


@root_only
def test_a_member_of_the_group_reads_and_releases(make_arena, actor, text):
    arena = make_arena(group=12345)
    record = add(arena, "r")
    member = actor(
        """
        os.setgroups([12345]); os.setgid(65534); os.setuid(65534)
        with ShmRouteReader(TICKET) as by_ticket, ShmRouteReader("r", arena=NAME) as by_rid:
            say(intact=is_intact(by_ticket) and is_intact(by_rid))
            by_rid.release()
        """,
        TICKET=text(record.ticket),
    )
    assert member.hear() == {"intact": True}
    member.wait()
    assert arena.writer.reclaim() == 1


@root_only
def test_another_user_finds_no_arena_and_is_told_why_by_ticket(arena, actor, text):
    record = add(arena, "r")
    other = actor(
        """
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        for source in ("r", TICKET):
            try:
                ShmRouteReader(source, arena=NAME, timeout=0)
            except ArenaNotFound as error:
                say(error=str(error))
        """,
        TICKET=text(record.ticket),
    )
    assert "as this user" in other.hear()["error"]
    assert "may not be opened by user 65534" in other.hear()["error"]


# -- foreign and damaged segments --------------------------------------------------------------


@pytest.fixture
def path(arena):
    return f"/dev/shm/{arena.segment.data}"


@pytest.fixture
def refused(arena):
    """Both ways into the arena: by ticket it is a LayoutMismatch, by rid it is left out."""
    ticket = add(arena, "r").ticket

    def refused(match):
        with pytest.raises(LayoutMismatch, match=match):
            ShmRouteReader(ticket)
        with pytest.raises(ArenaNotFound):
            ShmRouteReader("r", arena=arena.name, timeout=0)

    return refused


@pytest.mark.parametrize(
    ("offset", "patch", "match"),
    [
        (8, b"\x63\0\0\0", r"layout version 99, this shmroute reads version 1.*same shmroute"),
        (0, b"\0" * 8, "no shmroute arena"),
        (12, b"\xff" * 4, "claims a description"),
        (16, b"\xc1" * 64, "the header cannot be read"),
        (16, b"\x80", "the header cannot be read"),
    ],
)
def test_a_damaged_header_is_a_layout_mismatch(path, refused, offset, patch, match):
    with open(path, "r+b") as segment:
        segment.seek(offset)
        segment.write(patch)
    refused(match)


@root_only
def test_a_segment_owned_by_another_user_is_refused(path, refused):
    os.chown(path, 65534, -1)
    try:
        refused("belongs to user 65534, its name says 0")
    finally:
        os.chown(path, 0, -1)


@pytest.fixture
def moved(path):
    """The segment under another name, its own name free for something else."""
    os.rename(path, path + ".moved")
    yield path + ".moved"
    os.unlink(path)
    os.rename(path + ".moved", path)


def test_a_symbolic_link_is_not_followed(path, refused, moved):
    os.symlink(moved, path)
    refused("not a shared-memory object")


def test_a_fifo_blocks_nobody(path, refused, moved):
    os.mkfifo(path)
    refused("not a regular file")


@pytest.mark.parametrize("size", [0, 100, 4096, 16000, 20000])
def test_a_short_copy_is_refused(path, refused, moved, size):
    with open(moved, "rb") as whole, open(path, "wb") as short:
        short.write(whole.read(size))
    refused("no arena|no shmroute arena|the segment has 20000")


def test_a_copy_under_another_id_is_refused(arena, path, name, text):
    copy = path[:-16] + "0123456789abcdef"
    ticket = msgpack.unpackb(add(arena, "r").ticket)
    ticket[3][2:4] = copy.removeprefix("/dev/shm/"), bytes.fromhex("0123456789abcdef")
    with open(path, "rb") as whole:
        content = whole.read()
    for suffix in ("", ".ctl"):
        with open(copy + suffix, "wb") as file:
            file.write(content)
    with pytest.raises(LayoutMismatch, match="it was renamed"):
        ShmRouteReader(msgpack.packb(ticket))


def test_a_control_segment_that_is_too_short_is_refused(path, refused):
    size = os.stat(path + ".ctl").st_size
    os.truncate(path + ".ctl", 8)
    try:
        refused("is shorter than 128 bytes")
    finally:
        os.truncate(path + ".ctl", size)


def test_the_reaper_leaves_alone_what_is_not_its_own(path, moved, name, files):
    from shmroute import reap

    os.symlink(moved, path)
    assert reap(name, force=True) == []
    assert os.path.islink(path)


MUTATION = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=4)
FIELDS = [
    "id",
    "experts",
    "top_k",
    "layers",
    "num_layers",
    "slots",
    "capacity",
    "retention",
    "created_ns",
    "writer",
    "model",
]
HUGE = st.one_of(st.integers(-1, 1 << 64), st.floats(), st.binary(max_size=9), st.text(max_size=9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=MUTATION)
def test_a_mutated_header_is_a_layout_mismatch_or_a_geometry_that_fits(arena, changes):
    head = bytearray(arena.memory.data[:16384])
    for at, value in changes:
        head[at] = value
    try:
        description = bytes_of.read_header(memoryview(head), 2 << 20, "x")
    except LayoutMismatch:
        return
    assert description.heap_offset + description.heap_bytes == description.capacity <= 2 << 20


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(field=st.sampled_from(FIELDS), junk=HUGE)
def test_junk_in_a_header_field_is_a_layout_mismatch_or_a_geometry_that_fits(arena, field, junk):
    head = bytes(arena.memory.data[:16384])
    length = int.from_bytes(head[12:16], "little")
    fields = msgpack.unpackb(head[16 : 16 + length])
    try:
        blob = msgpack.packb({**fields, field: junk})
    except OverflowError:
        return
    forged = head[:12] + len(blob).to_bytes(4, "little") + blob
    try:
        description = bytes_of.read_header(memoryview(forged.ljust(16384, b"\0")), 2 << 20, "x")
    except LayoutMismatch:
        return
    assert description.heap_offset + description.heap_bytes == description.capacity <= 2 << 20


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_mutated_record_is_a_named_error_or_lies_within_the_heap(arena, data):
    arena.writer.reclaim()
    if not arena.memory.words[0]:
        add(arena, "r", missing=[(1, 2)], versions=[(0, 1, "one")])
    memory = arena.memory
    rows, row = memory.row(0), memory.slot_offset(0)
    before = bytes(memory.data[row : row + 192]), bytes(memory.heap[: rows.extent_bytes])
    if data.draw(st.booleans()):
        area, base, length = memory.data, row + 8, 72
    else:
        area, base, length = memory.heap, rows.metadata_offset, rows.metadata_bytes
    for _ in range(data.draw(st.integers(1, 4))):
        area[base + data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    try:
        with ShmRouteReader("r", arena=arena.name, timeout=0, allow_missing=True) as routes:
            routes.native(), routes.missing, routes.weight_versions
    except ShmRouteError:
        pass
    finally:
        memory.data[row : row + 192], memory.heap[: rows.extent_bytes] = before
