"""fork(): leases belong to both processes, writing only to the one that made the arena."""

from __future__ import annotations

import os
import signal
import time

import pytest
from actors import add

from shmroute import reap, release

# Forks on demand; the child obeys the same lines, through a pipe.
FORKING = """
    routes = ShmRouteReader("r", arena=NAME)
    neighbour = ShmRouteReader("neighbour", arena=NAME) if NEIGHBOUR else None
    view = routes.numpy()
    orders, ordering = os.pipe()
    answers, answering = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ordering)
        while True:
            order = os.read(orders, 1)
            if order == b"d":
                del view, routes
            if order == b"r":
                os.write(answering, b"%d" % is_intact(routes))
                continue
            if order == b"":  # the parent is dead
                signal.pause()
            if order == b"x":
                os._exit(0)
            os.write(answering, b"1")
    os.close(orders)
    def tell(order):
        os.write(ordering, order)
        return int(os.read(answers, 1))
    say(child=child)
    while True:
        heard = hear()
        if heard == "parent lets go":
            del view, routes
        elif heard == "child lets go":
            tell(b"d")
        elif heard == "child ends":
            os.write(ordering, b"x")
            os.waitpid(child, 0)
        elif heard == "child reads":
            say(intact=tell(b"r"))
            continue
        elif heard == "parent reads":
            say(intact=int(is_intact(routes)))
            continue
        say(done=heard)
"""


@pytest.fixture
def record(arena):
    return add(arena, "r")


@pytest.fixture(params=[False, True], ids=["only-lease", "one-of-two"])
def forked(request, arena, record, actor):
    """A reader process and its fork, both holding the (released) record.

    The last lease of a file is dropped by closing it, one of several by unlocking.
    """
    add(arena, "neighbour")
    process = actor(FORKING, NEIGHBOUR=request.param)
    process.child = process.hear()["child"]
    release(record.ticket)

    def order(what):
        process.say(what)
        return process.hear()

    process.order = order
    return process


@pytest.fixture
def reclaimed_soon(arena):
    """Whether a record comes free when the kernel has got to ending a process."""

    def reclaimed_soon():
        until = time.monotonic() + 10
        while not (reclaimed := arena.writer.reclaim()) and time.monotonic() < until:
            time.sleep(0.01)
        return reclaimed == 1

    return reclaimed_soon


@pytest.mark.parametrize("end", ["child lets go", "child ends"])
def test_the_parent_keeps_its_lease_when_the_child_is_done(arena, forked, end):
    forked.order(end)
    assert arena.writer.reclaim() == 0
    assert forked.order("parent reads") == {"intact": 1}
    forked.order("parent lets go")
    assert arena.writer.reclaim() == 1


def test_the_parent_keeps_its_lease_when_the_child_is_killed(arena, forked):
    os.kill(forked.child, signal.SIGKILL)
    assert arena.writer.reclaim() == 0
    assert forked.order("parent reads") == {"intact": 1}


def test_the_child_keeps_its_lease_when_the_parent_lets_go(arena, forked):
    forked.order("parent lets go")
    assert arena.writer.reclaim() == 0
    assert forked.order("child reads") == {"intact": 1}
    forked.order("child lets go")
    assert arena.writer.reclaim() == 1


def test_the_child_keeps_its_lease_when_the_parent_is_killed(arena, forked, reclaimed_soon):
    forked.kill()
    assert arena.writer.reclaim() == 0
    os.kill(forked.child, signal.SIGKILL)
    assert reclaimed_soon()


def test_a_fork_of_a_fork_has_leases_of_its_own(arena, record, actor, reclaimed_soon):
    process = actor("""
        view = ShmRouteReader("r", arena=NAME).numpy()
        ends = [os.pipe() for _ in range(2)]
        if os.fork() == 0:
            if os.fork() == 0:
                os.read(ends[1][0], 1)
                os._exit(0)
            os.read(ends[0][0], 1)
            os._exit(0)
        del view
        say()
        for _, end in ends:
            hear()
            os.write(end, b"x")
            say()
    """)
    process.hear()
    release(record.ticket)
    assert arena.writer.reclaim() == 0
    process.say()
    process.hear()
    assert arena.writer.reclaim() == 0
    process.say()
    process.hear()
    assert reclaimed_soon()


