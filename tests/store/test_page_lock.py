"""Page-locking where there is no CUDA device: refused politely, and everything else goes on.

``tests/gpu`` has what a device grants.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import threading
import time

import numpy as np
import pytest
from actors import add

from shmroute import ShmRouteReader
from shmroute.attached import attach

torch = pytest.importorskip("torch")
if torch.cuda.is_available():
    pytest.skip("refusals for want of a CUDA device", allow_module_level=True)

from shmroute import pinned  # noqa: E402 (needs torch)
from shmroute.pinned import PageLock, pinned_tensor  # noqa: E402


@pytest.fixture
def memory():
    return mmap.mmap(-1, 1 << 20)


@pytest.fixture
def lock(memory):
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    return PageLock(address, len(memory), what="a test's memory")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "shmroute"]


def the_warning(caplog):
    """The one that a thread gives right after whoever waits for it goes on."""
    end = time.monotonic() + 20
    while not warnings_of(caplog) and time.monotonic() < end:
        time.sleep(0.005)
    (said,) = warnings_of(caplog)
    return said


def test_a_refusal_is_one_warning_with_figures_and_remedy(lock, caplog):
    assert not lock.run()
    assert not lock.run()
    lock.start()
    assert not lock.wait()
    assert not lock.ready
    (said,) = warnings_of(caplog)
    assert lock.refused
    for part in ("a test's memory", "1048576 bytes", lock.refused, "ulimit -l", "memlock=-1"):
        assert part in said


def test_start_returns_and_the_refusal_follows(lock, caplog):
    lock.start()
    lock.start()
    assert not lock.wait(60)
    assert lock.refused in the_warning(caplog)


def test_a_new_lock_does_nothing_until_it_is_started(lock, caplog):
    assert not lock.ready
    assert lock.refused is None
    assert not lock.wait()
    lock.close()
    assert not warnings_of(caplog)


def test_none_is_begun_when_the_interpreter_ends(lock, caplog, monkeypatch):
    monkeypatch.setattr(pinned, "_ending", True)
    assert not lock.run()
    lock.start()
    assert not lock.wait(0)
    assert lock.refused is None
    assert lock not in pinned._under_way
    lock.close()
    assert not warnings_of(caplog)


def test_interrupted_before_there_is_a_thread_it_can_begin_again(lock, interrupted_start):
    with interrupted_start():
        lock.start()
    assert lock not in pinned._under_way
    assert not lock.wait(0)
    assert lock.refused is None
    lock.start()
    assert not lock.wait(60)
    assert lock.refused


def test_a_thread_whose_start_was_interrupted_locks_nothing(lock, interrupted_start, monkeypatch):
    with interrupted_start() as late:
        lock.start()
    monkeypatch.setattr(lock, "_register", lambda: pytest.fail("it asks the driver"))
    late[0].run()
    assert lock.refused is None
    lock.close()


@pytest.mark.parametrize("asked", [False, True])
def test_interrupted_while_it_locks_it_takes_back_what_it_may_have_got(lock, monkeypatch, asked):
    taken_back = []

    def interrupted():
        lock._asked = asked
        raise KeyboardInterrupt

    monkeypatch.setattr(lock, "_register", interrupted)
    monkeypatch.setattr(lock, "_unregister", lambda: taken_back.append(True))
    with pytest.raises(KeyboardInterrupt):
        lock.run()
    assert lock.refused is None
    assert taken_back == [True] * asked
    lock.close()
    assert taken_back == [True] * asked
    assert lock not in pinned._under_way


def test_interrupted_before_it_asks_closing_waits_for_nobody(lock, monkeypatch):
    def interrupted(*_how, **_more):
        raise KeyboardInterrupt

    for where, what in ((pinned.threading, "Thread"), (lock, "_settle")):
        with monkeypatch.context() as patched:
            patched.setattr(where, what, interrupted)
            with pytest.raises(KeyboardInterrupt):
                lock.start() if what == "Thread" else lock.run()
        assert lock not in pinned._under_way
        assert not lock.wait(0)
    assert lock._begin()  # and nobody comes any more
    lock.close()
    assert lock not in pinned._under_way


def test_closing_waits_for_the_thread_that_is_at_it(lock, monkeypatch):
    asked, go_on, given_back = threading.Event(), threading.Event(), []

    def register():
        asked.set()
        go_on.wait(30)

    monkeypatch.setattr(lock, "_register", register)
    monkeypatch.setattr(lock, "_unregister", lambda: given_back.append(True))
    lock.start()
    assert asked.wait(30)
    lock._take_back()  # as by a second start that is interrupted
    closing = threading.Thread(target=lock.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    assert given_back == [True]


def test_who_wants_to_know_is_told_once_it_is_locked(memory, monkeypatch):
    told = []
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    lock = PageLock(address, 4096, what="news", locked=lambda: told.append(lock.ready))
    monkeypatch.setattr(lock, "_register", lambda: None)
    monkeypatch.setattr(lock, "_unregister", lambda: None)
    lock.start()
    assert lock.wait(30)
    lock.start()
    lock.close()
    assert told == [True]


@pytest.mark.parametrize("closed", [False, True])
def test_of_a_lock_that_is_refused_or_closed_meanwhile_nobody_is_told(memory, monkeypatch, closed):
    told = []
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    lock = PageLock(address, 4096, what="news", locked=lambda: told.append(True))

    def register():
        if closed:
            lock.close()  # as the collector may, on this thread
            return None
        return "no"

    monkeypatch.setattr(lock, "_register", register)
    monkeypatch.setattr(lock, "_unregister", lambda: None)
    assert not lock.run()
    assert not told


def test_a_closed_lock_cannot_be_started(lock, caplog):
    lock.close()
    lock.close()
    lock.start()
    assert not lock.run()
    assert lock.refused is None
    assert not warnings_of(caplog)


def test_closing_after_a_refusal_keeps_the_reason(lock):
    lock.run()
    lock.close()
    assert lock.refused


@pytest.mark.parametrize(("address", "size"), [(0, 4096), (4096, 0), (4096, -1)])
def test_no_memory_cannot_be_locked(address, size):
    with pytest.raises(ValueError, match="cannot be page-locked"):
        PageLock(address, size, what="nothing")


def test_start_run_wait_and_close_may_race(memory, caplog):
    caplog.set_level(logging.ERROR)
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    for _ in range(30):
        lock = PageLock(address, 4096, what="a race")
        calls = [lock.start, lock.run, lambda lock=lock: lock.wait(30), lock.close] * 2
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not lock.ready


def test_in_a_forked_child_nothing_is_waited_for_or_unlocked(actor):
    parent = actor("""
        import logging, mmap, threading
        logging.getLogger("shmroute").addHandler(logging.NullHandler())
        from shmroute.pinned import PageLock
        memory = mmap.mmap(-1, 4096)
        lock = PageLock(np.frombuffer(memory, np.uint8).ctypes.data, 4096, what="a fork")
        assert lock._begin()  # as if the driver were at work
        child = os.fork()
        if child == 0:
            assert not lock.ready and not lock.wait() and not lock.run()
            lock.close()
            os._exit(7)
        say(status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), refused=lock.refused)
        lock._finish("the test is over")
    """)
    assert parent.hear() == {"status": 7, "refused": None}


def test_a_process_that_ends_while_it_locks_ends_quietly(actor):
    last = actor("""
        import logging, mmap
        logging.getLogger("shmroute").addHandler(logging.NullHandler())
        from shmroute.pinned import PageLock
        memory = mmap.mmap(-1, 1 << 20)
        lock = PageLock(np.frombuffer(memory, np.uint8).ctypes.data, 1 << 20, what="an end")
        lock.start()
        say(started=True)
    """)
    assert last.hear() == {"started": True}
    assert last.wait() == 0


# -- memory of its own -------------------------------------------------------------------------


def test_host_memory_has_exactly_its_size_and_is_zeroed(caplog):
    tensor = pinned_tensor(3 * 4096 + 5, what="a table")
    assert tensor.dtype == torch.uint8
    assert tensor.untyped_storage().nbytes() == 3 * 4096 + 5
    assert not tensor.any()
    assert not tensor.is_pinned()
    assert len(warnings_of(caplog)) == 1
    tensor[5:] = 3
    assert int(tensor.sum()) == 3 * 3 * 4096


def test_host_memory_goes_with_the_last_view_of_it():
    def mapped():
        with open("/proc/self/maps") as maps:
            bounds = [line.split()[0].split("-") for line in maps]
        return any(int(low, 16) <= address < int(high, 16) for low, high in bounds)

    tensor = pinned_tensor(64 << 20)
    address = tensor.data_ptr()
    view = tensor.view(torch.int16)[5:].view(-1)
    del tensor
    gc.collect()
    assert mapped()
    assert int(view.sum()) == 0
    del view
    gc.collect()
    assert not mapped()


def test_no_host_memory_is_an_error():
    with pytest.raises(ValueError, match="0 bytes"):
        pinned_tensor(0)


# -- arenas ------------------------------------------------------------------------------------


def test_an_arena_that_cannot_be_locked_stays_readable(arena, caplog):
    record = add(arena, "r")
    attached = attach(arena.segment)
    with ShmRouteReader(record.ticket) as routes:
        assert not attached.page_locked(0)
        attached._page_lock.wait()
        assert not attached.page_locked(0)
        assert np.array_equal(routes.numpy(), record.rows)
    said = the_warning(caplog)
    assert arena.segment.data in said
    assert f"{arena.memory.description.heap_bytes} bytes" in said


def test_the_arena_of_a_dead_writer_is_not_locked(writer):
    segment = ShmRouteReader("rid-0", arena=writer.facts["segment"])._arena
    writer.kill()
    assert not segment.page_locked(0)
    assert segment._page_lock is None  # locking would fill the holes of its heap


def test_page_locking_is_not_begun_by_reading_on_the_cpu(arena):
    record = add(arena, "r")
    with ShmRouteReader(record.ticket) as routes:
        routes.torch()
        routes.torch(dtype=torch.int64)
    assert attach(arena.segment)._page_lock is None
    assert os.path.exists(f"/dev/shm/{arena.segment.data}")
