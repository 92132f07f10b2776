"""A new arena's pages are in its writer's page tables, at once or soon, whatever comes between."""

from __future__ import annotations

import logging
import mmap
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from actors import LAYOUT, add
from forked import in_child

from shmroute import Arena, ShmRouteReader, population, segments
from shmroute.arena import _life_fds
from shmroute.population import Population

PIECE = population._PIECE_BYTES
CAPACITY = 3 * PIECE


class Fresh:
    """Memory of a file that nobody has touched."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("population")
        os.posix_fallocate(self.fd, 0, CAPACITY)
        self.pages = Population(memoryview(mmap.mmap(self.fd, CAPACITY)), "a test's memory")

    @property
    def entered(self):
        return entered("/memfd:population (deleted)")


@pytest.fixture
def fresh():
    made = Fresh()
    yield made
    os.close(made.fd)


@pytest.fixture
def held(monkeypatch):
    """A population gets its first piece done, and begins with the next when this is set or it is
    stopped.
    """
    really, first, go_on = population._madvise(), threading.Event(), threading.Event()

    def hold(*arguments):
        stopped = False
        while first.is_set() and not stopped and not go_on.wait(0.002):
            stopped = any(one._stopped for one in list(population._under_way))
        first.set()
        return really(*arguments)

    monkeypatch.setattr(population, "_madvise", lambda: hold)
    yield go_on
    go_on.set()


def entered(path):
    """Bytes of the file's mapping that are in this process's page tables; a reader has another."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", maps)
    return max(map(int, found)) * 1024


# -- an arena's --------------------------------------------------------------------------------


def test_a_new_arena_s_pages_are_entered_when_it_is_there(make_arena):
    arena = make_arena(capacity=CAPACITY)
    assert entered(segments.path_of(arena.segment.data)) == CAPACITY


def test_in_the_background_they_are_soon_and_records_go_on(make_arena, held):
    arena = make_arena(capacity=CAPACITY, in_background=True)
    assert not arena.population.wait(0)
    record = add(arena, "meanwhile")
    with ShmRouteReader(record.ticket) as routes:
        assert (routes.numpy() == record.rows).all()
    held.set()
    assert arena.population.wait(60)
    assert entered(segments.path_of(arena.segment.data)) == CAPACITY


@pytest.mark.usefixtures("held")
def test_closing_ends_it_first_and_leaves_nothing(make_arena, files):
    arena = make_arena(capacity=CAPACITY, in_background=True)
    arena.close()
    assert arena.population.wait(0)
    assert files() == []


@pytest.mark.parametrize(("step", "in_background"), [("run", False), ("start", True)])
def test_interrupted_there_creation_leaves_nothing(name, files, monkeypatch, step, in_background):
    def interrupt(_self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Population, step, interrupt)
    before = set(_life_fds)
    with pytest.raises(KeyboardInterrupt):
        Arena.create(name, LAYOUT, capacity=CAPACITY, slots=16, in_background=in_background)
    assert files() == []
    assert _life_fds == before


# -- stopping ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("held")
def test_stopped_it_leaves_the_rest_and_what_was_to_follow(fresh):
    followed = []
    fresh.pages.then(lambda: followed.append("before"))
    fresh.pages.start()
    fresh.pages.stop()
    assert fresh.pages.wait(0)
    fresh.pages.then(lambda: followed.append("after"))
    assert fresh.entered <= 2 * PIECE
    assert followed == []


def test_stopped_by_the_thread_that_populates_it_waits_for_nothing(fresh, monkeypatch):
    """As by a finaliser that the collector runs there."""
    really = population._madvise()

    def collect(*arguments):
        fresh.pages.stop()
        return really(*arguments)

    monkeypatch.setattr(population, "_madvise", lambda: collect)
    fresh.pages.start()
    assert fresh.pages.wait(60)
    assert fresh.entered == PIECE


