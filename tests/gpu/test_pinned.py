"""Page-locking on a CUDA device: what is granted, refused, taken back, and when."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from shmroute import RouteLayout, ShmRouteReader
from shmroute.attached import attach, attach_all
from shmroute.reaper import remove_files

torch = pytest.importorskip("torch")

from shmroute.pinned import PageLock, pinned_tensor  # noqa: E402 (needs torch)

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
LAYOUT = RouteLayout(256, 8, range(48), model="tests/gpu")


class Memory:
    """An anonymous mapping and a tensor over it."""

    def __init__(self, size: int) -> None:
        self.mapping = mmap.mmap(-1, size)
        self.array = np.frombuffer(self.mapping, dtype=np.uint8)
        self.tensor = torch.from_numpy(self.array)
        self.address, self.size = self.array.ctypes.data, size


@pytest.fixture
def memory():
    return Memory(8 << 20)


@pytest.fixture
def lock(memory):
    lock = PageLock(memory.address, memory.size, what="a test's memory", device=0)
    yield lock
    lock.close()


def launch():
    """A kernel, after which torch reports an error that a call before it has left behind."""
    assert int(torch.ones(8, device="cuda").add(1).sum()) == 16


def test_a_locked_range_is_pinned_until_it_is_closed(lock, memory):
    assert not memory.tensor.is_pinned()
    assert lock.run()
    assert lock.ready
    assert lock.refused is None
    assert memory.tensor.is_pinned()
    assert memory.tensor[4097:].view(-1).is_pinned()
    lock.close()
    lock.close()
    assert not lock.ready
    assert not memory.tensor.is_pinned()
    launch()


def test_start_locks_in_the_background(lock, memory):
    lock.start()
    lock.start()
    assert lock.wait(60)
    assert memory.tensor.is_pinned()


def test_copies_in_both_directions_are_right(lock, memory):
    memory.array[:] = np.arange(memory.size, dtype=np.uint8)
    lock.run()
    there = memory.tensor.to("cuda", non_blocking=True)
    memory_again = torch.zeros_like(memory.tensor)
    memory_again.copy_(there)
    assert torch.equal(memory_again, memory.tensor)
    memory.tensor.copy_(there.add(1), non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(memory.tensor, memory_again.add(1))


def test_a_range_inside_a_page_locks_the_whole_page(memory):
    lock = PageLock(memory.address + 100, 5000, what="a piece", device=0)
    assert lock.run()
    assert memory.tensor[: 2 * mmap.PAGESIZE].is_pinned()
    assert not memory.tensor[2 * mmap.PAGESIZE :].is_pinned()
    lock.close()


def test_the_same_range_twice_is_refused_and_copies_still_work(lock, memory, caplog):
    assert lock.run()
    second = PageLock(memory.address, memory.size, what="the second", device=0)
    with caplog.at_level(logging.WARNING, "shmroute"):
        assert not second.run()
        assert not second.run()
    assert "already" in second.refused
    (said,) = caplog.messages
    assert "the second" in said
    launch()  # on the very thread that was refused
    second.close()
    assert memory.tensor.is_pinned()  # the first's lock is not the second's to take
    memory.array[:] = 7
    assert int(memory.tensor.to("cuda").sum(dtype=torch.int64)) == 7 * memory.size


def test_read_only_memory_is_locked_or_refused_by_name(tmp_path, caplog):
    path = tmp_path / "rows"
    path.write_bytes(b"\3" * (1 << 20))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    array = np.frombuffer(mapping, dtype=np.uint8)
    lock = PageLock(array.ctypes.data, len(array), what="read-only", read_only=True, device=0)
    if not lock.run():
        assert "cudaHostRegister with flags 0xb" in lock.refused
        assert "read-only mappings" in caplog.messages[0]
    launch()
    lock.close()


def test_closing_waits_for_a_lock_under_way():
    memory = Memory(512 << 20)
    lock = PageLock(memory.address, memory.size, what="large", device=0)
    lock.start()
    lock.close()
    assert not lock.ready
    assert not memory.tensor.is_pinned()
    again = PageLock(memory.address, memory.size, what="large, again", device=0)
    assert again.run()
    again.close()


def test_start_run_wait_and_close_may_race(memory):
    for _ in range(20):
        lock = PageLock(memory.address, memory.size, what="a race", device=0)
        calls = [lock.start, lock.run, lambda lock=lock: lock.wait(30), lock.close] * 2
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not lock.ready
        assert not memory.tensor.is_pinned()


def test_a_forked_child_takes_no_lock_from_its_parent(lock, memory):
    assert lock.run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork among threads, from 3.12 on
        child = os.fork()
    if child == 0:
        safe = not lock.ready and not lock.wait() and not lock.run()
        lock.close()
        os._exit(7 if safe else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert lock.ready
    assert memory.tensor.is_pinned()


def test_locking_does_not_disturb_a_graph_captured_meanwhile():
    memory = Memory(1 << 30)
    counter = torch.zeros(8, device="cuda")
    counter.add_(0)  # its kernel is loaded before the capture
    torch.cuda.synchronize()
    lock = PageLock(memory.address, memory.size, what="large", device=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # in the global mode, torch's default
        lock.start()
        for _ in range(200):
            counter.add_(1)
        assert lock.wait(120)
        counter.add_(1)
    lock.close()
    graph.replay()
    assert counter.tolist() == [201] * 8


def test_a_process_that_ends_while_it_locks_ends_quietly():
    code = """
