"""Packing shared by two threads: everything is done or nothing goes on, and errors are told."""

from __future__ import annotations

import _thread
import contextlib
import gc
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from actors import add

from shmroute import RouteGone, RouteLayout, ShmRouteReader, read_batch, release
from shmroute.attached import attach

torch = pytest.importorskip("torch")

from shmroute import side_by_side  # noqa: E402
from shmroute.side_by_side import sharing  # noqa: E402

ENOUGH = 1 << 30


@pytest.fixture
def one_thread_of_torch(monkeypatch):
    """As ``torchrun`` starts a rank, on a machine with two cores or more."""
    monkeypatch.setattr(side_by_side.os, "sched_getaffinity", lambda _: {0, 1})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    threads = _thread._count()
    yield
    torch.set_num_threads(before)
    deadline = time.monotonic() + 10
    while _thread._count() > threads and time.monotonic() < deadline:
        time.sleep(1e-3)  # from its last word to its end
    assert _thread._count() <= threads


@pytest.mark.usefixtures("one_thread_of_torch")
def test_both_threads_work_until_all_is_done():
    ran = []
    with sharing(ENOUGH) as do:
        for number in range(50):
            do(lambda number=number: ran.append((number, threading.get_ident(), time.sleep(1e-3))))
    assert sorted(number for number, *_ in ran) == list(range(50))
    assert len({thread for _, thread, _ in ran}) == 2


@pytest.mark.usefixtures("one_thread_of_torch")
def test_the_second_begins_while_the_first_still_opens():
    done = threading.Event()
    with sharing(ENOUGH) as do:
        do(done.set)
        assert done.wait(10)


@pytest.mark.parametrize("why", ["small", "torch has threads", "one core"])
@pytest.mark.usefixtures("one_thread_of_torch")
def test_where_it_is_not_worth_it_the_caller_does_it_at_once(monkeypatch, why):
    if why == "torch has threads":
        torch.set_num_threads(2)
    if why == "one core":
        monkeypatch.setattr(side_by_side.os, "sched_getaffinity", lambda _: {0})
    ran = []
    with sharing(1000 if why == "small" else ENOUGH) as do:
        do(lambda: ran.append(threading.get_ident()))
        assert ran == [threading.get_ident()]


@pytest.mark.usefixtures("one_thread_of_torch")
def test_an_error_on_the_other_thread_is_raised_and_nothing_comes_after_it():
    ran, failed = [], threading.Event()

    def fail():
        failed.set()
        raise MemoryError("no copy")

    def share():
        with sharing(ENOUGH) as do:
            do(fail)
            assert failed.wait(10)
            time.sleep(0.05)
            do(lambda: ran.append(threading.get_ident()))
            time.sleep(0.05)

    with pytest.raises(MemoryError, match="no copy"):
        share()
    assert ran == []


@pytest.mark.usefixtures("one_thread_of_torch")
def test_an_error_of_the_caller_s_gives_up_what_was_queued():
    started, go_on, ran = threading.Event(), threading.Event(), []

    def share():
        with sharing(ENOUGH) as do:
            do(lambda: (started.set(), go_on.wait(10)))
            assert started.wait(10)
            for _ in range(5):
                do(lambda: ran.append(1))
            threading.Timer(0.1, go_on.set).start()
            raise KeyError("the body's")

    with pytest.raises(KeyError):
        share()
    assert go_on.is_set(), "it has waited for the task that ran"
    assert ran == []


class Alarm(Exception):
    """Raised by a signal's handler."""


@pytest.fixture
def alarm(monkeypatch):
    """A handler that raises: ``alarm(seconds)`` has it called.

    Python swallows what is raised inside a finaliser or a callback of the collector (Hypothesis
    has one), and says so: no finding here. Without the collector there are fewer of them.
    """

    def ring(*_):
        raise Alarm

    def unraisable(event, others=sys.unraisablehook):
        if event.exc_type is not Alarm:
            others(event)

    monkeypatch.setattr(sys, "unraisablehook", unraisable)
    gc.disable()
    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    gc.enable()


@pytest.mark.usefixtures("one_thread_of_torch")
def test_an_interruption_waits_for_the_task_that_is_running(alarm):
    started, ended = threading.Event(), threading.Event()

    def slow():
        started.set()
        time.sleep(0.3)
        ended.set()

    def share():
        with sharing(ENOUGH) as do:
            do(slow)
            assert started.wait(10)
            alarm(0.05)  # while the end waits for the other thread

    with pytest.raises(Alarm):
        share()
    assert ended.is_set()


