"""Page-locking on a CUDA device: what is granted, refused, taken back, and when."""

from __future__ import annotations

import base64
import gc
import json
import logging
import mmap
import os
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

import shmroute
from shmroute import RouteLayout, ShmRouteReader
from shmroute.attached import attach
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
def make_lock():
    """Make locks that a failing test lets go of, too.

    One that outlives its memory stays with the address: whatever is mapped there next cannot be
    locked (712), in a test that has nothing to do with it.
    """
    made = []

    def make(address, size, what="a test's memory", **how):
        made.append(PageLock(address, size, what=what, device=0, **how))
        return made[-1]

    yield make
    for lock in made:
        lock.close()


@pytest.fixture
def lock(memory, make_lock):
    return make_lock(memory.address, memory.size)


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


def test_a_range_inside_a_page_locks_the_whole_page(memory, make_lock):
    """What lies behind it may be locked as well: some drivers lock in larger units."""
    lock = make_lock(memory.address + 100, 5000)
    assert lock.run()
    pages = memory.tensor[: 2 * mmap.PAGESIZE]
    assert pages.is_pinned()
    assert pages[-1:].is_pinned()
    lock.close()
    assert not pages.is_pinned()


def test_the_same_range_twice_is_refused_and_copies_still_work(lock, memory, make_lock, caplog):
    assert lock.run()
    second = make_lock(memory.address, memory.size, "the second")
    with caplog.at_level(logging.WARNING, "shmroute"):
        assert not second.run()
        assert not second.run()
    assert second.refused.startswith("already page-locked by this process")
    (said,) = caplog.messages
    assert "the second" in said
    assert "ulimit" not in said  # no limit would help
    launch()  # on the very thread that was refused
    second.close()
    assert memory.tensor.is_pinned()  # the first's lock is not the second's to take
    memory.array[:] = 7
    assert int(memory.tensor.to("cuda").sum(dtype=torch.int64)) == 7 * memory.size


def test_read_only_memory_is_locked_or_refused_by_name(tmp_path, make_lock, caplog):
    path = tmp_path / "rows"
    path.write_bytes(b"\3" * (1 << 20))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    array = np.frombuffer(mapping, dtype=np.uint8)
    lock = make_lock(array.ctypes.data, len(array), "read-only", read_only=True)
    if not lock.run():
        assert "cudaHostRegister with flags 0xb" in lock.refused
        assert "read-only mappings" in caplog.messages[0]
    launch()
    lock.close()  # before its memory goes


def test_closing_waits_for_a_lock_under_way(make_lock):
    memory = Memory(512 << 20)
    lock = make_lock(memory.address, memory.size)
    lock.start()
    lock.close()
    assert not lock.ready
    assert not memory.tensor.is_pinned()
    again = make_lock(memory.address, memory.size)
    assert again.run()
    again.close()


def test_start_run_wait_and_close_may_race(memory, make_lock):
    for _ in range(20):
        lock = make_lock(memory.address, memory.size)
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


def test_locking_does_not_disturb_a_graph_captured_meanwhile(make_lock):
    memory = Memory(1 << 30)
    counter = torch.zeros(8, device="cuda")
    counter.add_(0)  # its kernel is loaded before the capture
    torch.cuda.synchronize()
    lock = make_lock(memory.address, memory.size)
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


@pytest.fixture
def locked_writer(make_arena, make_lock):
    """Make arenas whose heap this process has page-locked, as an engine does."""

    def make():
        arena = make_arena(LAYOUT)
        heap = arena.memory
        lock = make_lock(heap.heap_address, heap.description.heap_bytes, "an arena")
        assert lock.run()
        return arena, lock

    return make


def test_the_writer_s_heap_can_be_locked_whole(locked_writer):
    arena, _ = locked_writer()
    record = arena.reserve("r", tokens=300)
    rows = torch.from_numpy(record.rows)
    assert rows.is_pinned()
    expected = torch.randint(0, 256, rows.shape, dtype=torch.uint8, device="cuda")
    rows.copy_(expected, non_blocking=True)
    torch.cuda.synchronize()
    record.seal()
    with ShmRouteReader(record.ticket) as routes:
        assert torch.equal(routes.torch(), expected.cpu())


@pytest.fixture
def trainer():
    """A process that only reads, as a trainer is: ``trainer(question)`` gives its answer."""
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("reading_process.py"))],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(**question):
        child.stdin.write(json.dumps(question) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        assert line, f"the trainer ended with {child.wait()}"
        return json.loads(line)

    yield ask
    child.communicate(timeout=60)
    assert child.returncode == 0


def test_a_trainer_s_heap_is_locked_beside_the_writer_s_and_unlocked_before_it_is_unmapped(
    locked_writer, add, trainer
):
    # Mappings of one size mostly get the address of the one before: had a lock stayed, the next
    # would be refused.
    for tokens in (300, 301, 9000, 1):
        arena, lock = locked_writer()
        record = add(arena, "r", tokens)
        seen = trainer(ticket=base64.b64encode(record.ticket).decode(), layers=[4, 12])
        if "(801)" in (seen["refused"] or ""):
            pytest.skip(f"this driver registers no read-only mapping: {seen['refused']}")
        assert seen["refused"] is None
        assert seen["pinned"]
        assert seen["whole"] == zlib.crc32(record.rows)
        assert seen["part"] == zlib.crc32(np.ascontiguousarray(record.rows[:, 4:12]))
        lock.close()
        arena.close()
        remove_files(arena.segment)
        ended = trainer(removed=arena.segment.arena)
        assert ended["kept_by_a_view"]
        assert ended["unlocked_with_the_last_view"]


def test_in_the_process_of_a_locked_writer_a_reader_is_locked_or_told_why_and_reads(
    locked_writer, add, caplog
):
    arena, _ = locked_writer()
    record = add(arena, "r", 300)
    attached = attach(arena.segment)
    attached.page_locked(0)
    if not attached._page_lock.wait(60):
        assert "already page-locked by this process" in attached.page_lock_refused
        assert "in another process" in caplog.text
    batch = shmroute.read_batch(record.ticket, device="cuda")
    assert np.array_equal(batch.rows.cpu().numpy(), record.rows)