def test_a_child_can_open_records_of_its_own(arena, record, actor):
    add(arena, "other")
    process = actor("""
        routes = ShmRouteReader("r", arena=NAME)
        child = os.fork()
        if child == 0:
            with ShmRouteReader("other", arena=NAME) as other:
                os._exit(not (is_intact(other) and is_intact(routes)))
        say(status=os.waitpid(child, 0)[1])
    """)
    assert process.hear() == {"status": 0}


@pytest.mark.parametrize("views", [0, 1, 2])
def test_a_child_of_a_fork_that_nobody_was_told_of_takes_no_lease_of_its_parent(
    arena, record, actor, views
):
    """Python swallows what a signal's handler raises inside a hook of fork, and forks."""
    add(arena, "neighbour")
    process = actor(
        """
        def interrupt(frame, event, argument):
            if frame.f_code.co_name == "_before_fork":
                raise KeyboardInterrupt  # where a handler's could arrive
        sys.unraisablehook = lambda _: None
        rids = ["r", "neighbour"][:VIEWS]
        held = [ShmRouteReader(rid, arena=NAME).numpy() for rid in rids]
        if not held:
            ShmRouteReader("r", arena=NAME).close()  # whose lease file stays open
        asked, asking = os.pipe()
        sys.settrace(interrupt)
        child = os.fork()
        sys.settrace(None)
        if child == 0:
            held.clear()
            os.read(asked, 1)
            with ShmRouteReader("r", arena=NAME):
                pass
            os._exit(0)
        if not held:
            held = [ShmRouteReader("r", arena=NAME).numpy()]
        os.write(asking, b"x")
        say(status=os.waitpid(child, 0)[1])
        hear()
        """,
        VIEWS=views,
    )
    assert process.hear() == {"status": 0}
    release(record.ticket)
    assert arena.writer.reclaim() == 0


# -- the writer --------------------------------------------------------------------------------


def test_a_child_of_the_writer_cannot_write(actor):
    process = actor("""
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16)
        record = arena.reserve("r", tokens=20)
        released = add(arena, "released")
        shmroute.release(released.ticket)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            said = []
            for attempt in (lambda: arena.reserve("child", tokens=1), record.seal):
                try:
                    attempt()
                    said.append("allowed")
                except ShmRouteError as error:
                    said.append(str(error))
            said.append(arena.writer.reclaim())
            arena.close()
            os.write(writing, json.dumps(said).encode())
            os._exit(0)
        os.waitpid(child, 0)
        reserve, seal, reclaimed = json.loads(os.read(reading, 10000))
        # The parent goes on as if nothing had happened.
        record.rows[...] = pattern("r", record.generation, 20)
        record.seal()
        with ShmRouteReader(record.ticket) as routes:
            say(reserve=reserve, seal=seal, child=reclaimed, parent=arena.writer.reclaim(),
                intact=is_intact(routes))
    """)
    said = process.hear()
    assert "a fork of its writer" in said["reserve"]
    assert "closed" in said["seal"]
    assert (said["child"], said["parent"]) == (0, 1)
    assert said["intact"]


def test_a_child_that_leaves_a_reservation_by_an_exception_does_not_fail_it(actor):
    process = actor("""
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16)
        with arena.reserve("r", tokens=20) as record:
            child = os.fork()
            if child == 0:
                raise SystemExit(7)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            record.rows[...] = pattern("r", record.generation, 20)
        with ShmRouteReader(record.ticket) as routes:
            say(status=status, intact=is_intact(routes))
    """)
    assert process.hear() == {"status": 7, "intact": True}


def test_a_child_that_outlives_the_writer_keeps_nothing_of_it_alive(actor, name, files):
    writer = actor("""
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=16)
        record = arena.reserve("r", tokens=20)
        if os.fork() == 0:
            say(child=os.getpid())
            signal.pause()
        hear()
    """)
    child = writer.hear()["child"]
    writer.kill()
    assert os.path.exists(f"/proc/{child}")
    (outcome,) = reap(name)
    assert outcome.kept == ""
    assert files() == []