import mmap, numpy, torch
from shmroute.pinned import PageLock
torch.cuda.init()
memory = mmap.mmap(-1, 1 << 30)
PageLock(numpy.frombuffer(memory, numpy.uint8).ctypes.data, 1 << 30, what="x", device=0).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -- memory of its own -------------------------------------------------------------------------


def test_host_memory_is_pinned_and_has_exactly_its_size():
    size = (5 << 20) + 12
    tensor = pinned_tensor(size, what="a table", device=0)
    assert tensor.is_pinned()
    assert tensor.untyped_storage().nbytes() == size
    assert not tensor.any()
    table = tensor.view(torch.int16)[6:].view(-1, 10)
    assert table.is_pinned()
    table.fill_(-2)
    assert torch.equal(table.to("cuda", non_blocking=True).cpu(), table)


def test_host_memory_is_unlocked_before_it_is_unmapped():
    # A mapping of this size mostly gets the address of the one before it; the lock of that
    # one, had it stayed, would refuse this one as locked already.
    for _ in range(5):
        tensor = pinned_tensor(64 << 20, what="a table", device=0)
        view = tensor[10:]
        del tensor
        gc.collect()
        assert view.is_pinned()
        del view


# -- arenas ------------------------------------------------------------------------------------


def test_the_writer_s_heap_can_be_locked_whole(make_arena):
    arena = make_arena(LAYOUT)
    heap = arena.memory
    lock = PageLock(heap.heap_address, heap.description.heap_bytes, what="an arena", device=0)
    assert lock.run()
    record = arena.reserve("r", tokens=300)
    rows = torch.from_numpy(record.rows)
    assert rows.is_pinned()
    expected = torch.randint(0, 256, rows.shape, dtype=torch.uint8, device="cuda")
    rows.copy_(expected, non_blocking=True)
    torch.cuda.synchronize()
    record.seal()
    with ShmRouteReader(record.ticket) as routes:
        assert torch.equal(routes.torch(), expected.cpu())
    lock.close()


def test_a_reader_s_heap_is_unlocked_before_it_is_unmapped(make_arena, add):
    for _ in range(4):
        arena = make_arena(LAYOUT)
        record = add(arena, "r", 300)
        attached = attach(arena.segment)
        attached.page_locked(0)
        lock = attached._page_lock
        if not lock.wait(60):
            pytest.skip(f"no read-only registration here: {lock.refused}")
        with ShmRouteReader(record.ticket) as routes:
            view = routes.torch()
        assert view.is_pinned()
        arena.close()
        del attached, routes
        remove_and_forget(arena.segment)
        assert lock.ready  # the view keeps the mapping, and with it the lock
        assert np.array_equal(view.numpy(), record.rows)
        del view
        gc.collect()
        assert not lock.ready


def remove_and_forget(segment):
    """Remove an arena's files, and have this process look at /dev/shm again."""
    time.sleep(0.05)  # the directory's clock ticks
    remove_files(segment)
    attach_all(segment.arena)