@pytest.mark.usefixtures("one_thread_of_torch")
def test_what_interrupts_the_end_when_the_other_thread_has_said_its_word_is_raised(monkeypatch):
    """The end is gone through again then, and hears the same word: the thread is no more."""
    original, heard = side_by_side._Helper._wait, []

    def interrupted(helper):
        if heard and not helper._said:
            heard.append("nothing")
            return None
        heard.append(original(helper))
        if len(heard) == 1:
            raise Alarm
        return heard[-1]

    monkeypatch.setattr(side_by_side._Helper, "_wait", interrupted)
    with pytest.raises(Alarm):
        with sharing(ENOUGH) as do:
            do(lambda: None)
    assert heard == [None, None]


@pytest.mark.usefixtures("one_thread_of_torch")
def test_interruptions_at_any_moment_leave_no_thread_and_no_task(alarm):
    ran = []

    def task():
        ran.append(1)
        time.sleep(1e-4)

    for attempt in range(300):
        with contextlib.suppress(Alarm):
            alarm(1e-5 + attempt * 1e-5)
            with sharing(ENOUGH) as do:
                for _ in range(20):
                    do(task)
            time.sleep(0.01)  # until it rings, if it was not swallowed
        time.sleep(1e-3)
        before = len(ran)
        time.sleep(1e-3)
        assert len(ran) == before, "a task ran after the context"


@pytest.mark.usefixtures("one_thread_of_torch")
def test_where_no_thread_can_be_started_the_caller_does_it(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(side_by_side._thread, "start_new_thread", refuse)
    ran = []
    with sharing(ENOUGH) as do:
        do(lambda: ran.append(1))
        assert ran == [1]


@pytest.mark.usefixtures("one_thread_of_torch")
def test_a_child_forked_in_between_is_told_that_not_all_was_done():
    started, go_on = threading.Event(), threading.Event()

    def share():
        with sharing(ENOUGH) as do:
            do(lambda: (started.set(), go_on.wait(10)))
            assert started.wait(10)
            child = os.fork()
            go_on.set()
            return child

    child = None
    try:
        child = share()
    except RuntimeError as error:
        os._exit(7 if "forked while the batch was read" in str(error) else 1)
    if child == 0:
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("dtype", [None, torch.int32])
@pytest.mark.usefixtures("one_thread_of_torch")
def test_a_batch_is_read_under_any_mode_of_torch(make_arena, monkeypatch, mode, dtype):
    monkeypatch.setattr(side_by_side, "_WORTH_BYTES", 1)
    arena = make_arena(RouteLayout(256, 8, range(48)), capacity="16MiB")
    tickets = [add(arena, f"{index}", tokens=400).ticket for index in range(16)]
    expected = read_batch(tickets, dtype=dtype).rows
    for _ in range(10):
        with mode():
            rows = read_batch(tickets, dtype=dtype).rows
            assert torch.equal(rows, expected)
            assert torch.equal(read_batch(tickets, out=rows).rows, expected)


@pytest.mark.parametrize("dtype", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("layers", [None, slice(12, 24), [3, 40, 41]])
@pytest.mark.parametrize("experts", [256, 512])
@pytest.mark.usefixtures("one_thread_of_torch")
def test_a_batch_is_the_same(make_arena, monkeypatch, dtype, layers, experts):
    monkeypatch.setattr(side_by_side, "_WORTH_BYTES", 1)
    arena = make_arena(RouteLayout(experts, 8, range(48)), capacity="16MiB")
    tickets = [add(arena, f"{index}", tokens=900 + 7 * index).ticket for index in range(9)]
    for _ in range(3):
        rows = read_batch(tickets, layers=layers, dtype=dtype).rows
        parts = rows.split([900 + 7 * index for index in range(9)])
        for ticket, part in zip(tickets, parts, strict=True):
            with ShmRouteReader(ticket) as routes:
                expected = routes.numpy()[:, slice(None) if layers is None else layers]
                np.testing.assert_array_equal(part.numpy(), expected)


@pytest.mark.usefixtures("one_thread_of_torch")
def test_an_error_half_way_leaves_no_lease(make_arena, monkeypatch):
    monkeypatch.setattr(side_by_side, "_WORTH_BYTES", 1)
    arena = make_arena(RouteLayout(256, 8, range(48)), capacity="16MiB")
    tickets = [add(arena, f"{index}", tokens=500).ticket for index in range(8)]
    release(tickets[-1])
    with pytest.raises(RouteGone) as caught:
        read_batch(tickets)
    assert caught.value.__traceback__ is not None  # alive, with every frame of it
    assert attach(arena.segment).leases.held() == 0
