"""Views: zero-copy, read-only, keeping the lease, and pickled as their ticket."""

from __future__ import annotations

import base64
import gc
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
from actors import WIDE, add, described, pattern

from shmroute import InvalidTicket, RouteArray, RouteGone, ShmRouteReader
from shmroute.ticket import decode
from shmroute.views import _map_again


@pytest.fixture
def record(arena):
    return add(arena, "r", tokens=50)


@pytest.fixture
def whole(record):
    """A route array over all rows, and nothing else that holds the record."""
    with ShmRouteReader(record.ticket) as routes:
        return routes.array()


@pytest.fixture
def private_folder():
    """A folder with a short name, as sockets in it must have one."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_view_lies_in_the_mapping_of_the_segment(arena, record):
    with ShmRouteReader(record.ticket) as routes:
        address = routes.numpy().__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        mapped = [line.split() for line in maps if line.rstrip().endswith(arena.segment.data)]
    bounds = [
        tuple(int(end, 16) for end in line[0].split("-")) for line in mapped if line[1] == "r--s"
    ]
    assert any(low <= address < high for low, high in bounds)


def test_private_memory_does_not_grow_with_the_record(make_arena, actor):
    arena = make_arena(capacity="72MiB")
    with arena.reserve("large", tokens=2 << 20) as record:
        record.rows[...] = 3
    reader = actor("""
        def private():
            with open("/proc/self/smaps_rollup") as rollup:
                return sum(int(line.split()[1]) for line in rollup if line.startswith("Private"))
        before = private()
        with ShmRouteReader("large", arena=NAME) as routes:
            view = routes.numpy()
            total = int(view.sum(dtype=np.int64))
            say(bytes=view.nbytes, total=total, grown_kb=private() - before)
    """)
    said = reader.hear()
    assert said["bytes"] == 64 << 20
    assert said["total"] == 3 * said["bytes"]
    assert said["grown_kb"] < 2048


def test_writing_through_a_view_raises(record):
    with ShmRouteReader(record.ticket) as routes:
        for view in (routes.numpy(), routes.array(), routes.numpy()[3:5]):
            with pytest.raises(ValueError, match="read-only"):
                view[0] = 0
            with pytest.raises(ValueError, match="cannot set WRITEABLE"):
                view.flags.writeable = True


def test_a_tensor_is_the_same_memory(arena, record):
    torch = pytest.importorskip("torch")
    with ShmRouteReader(record.ticket) as routes:
        tensor = routes.torch()
        assert tensor.dtype == torch.uint8
        assert tensor.data_ptr() == routes.numpy().__array_interface__["data"][0]
        assert np.array_equal(tensor.numpy(), routes.numpy())
        routes.release()
    piece = tensor[3:5]
    del tensor, routes
    assert arena.writer.reclaim() == 0  # a view of the tensor keeps the lease
    del piece
    assert arena.writer.reclaim() == 1


@pytest.mark.parametrize("way", ["torch", "from_numpy"])
@pytest.mark.parametrize("cut", [np.s_[:], np.s_[3:5], np.s_[::2, 1], np.s_[7, :, ::3]], ids=str)
def test_a_route_array_makes_a_tensor_of_the_same_memory(whole, way, cut):
    torch = pytest.importorskip("torch")
    view = whole[cut]
    if way == "torch":
        tensor = view.torch()
    else:
        with warnings.catch_warnings():  # that it cannot be read-only: once in a process
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(view)
    assert tensor.data_ptr() == view.__array_interface__["data"][0]
    assert np.array_equal(tensor.numpy(), view)


def test_a_tensor_of_a_route_array_keeps_the_lease(arena, record):
    pytest.importorskip("torch")
    with ShmRouteReader(record.ticket) as routes:
        tensor = routes.array()[3:5].torch()[1:]
        routes.release()
    assert arena.writer.reclaim() == 0
    assert tensor.shape == (1, 4, 8)
    del tensor
    assert arena.writer.reclaim() == 1


def test_uint16_rows_make_a_uint16_tensor(make_arena):
    torch = pytest.importorskip("torch")
    record = add(make_arena(WIDE), "r")
    with ShmRouteReader(record.ticket) as routes:
        assert routes.torch().dtype == torch.uint16
        assert np.array_equal(routes.torch().numpy(), routes.numpy())


@pytest.mark.parametrize("kind", ["numpy", "array", "slice", "transposed"])
def test_any_view_keeps_the_lease_after_the_reader_is_closed(arena, record, kind):
    with ShmRouteReader(record.ticket) as routes:
        routes.release()
        view = {
            "numpy": lambda routes: routes.numpy(),
            "array": lambda routes: routes.array(),
            "slice": lambda routes: routes.numpy()[3:7, 1],
            "transposed": lambda routes: routes.array().T,
        }[kind](routes)
    assert arena.writer.reclaim() == 0
    assert view.size
    del view
    gc.collect()
    assert arena.writer.reclaim() == 1


def test_a_view_outlives_the_release_unharmed(arena, record):
    with ShmRouteReader(record.ticket) as routes:
        view = routes.numpy()
        routes.release()
    for index in range(40):
        add(arena, f"other-{index}", tokens=50)
        arena.writer.evict_expired()
        arena.writer.reclaim()
        if index % 5 == 4:
            for at in range(index - 4, index + 1):
                with ShmRouteReader(f"other-{at}", arena=arena.name) as other:
                    other.release()
    assert np.array_equal(view, pattern("r", record.generation, 50))


@pytest.mark.parametrize(
    "copy",
    [np.copy, lambda a: a.copy(), lambda a: a[[0, 1]], lambda a: a.astype(int), lambda a: a + 1],
)
def test_copies_and_results_keep_no_lease(arena, record, copy):
    with ShmRouteReader(record.ticket) as routes:
        kept = copy(routes.array())
        routes.release()
    assert arena.writer.reclaim() == 1
    assert kept.shape[1:] == (4, 8)


# -- pickles -----------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(actor):
    """Load a pickle in another process: what it is there."""
    other = actor("""
        import base64, pickle
        while True:
            say(**described(pickle.loads(base64.b64decode(hear())), NAME))
    """)

    def load(array, dumps=pickle.dumps):
        other.say(base64.b64encode(dumps(array)).decode())
        return other.hear()

    return load


def test_the_pickle_of_a_record_has_less_than_300_bytes(arena):
    record = add(arena, "x" * 64, tokens=2000)
    with ShmRouteReader(record.ticket) as routes:
        for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
            assert len(pickle.dumps(routes.array(), protocol)) < 300, protocol


def test_a_pickle_maps_the_record_again_in_another_process(whole, elsewhere):
    there = elsewhere(whole)
    assert there["mapped"]
    assert there["kind"] == "RouteArray"
    assert there["rows"] == whole.tolist()


def test_the_pickle_of_a_view_maps_the_same_part_of_the_record(whole, elsewhere):
    views = (
        whole[7:20],
        whole[::-3, 1],
        whole[:, 1:3, ::2],
        whole.T,
        whole[5, 2],
        whole.reshape(-1, 8),
        whole.view(np.uint16),
    )
    for view in views:
        there = elsewhere(view)
        assert there["rows"] == view.tolist()
        assert there["dtype"] == view.dtype.str
        assert there["mapped"]


def test_copies_and_results_pickle_by_value(whole, elsewhere):
    empty, picked = whole[3:3], whole[[1, 0]]
    for result in (np.copy(whole), whole.copy(), picked, picked[1:], whole + 1, whole > 3, empty):
        there = elsewhere(result)
        assert there["rows"] == result.tolist()
        assert not there["mapped"]
        assert there["kind"] == "ndarray"


def test_a_view_with_named_fields_pickles_by_value(whole):
    fields = whole.view([("first", np.uint8), ("rest", np.uint8, 3)])
    again = pickle.loads(pickle.dumps(fields))
    assert again.dtype == fields.dtype
    assert np.array_equal(again["first"], fields["first"])


def test_copies_and_results_need_no_copy_to_be_pickled(whole):
    copy, buffers = whole.copy(), []
    pickled = pickle.dumps(copy, 5, buffer_callback=buffers.append)
    assert len(pickled) < 300
    assert np.array_equal(pickle.loads(pickled, buffers=buffers), whole)


def test_cloudpickle_carries_a_view_and_functions_that_hold_one(whole, elsewhere):
    cloudpickle = pytest.importorskip("cloudpickle")
    there = elsewhere(whole[7:20, 1:3], cloudpickle.dumps)
    assert there["mapped"]
    assert there["rows"] == whole[7:20, 1:3].tolist()
    pickled = cloudpickle.dumps(lambda: whole[3])
    assert len(pickled) < 1500
    assert np.array_equal(pickle.loads(pickled)(), whole[3])


def test_spawned_processes_map_what_they_are_given(name, whole):
    views = [whole, whole[7:20], whole[::2, 1], whole + 1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = list(pool.map(described, views, [name] * len(views)))
    assert [one["rows"] for one in there] == [view.tolist() for view in views]
    assert [one["mapped"] for one in there] == [True, True, True, False]
    assert os.getpid() not in {one["process"] for one in there}


def test_ray_carries_tickets_and_its_workers_map_the_record(name, record, text, private_folder):
    pytest.importorskip("ray")
    script = Path(__file__).with_name("through_ray.py")
    arguments = [sys.executable, str(script), name, text(record.ticket), str(private_folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    rows = np.asarray(pattern("r", record.generation, 50))
    expected = {
        "whole": rows,
        "slice": rows[7:20, 1],
        "copy": rows,
        "task": rows,
        "actor": rows[3:],
    }
    assert said["stored_bytes"] < 2000
    assert {kind: one["rows"] for kind, one in said["views"].items()} == {
        kind: one.tolist() for kind, one in expected.items()
    }
    mapped = {kind for kind, one in said["views"].items() if one["mapped"]}
    assert mapped == {"whole", "slice", "task", "actor"}
    assert len({one["process"] for one in said["views"].values()}) == 3


def test_a_scalar_result_is_a_scalar(whole):
    assert isinstance(whole.max(), np.uint8)
    assert not isinstance(whole.sum(axis=0) + 0, RouteArray)


def test_the_pickle_of_a_released_record_is_route_gone(record, whole):
    pickled = pickle.dumps(whole)
    with ShmRouteReader(record.ticket) as routes:
        routes.release()
    with pytest.raises(RouteGone):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (51, 4, 8), (32, 8, 1)),
        (1600, (1,), (1,)),
        (-1, (1,), (1,)),
        (1 << 62, (1,), (1,)),
        (0, (2,), (1600,)),
        (0, (2,), (-1,)),
        (0, (1 << 62, 4), (0, 1)),
        (0, (-1,), (1,)),
        (0, (-1,), (-1,)),
        (0, (9,), (13 - (1 << 61),)),
        (0, (9,), (13 + (1 << 61),)),
    ],
)
def test_a_forged_view_that_leaves_the_record_is_refused(record, offset, shape, strides):
    with pytest.raises((ValueError, TypeError)):
        _map_again(record.ticket, offset, shape, strides, "|u1")


@pytest.mark.parametrize("typestr", ["|O", "O8,u1", "nonsense"])
def test_a_forged_dtype_is_refused(record, typestr):
    with pytest.raises((ValueError, TypeError)):
        _map_again(record.ticket, 0, (1,), (8,), typestr)


def test_a_forged_view_cannot_be_written(record):
    view = _map_again(record.ticket, 0, (50,), (1,), "|u1")
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def test_a_forged_pickle_around_an_inline_ticket_is_refused(arena):
    with pytest.raises(ValueError, match="no record in shared memory"):
        _map_again(arena.inline("r", pattern("r", 0, 5)), 0, (1,), (1,), "|u1")


def test_a_forged_ticket_inside_a_pickle_is_refused(record):
    forged = decode(record.ticket)._replace(tokens=4000).encode()
    assert msgpack.unpackb(forged)
    with pytest.raises(InvalidTicket):
        _map_again(forged, 0, (4000, 4, 8), (32, 8, 1), "|u1")


def test_the_pickle_of_an_inline_record_is_by_value(arena):
    with ShmRouteReader(arena.inline("r", pattern("r", 0, 5))) as routes:
        assert np.array_equal(pickle.loads(pickle.dumps(routes.array())), pattern("r", 0, 5))


def test_a_process_that_ends_with_views_alive_ends_quietly(record, actor):
    last = actor("""
        view = ShmRouteReader("r", arena=NAME).array()
        say(rows=len(view))
    """)
    assert last.hear()["rows"] == 50
    assert last.wait() == 0  # and the actor fixture fails on anything on standard error
