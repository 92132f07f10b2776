"""Routes on the trainer's GPU: exact, under leases that end with the copy, locked or not."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import shmroute
from shmroute import LayoutMismatch, Partition, RouteLayout, ShmRouteReader, read_batch
from shmroute.attached import attach

torch = pytest.importorskip("torch")

from shmroute import cuda_runtime, transfer  # noqa: E402 (need torch)
from shmroute.pinned import PageLock  # noqa: E402

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "uint8": RouteLayout(256, 8, range(48), model="tests/gpu"),
    "uint8, odd": RouteLayout(160, 6, range(1, 60, 2), model="tests/gpu, top-6"),
    "uint16": RouteLayout(512, 10, range(47), model="tests/gpu, 512 experts"),
    "uint16, full": RouteLayout(65536, 3, range(5), model="tests/gpu, 65536 experts"),
}
# 9000 rows of 48 layers are more than one piece of the bounce buffer has room for.
TOKENS = (300, 1, 9000, 25)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(params=["page-locked", "refused"])
def way(request, eventually):
    """How rows get to the GPU: let the arena be locked, or have it refused for real.

    Writer and reader are one process here, which locks only the reader's mapping: CUDA may refuse
    a second lock of the same memory (712), and would if the writer had locked its own, as an
    engine does. ``test_pinned`` has that writer, with the reader in a process of its own.
    """
    others = []

    def prepare(arena):
        attached = attach(arena.segment)
        if request.param == "page-locked":
            attached.page_locked(0)
            if not attached._page_lock.wait(60):
                pytest.skip(f"no read-only registration here: {attached._page_lock.refused}")
            return
        memory = attached.memory
        for flags in (True, False):  # somebody else was first: now a second lock is refused
            first = PageLock(memory.heap_address, 4096, what="the first", read_only=flags, device=0)
            if first.run():
                break
        others.append(first)
        attached.page_locked(0)
        assert not attached._page_lock.wait(60)
        assert attached._page_lock.refused

    yield prepare
    for lock in others:
        lock.close()


@pytest.fixture
def filled(make_arena, layout, way, add):
    """An arena with a record of each size of ``TOKENS``, ready to be read ``way``."""
    arena = make_arena(layout)
    records = [add(arena, f"rid-{index}", tokens) for index, tokens in enumerate(TOKENS)]
    way(arena)
    return arena, records


def leases_on(arena):
    return attach(arena.segment).leases.held()


def exact(tensor, rows):
    return tensor.is_cuda and np.array_equal(tensor.cpu().numpy(), rows)


# -- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64])
def test_one_record_on_the_gpu_equals_its_rows(filled, layout, dtype):
    _, records = filled
    for record in records:
        with ShmRouteReader(record.ticket) as routes:
            tensor = routes.torch("cuda", dtype=dtype)
        assert tensor.dtype == (dtype or getattr(torch, layout.dtype_name))
        assert exact(tensor, record.rows)


@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64])
def test_a_batch_on_the_gpu_equals_the_rows(filled, layout, dtype):
    _, records = filled
    batch = read_batch([record.ticket for record in records], device="cuda", dtype=dtype)
    assert exact(batch.rows, np.concatenate([record.rows for record in records]))
    assert batch.rows.is_contiguous()
    assert batch.cu_seqlens.is_cuda
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(TOKENS)]


@pytest.mark.parametrize("layers", [slice(None), slice(1, 3)], ids=["all", "some"])
def test_without_the_runtime_s_own_copies_torch_s_take_them(filled, monkeypatch, layers):
    _, records = filled
    monkeypatch.setattr(transfer, "can_copy", lambda: False)
    batch = read_batch([record.ticket for record in records], layers=layers, device="cuda")
    assert exact(batch.rows, np.concatenate([record.rows[:, layers] for record in records]))


@pytest.mark.parametrize(
    ("copy", "sizes"),
    [
        (cuda_runtime.copy_to_device, (1, 1, 8)),
        (cuda_runtime.copy_rows_to_device, (1, 4, 1, 4, 2, 4)),
    ],
    ids=["in one piece", "rows"],
)
def test_a_copy_that_is_refused_says_why_and_leaves_no_error_behind(copy, sizes):
    assert cuda_runtime.can_copy()
    with pytest.raises(RuntimeError, match="8 bytes to the GPU was refused: invalid argument"):
        copy(*sizes, torch.cuda.current_stream().cuda_stream)
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize(
    "layers",
    [slice(0, 2), slice(1, 3), slice(-3, None), slice(None, None, 2), [4, 0, 1], [2]],
    ids=str,
)
@pytest.mark.parametrize("dtype", [None, torch.int64])
def test_layers_on_the_gpu_equal_those_of_the_rows(filled, layers, dtype):
    _, records = filled
    tickets = [record.ticket for record in records]
    batch = read_batch(tickets, layers=layers, device="cuda", dtype=dtype)
    assert exact(batch.rows, np.concatenate([record.rows[:, layers] for record in records]))


@pytest.mark.parametrize("dtype", [None, torch.int32])
@pytest.mark.parametrize("layers", [None, slice(1, 3)], ids=["all", "some"])
def test_rows_go_into_memory_of_the_gpu_that_is_given(filled, layout, layers, dtype):
    _, records = filled
    tickets = [record.ticket for record in records]
    expected = read_batch(tickets, layers=layers, dtype=dtype, pad="distinct")
    shape = len(expected.rows) + 2, *expected.rows.shape[1:]
    memory = torch.full(shape, 77, dtype=torch.int32).to(expected.rows.dtype).to("cuda")
    out = memory[1:]  # does not begin where its memory does
    batch = read_batch(tickets, layers=layers, pad="distinct", out=out)
    assert batch.rows.data_ptr() == out.data_ptr()
    assert exact(batch.rows, expected.rows.numpy())
    beside = memory.cpu().numpy()
    assert (beside[0] == 77).all()
    assert (beside[-1] == 77).all()


RANKS = [
    {"cp_size": 2, "batch_multiple": 128},
    {"cp_size": 4, "sp_size": 2, "sequence_multiple": 16},
    {"cp_size": 2, "zigzag": False},
    {"sp_size": 4},
]


@pytest.mark.parametrize("how", RANKS, ids=str)
@pytest.mark.parametrize("layers", [None, slice(1, 3)], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [None, torch.int64])
def test_a_rank_s_share_on_the_gpu_is_that_on_the_cpu(filled, how, layers, dtype):
    """The share on the CPU is compared with the rows in ``store/test_partition.py``."""
    arena, records = filled
    turns = []
    for number, (start, end) in enumerate(((0, 40), (40, 95), (90, 200))):
        with arena.reserve(f"turn-{number}", tokens=end - start, start=start) as turn:
            turn.rows[...] = records[0].rows[start:end]
        turns.append(turn.ticket)
    inline = arena.inline("inline", records[0].rows[:17].copy(), start=3)
    sources = [*(record.ticket for record in records), turns, inline]
    for cp_rank in range(how.get("cp_size", 1)):
        for sp_rank in range(how.get("sp_size", 1)):
            wanted = {
                "layers": layers,
                "tokens": Partition(cp_rank=cp_rank, sp_rank=sp_rank, **how),
                "pad": "mask",
                "dtype": dtype,
            }
            here = read_batch(sources, device="cuda", **wanted)
            expected = read_batch(sources, **wanted)
            assert exact(here.rows, expected.rows.numpy())
            assert exact(here.padding_mask, expected.padding_mask.numpy())
            assert here.cu_seqlens.tolist() == expected.cu_seqlens.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_on_the_gpu_may_be_minus_one(filled, dtype):
    _, records = filled
    tickets = [record.ticket for record in records]
    batch = read_batch(tickets, pad="minus_one", device="cuda", dtype=dtype)
    minus_one = np.full((1, *records[0].rows.shape[1:]), -1)
    assert exact(
        batch.rows, np.concatenate([part for r in records for part in (r.rows, minus_one)])
    )


def test_every_id_comes_out_right(make_arena, way):
    arena = make_arena(RouteLayout(65536, 64, range(4)))
    with arena.reserve("r", tokens=256) as record:
        record.rows[...] = np.arange(65536).reshape(256, 4, 64)
    way(arena)
    every = torch.arange(65536, device="cuda")
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(
            read_batch("r", arena=arena.name, device="cuda", dtype=dtype).rows.view(-1), every
        )


def test_rows_read_before_the_arena_is_locked_are_right(make_arena, add):
    arena = make_arena(LAYOUTS["uint8"], capacity="1GiB")  # locking it takes a while
    record = add(arena, "r", 9000)
    batch = read_batch(record.ticket, device="cuda", dtype=torch.int32)
    assert exact(batch.rows, record.rows)


def test_inline_empty_and_mapped_records_mix(filled, layout):
    arena, records = filled
    rows = records[0].rows[:17].copy()
    sources = [
        arena.inline("empty", rows[:0]),
        records[0].ticket,
        arena.inline("inline", rows),
        records[3].ticket,
    ]
    batch = read_batch(sources, device="cuda", dtype=torch.int32)
    assert exact(batch.rows, np.concatenate([records[0].rows, rows, records[3].rows]))
    with ShmRouteReader(arena.inline("inline", rows)) as routes:
        assert exact(routes.torch("cuda", dtype=torch.int64), rows)


def test_a_batch_of_empty_records_is_empty(make_arena):
    layout = LAYOUTS["uint16"]
    arena = make_arena(layout)
    nothing = np.empty((0, *layout.row_shape), layout.dtype)
    batch = read_batch(arena.inline("r", nothing), device="cuda", dtype=torch.int64)
    assert batch.rows.shape == (0, *layout.row_shape)
    assert batch.rows.is_cuda


def test_threads_with_streams_of_their_own_read_the_right_rows(filled):
    _, records = filled
    wrong = []

    def read(record):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                batch = read_batch(record.ticket, device="cuda", dtype=torch.int32)
                if not exact(batch.rows, record.rows):
                    wrong.append(record.rid)

    threads = [threading.Thread(target=read, args=(record,)) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device_reads_from_the_same_lock(filled):
    _, records = filled
    for layers in (None, slice(1, 3)):
        batch = read_batch(records[2].ticket, layers=layers, device="cuda:1", dtype=torch.int32)
        assert batch.rows.device == torch.device("cuda", 1)
        assert exact(batch.rows, records[2].rows[:, layers or slice(None)])


# -- leases ------------------------------------------------------------------------------------


@pytest.fixture
def locked(make_arena, add, eventually):
    """An arena of one record that this process has page-locked."""
    arena = make_arena(LAYOUTS["uint8"])
    record = add(arena, "r", 9000)
    attached = attach(arena.segment)
    attached.page_locked(0)
    if not attached._page_lock.wait(60):
        pytest.skip(f"no read-only registration here: {attached._page_lock.refused}")
    return arena, record


def keep_gpu_busy():
    """Queue something before the next copy."""
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second


@pytest.mark.parametrize("layers", [None, slice(12, 24)], ids=["all", "some"])
def test_the_lease_is_held_until_the_copy_is_done(locked, eventually, layers):
    arena, record = locked
    expected = record.rows[:, layers or slice(None)].copy()
    # Loading a kernel may wait for the GPU: have all of them loaded first.
    read_batch(record.ticket, layers=layers, device="cuda", dtype=torch.int32)
    assert eventually(lambda: leases_on(arena) == 0)
    keep_gpu_busy()
    batch = read_batch(record.ticket, layers=layers, device="cuda", dtype=torch.int32)
    shmroute.release(record.ticket)
    assert not torch.cuda.current_stream().query()  # the GPU has not come to the copy yet
    assert leases_on(arena) == 1
    assert arena.writer.reclaim() == 0
    torch.cuda.synchronize()
    assert eventually(lambda: leases_on(arena) == 0)
    assert arena.writer.reclaim() == 1
    assert exact(batch.rows, expected)


def test_the_lease_outlives_a_result_that_is_dropped_at_once(locked, eventually):
    arena, record = locked
    read_batch(record.ticket, device="cuda")
    assert eventually(lambda: leases_on(arena) == 0)
    keep_gpu_busy()
    read_batch(record.ticket, device="cuda")
    gc.collect()
    assert leases_on(arena) == 1
    assert eventually(lambda: leases_on(arena) == 0)


def test_an_error_half_way_leaves_no_lease(filled, make_arena, add, eventually):
    arena, records = filled
    other = add(make_arena(RouteLayout(256, 2, range(2))), "other", 5)
    tickets = [record.ticket for record in records]
    with pytest.raises(LayoutMismatch):
        read_batch([*tickets, other.ticket], device="cuda")
    assert eventually(lambda: leases_on(arena) == 0)  # copies of the first were under way
    with pytest.raises(ValueError, match="layers"):
        read_batch(tickets, layers=[1000], device="cuda")
    assert leases_on(arena) == 0


def test_a_gpu_without_memory_leaves_no_lease(locked, eventually):
    arena, record = locked
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            read_batch(record.ticket, device="cuda", dtype=torch.int64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert caught.value.__traceback__ is not None  # alive, with every frame of it
    assert eventually(lambda: leases_on(arena) == 0)


# -- graphs ------------------------------------------------------------------------------------


def test_waiting_for_copies_does_not_disturb_a_graph_captured_meanwhile(locked, eventually):
    arena, record = locked
    counter = torch.zeros(8, device="cuda")
    counter.add_(0)
    busy = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        keep_gpu_busy()
        batch = read_batch(record.ticket, device="cuda")
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()  # not ``torch.cuda.graph``, which would wait for the copy first
        for _ in range(100):
            counter.add_(1)
        graph.capture_end()
    assert leases_on(arena) == 1
    graph.replay()
    torch.cuda.synchronize()
    assert counter.tolist() == [100] * 8
    assert exact(batch.rows, record.rows)
    assert eventually(lambda: leases_on(arena) == 0)


def test_reading_while_a_graph_is_captured_is_refused(locked):
    arena, record = locked
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            read_batch(record.ticket, device="cuda")
    assert leases_on(arena) == 0