@pytest.mark.usefixtures("held")
def test_a_forked_child_waits_for_nothing(fresh):
    def look():
        fresh.pages.stop()
        assert fresh.pages.wait()

    fresh.pages.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork among threads, from 3.12 on
        assert in_child(look) == 0
    assert not fresh.pages.wait(0)


def test_a_fork_goes_on_with_nothing_of_its_parent_s(fresh):
    fresh.pages.run()
    followed = []

    def look():
        fresh.pages.then(lambda: followed.append(True))
        assert followed == []

    assert in_child(look) == 0


def test_interrupted_before_there_is_a_thread_it_is_not_waited_for(fresh, interrupted_start):
    with interrupted_start():
        fresh.pages.start()
    assert fresh.pages not in population._under_way
    fresh.pages.stop()
    assert fresh.pages.wait(0)


def test_begun_when_the_interpreter_ends_it_enters_nothing(fresh, monkeypatch):
    monkeypatch.setattr(population, "_ending", True)
    followed = []
    fresh.pages.then(lambda: followed.append(True))
    fresh.pages.start()
    assert fresh.pages.wait(60)
    assert fresh.entered == 0
    assert followed == []


def test_a_process_that_ends_meanwhile_ends_quietly(name):
    code = f"""if True:
        import time
        from shmroute import Arena, RouteLayout, population
        really = population._madvise()
        def slowly(*arguments):
            time.sleep(0.02)
            return really(*arguments)
        population._madvise = lambda: slowly
        population._PIECE_BYTES = 4096
        layout = RouteLayout(8, 2, range(4), model="a test's")
        arena = Arena.create({name!r}, layout, capacity={CAPACITY}, slots=16, in_background=True)
        assert not arena.population.wait(0.1)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- what follows ------------------------------------------------------------------------------


def test_what_follows_is_done_once_by_then_or_at_once(fresh, held):
    followed, done = [], threading.Event()
    fresh.pages.then(lambda: followed.append(threading.current_thread().name))
    fresh.pages.then(done.set)
    fresh.pages.start()
    fresh.pages.start()
    fresh.pages.run()
    assert followed == []
    held.set()
    assert done.wait(60)
    fresh.pages.then(lambda: followed.append("at once"))
    assert followed == ["shmroute-populate", "at once"]


def test_what_follows_may_fail_and_the_next_is_done(fresh, caplog):
    followed = []
    fresh.pages.then(lambda: 1 / 0)
    fresh.pages.then(lambda: followed.append(True))
    fresh.pages.run()
    assert followed == [True]
    assert "a test's memory: what was to follow its population failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


# -- what may be refused -----------------------------------------------------------------------


def test_an_older_kernel_is_not_asked_again_and_every_page_is_read(fresh, monkeypatch):
    asked, really = [], population._madvise()

    def ask(*arguments):
        asked.append(arguments)
        return really(*arguments[:2], 7777)  # a number that none knows

    monkeypatch.setattr(population, "_madvise", lambda: ask)
    fresh.pages.run()
    assert fresh.entered == CAPACITY
    assert len(asked) == 1


def test_a_file_that_somebody_shortens_is_a_warning_and_no_sigbus(fresh, caplog):
    os.truncate(fresh.fd, PIECE)
    followed = []
    fresh.pages.then(lambda: followed.append(True))
    with caplog.at_level(logging.WARNING, "shmroute"):
        fresh.pages.run()
    (said,) = caplog.messages
    assert "a test's memory: not all of its 50331648 bytes" in said
    assert "MADV_POPULATE_WRITE: Bad address" in said
    assert followed == [True]
    assert fresh.entered == PIECE


def test_without_a_thread_it_is_a_warning_and_goes_on(fresh, caplog, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    followed = []
    fresh.pages.then(lambda: followed.append(True))
    with caplog.at_level(logging.WARNING, "shmroute"):
        fresh.pages.start()
    assert "no thread for it: can't start new thread" in caplog.text
    assert fresh.pages.wait(0)
    assert followed == [True]
