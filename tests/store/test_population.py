"""A new arena's pages are in its writer's page tables, at once or soon, whatever comes between."""

from __future__ import annotations

import logging
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from actors import add

from shmroute import ShmRouteReader, population, segments
from shmroute.population import Population

CAPACITY = 48 << 20  # three pieces
LARGE = 512 << 20  # tenths of a second


@pytest.fixture
def fresh(tmp_path):
    """A function that maps that many bytes of memory nobody has touched, taken from tmpfs."""
    files = []

    def make(size=CAPACITY):
        path = Path(segments.SHM_DIR, f"population-{os.getpid()}-{len(files)}")
        files.append(path)
        with path.open("xb+") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return path, mmap.mmap(file.fileno(), size)

    yield make
    for path in files:
        path.unlink()


def entered(path):
    """Bytes of the file's mapping that are in this process's page tables."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", maps)
    return int(found[1]) * 1024


def is_alive():
    return any(thread.name == "shmroute-populate" for thread in threading.enumerate())


def test_a_new_arena_s_pages_are_entered_when_it_is_there(make_arena):
    arena = make_arena(capacity=CAPACITY)
    assert entered(segments.path_of(arena.segment.data)) == CAPACITY
    assert not is_alive()


def test_in_the_background_they_are_soon_and_records_go_on(make_arena):
    arena = make_arena(capacity=CAPACITY, in_background=True)
    record = add(arena, "meanwhile")
    assert arena.population.wait(60)
    assert entered(segments.path_of(arena.segment.data)) == CAPACITY
    with ShmRouteReader(record.ticket) as routes:
        assert (routes.numpy() == record.rows).all()


def test_closing_ends_it_first_and_leaves_nothing(make_arena, files):
    arena = make_arena(capacity=LARGE, in_background=True)
    arena.close()
    assert arena.population.wait(60)
    assert entered(f"{segments.path_of(arena.segment.data)} (deleted)") < LARGE / 2
    assert files() == []


def test_stopped_it_leaves_the_rest_and_what_was_to_follow(fresh):
    path, mapping = fresh(LARGE)
    pages = Population(memoryview(mapping), "a test's")
    followed = []
    pages.then(lambda: followed.append("before"))
    pages.start()
    pages.stop()
    assert pages.wait(0)
    pages.then(lambda: followed.append("after"))
    assert entered(path) < LARGE
    assert followed == []


def test_what_follows_is_done_once_by_then_or_at_once(fresh):
    _, mapping = fresh()
    pages = Population(memoryview(mapping), "a test's")
    followed, done = [], threading.Event()
    pages.then(lambda: followed.append(threading.current_thread().name))
    pages.then(done.set)
    pages.start()
    pages.start()
    pages.run()
    assert done.wait(60)
    pages.then(lambda: followed.append("at once"))
    assert followed == ["shmroute-populate", "at once"]


def test_an_older_kernel_is_not_asked_again_and_every_page_is_read(fresh, monkeypatch):
    monkeypatch.setattr(population, "_POPULATE_WRITE", 7777)
    path, mapping = fresh()
    pages = Population(memoryview(mapping), "a test's")
    pages.run()
    assert entered(path) == CAPACITY
    assert not pages._asked


def test_a_file_that_somebody_shortens_is_a_warning_and_no_sigbus(fresh, caplog):
    path, mapping = fresh()
    os.truncate(path, CAPACITY // 2)
    pages = Population(memoryview(mapping), "a test's memory")
    followed = []
    pages.then(lambda: followed.append(True))
    with caplog.at_level(logging.WARNING, "shmroute"):
        pages.run()
    (said,) = caplog.messages
    assert "a test's memory: not all of its 50331648 bytes" in said
    assert "MADV_POPULATE_WRITE: Bad address" in said
    assert followed == [True]
    assert entered(path) == CAPACITY // 2


def test_without_a_thread_it_is_a_warning_and_goes_on(fresh, caplog, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    pages = Population(memoryview(fresh()[1]), "a test's")
    followed = []
    pages.then(lambda: followed.append(True))
    with caplog.at_level(logging.WARNING, "shmroute"):
        pages.start()
    assert "no thread for it: can't start new thread" in caplog.text
    assert pages.wait(0)
    assert followed == [True]


def test_a_forked_child_waits_for_nothing(fresh):
    _, mapping = fresh(LARGE)
    pages = Population(memoryview(mapping), "a test's")
    pages.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork among threads, from 3.12 on
        child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends it
        pages.stop()
        os._exit(7 if pages.wait() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert pages.wait(60)


def test_a_process_that_ends_meanwhile_ends_quietly(name):
    code = f"""if True:
        from shmroute import Arena, RouteLayout
        layout = RouteLayout(8, 2, range(4), model="a test's")
        arena = Arena.create({name!r}, layout, capacity={LARGE}, slots=16, in_background=True)
        assert not arena.population.wait(0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
