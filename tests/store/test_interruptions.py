"""Signals, forks and threads at the worst moment; rids that want to be something else."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from actors import LAYOUT, add
from forked import in_child

import shmroute
from shmroute import Arena, RouteGone, RouteNotFound, ShmRouteReader, attached, population
from shmroute.arena import _close_life, _life_fds

# Opens a record again and again while a signal handler raises at random moments of it.
INTERRUPT = """
import random, signal, sys, time
from shmroute import ShmRouteReader
from shmroute.attached import attach_all

class Interrupted(BaseException): pass

def handler(*_):
    raise Interrupted

sys.unraisablehook = lambda _: None  # some arrive inside finalisers
signal.signal(signal.SIGALRM, handler)
name, rid = sys.argv[1:]
kept = ShmRouteReader(rid, arena=name)
leases = attach_all(name)[0].leases
interrupted = lost = 0
until = time.monotonic() + 2
while time.monotonic() < until:
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-6, 1e-4))
            ShmRouteReader(rid, arena=name)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        interrupted += 1
    lost += leases.held() == 0
print(interrupted, lost)
"""


def test_an_interrupted_opening_never_takes_the_lease_of_another_view(arena):
    add(arena, "rid")
    command = [sys.executable, "-c", INTERRUPT, arena.name, "rid"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    interrupted, lost = map(int, done.stdout.split())
    assert interrupted > 100
    assert lost == 0


class Interrupted(BaseException):
    pass


@contextlib.contextmanager
def interrupted_at(line, *modules):
    """As a signal's handler that raises before the so-maniest line that these modules run."""
    files, left = {module.__file__ for module in modules}, line

    def look(frame, event, _argument):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        left -= event == "line"
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # none comes then
        if event == "line" and left < 0 and signal.SIGALRM not in held:
            raise Interrupted
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(None)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # closed all the same
@pytest.mark.parametrize("in_background", [False, True])
def test_a_creation_leaves_nothing_wherever_it_is_interrupted(name, files, in_background):
    lines = 0
    gc.collect()  # what other tests have left open
    descriptors, lives = len(os.listdir("/proc/self/fd")), set(_life_fds)
    while True:
        try:
            with interrupted_at(lines, shmroute.arena, shmroute.segments, population):
                made = Arena.create(
                    name, LAYOUT, capacity="2MiB", slots=16, in_background=in_background
                )
        except Interrupted:
            pass
        else:
            break
        gc.collect()
        assert files() == [], lines
        assert _life_fds == lives
        assert not population._under_way
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        lines += 1
    made.close()
    assert lines > 100


def test_records_that_expire_as_they_are_sealed_are_whole_or_gone(make_arena):
    """The sealing thread unlocks while the reserving one evicts: both through one description."""
    arena = make_arena(slots=4, retention=0.0)
    tickets: list[bytes] = []
    wrong: list[str] = []
    done = threading.Event()

    def seal_them(records):
        while not done.is_set() or records:
            if records:
                record = records.pop(0)
                record.rows[...] = record.generation // 2 % 200
                record.seal()
                tickets.append(record.ticket)

    def read_them():
        while not done.is_set():
            if not tickets:
                continue
            try:
                with ShmRouteReader(tickets.pop(), timeout=1) as routes:
                    if np.ptp(routes.numpy()):
                        wrong.append("torn")
            except RouteGone:
                continue
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")

    records: list = []
    threads = [
        threading.Thread(target=seal_them, args=(records,)),
        threading.Thread(target=read_them),
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 3
    count = 0
    while time.monotonic() < until:
        with contextlib.suppress(shmroute.ArenaFull):
            records.append(arena.reserve(f"rid-{count}", tokens=8))
            count += 1
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert count > 10


def test_a_fork_of_the_writer_does_not_wait_for_a_lock_that_nobody_holds_there(arena):
    record = arena.reserve("rid", tokens=4)
    with arena.writer._sealing:
        assert in_child(lambda: record.fail("in the child")) == 0
    record.seal()


def test_a_child_closes_the_life_locks_of_its_parent(arena):
    (life,) = {fd for fd in _life_fds if fd == arena._life_fd}

    def look():
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(life)
        assert not _life_fds

    assert in_child(look) == 0


def test_a_child_closes_the_life_lock_of_an_arena_that_its_maker_forgot(name):
    life = Arena.create(name, LAYOUT, capacity="2MiB", slots=16)._life_fd
    gc.collect()

    def look():
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(life)

    assert in_child(look) == 0
    _close_life(life)


def test_a_child_finds_arenas_that_another_thread_of_its_parent_was_looking_for(arena):
    """The lock that it held at the fork has no owner in the child."""
    add(arena, "rid")
    with attached._lock:
        assert in_child(lambda: ShmRouteReader("rid", arena=arena.name).close(), seconds=5) == 0


def test_a_child_without_a_descriptor_of_its_own_drops_nothing_of_its_parent(arena):
    record = add(arena, "rid")
    view = ShmRouteReader(record.ticket)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def drop():
        view.close()
        gc.collect()

    open_now = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(3, open_now), limits[1]))
    try:
        status = in_child(drop)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert status == 0
    view.release()
    assert arena.writer.reclaim() == 0
    view.close()


def test_a_newer_inline_record_takes_the_rid_from_an_older_one(arena):
    older = add(arena, "rid", tokens=3)
    rows = np.zeros((5, *arena.memory.description.routes.row_shape), dtype=older.rows.dtype)
    arena.inline("rid", rows)
    with pytest.raises(RouteNotFound):
        ShmRouteReader("rid", arena=arena.name, timeout=0)
    with ShmRouteReader(older.ticket) as routes:
        assert routes.tokens == 3


def test_a_newer_failed_record_of_another_rank_is_not_passed_over(make_arena):
    ranks: list[Arena] = [make_arena(), make_arena()]
    add(ranks[0], "rid")
    ranks[1].reserve("rid", tokens=2).fail("the copy failed")
    with pytest.raises(shmroute.RouteFailed, match="the copy failed"):
        ShmRouteReader("rid", arena=ranks[0].name, timeout=0)


def test_a_rid_that_reads_like_a_ticket_is_refused(arena):
    import base64

    victim = add(arena, "victim")
    disguised = base64.b64encode(victim.ticket).decode()
    with pytest.raises(ValueError, match="like a ticket"):
        arena.reserve(disguised, tokens=1)


def test_weight_labels_that_a_small_record_has_no_room_for_become_epochs(arena):
    record = arena.reserve("rid", tokens=4)
    record.seal(versions=[(row, row, "x" * 128) for row in range(4)])
    with ShmRouteReader(record.ticket) as routes:
        assert routes.weight_versions == tuple((row, row, f"epoch-{row}") for row in range(4))
