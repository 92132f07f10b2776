"""The corpus of ``tests/attacks``: a named error or no harm, and nobody dies of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from actors import LAYOUT, add, pattern
from attacks import Attack, corpus, forge_header, forge_record, forged_file, source
from forked import ForkServer, Process

from shmroute import Arena, release
from shmroute.segments import path_of


class Victims:
    """A victim that serves until it dies, and is replaced then: each costs 10 ms."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._one: Process | None = None

    def do(self, command: str, **facts: Any) -> Any:
        if self._one is None or self._one.status is not None:
            self._one = self._server.start("victim.Victim")
        return self._one.do(command, **facts)

    def end(self) -> int:
        return 0 if self._one is None else self._one.end()


@pytest.fixture(scope="module")
def victim(fork_server: ForkServer) -> Iterator[Victims]:
    started = Victims(fork_server)
    yield started
    assert started.end() == 0


@pytest.fixture
def is_answered(victim: Victims) -> Callable[..., None]:
    """The victim opens a source and gets what the attack must get."""

    def is_answered(attack: Attack, source: Any, arena: str | None = None) -> None:
        said = victim.do("open", source=source, arena=arena)
        assert said["error"] == attack.gets, said["says"]
        assert re.search(attack.says, said["says"], re.DOTALL), said["says"]

    return is_answered


def arena_of_tickets() -> str:
    return f"t{os.getpid()}-attacks"


@pytest.fixture(scope="module")
def envelopes() -> Iterator[tuple[bytes, bytes]]:
    """The ticket of a record, and an inline envelope, as they should be."""
    name = arena_of_tickets()
    with Arena.create(name, LAYOUT, capacity="256KiB", slots=16) as arena:
        yield add(arena, "rid").ticket, arena.inline("inline", pattern("inline", 0, 3))
        release("rid", arena=name)


@pytest.mark.parametrize("attack", corpus("tickets"))
def test_a_ticket(attack, envelopes, is_answered):
    # A rid by itself is looked for in every arena of the machine, and some programs' may be larger
    # than a victim may map.
    arena = arena_of_tickets() if attack.gets == "RouteNotFound" else None
    is_answered(attack, source(attack.facts, *envelopes), arena)


@pytest.mark.parametrize("attack", corpus("headers"))
def test_a_header(attack, arena, victim, is_answered, text):
    record = add(arena, "rid")
    forge_header(arena.memory.data, attack.facts)
    is_answered(attack, text(record.ticket))
    # A search leaves out an arena that cannot be read; one that can be answers as by ticket.
    readable = attack.says.startswith("points outside") or not attack.gets
    by_rid = victim.do("open", source="rid", arena=arena.name)["error"]
    assert by_rid == (attack.gets if readable else "ArenaNotFound")
    state = "live" if readable else "unreadable"
    assert victim.do("look", arena=arena.name, with_table=readable) == [state]


@pytest.mark.parametrize("attack", corpus("records"))
def test_a_record(attack, arena, victim, is_answered, text):
    record = add(arena, "rid", tokens=2000)
    forge_record(arena.memory, record.slot, attack.facts)
    is_answered(attack, text(record.ticket))
    by_rid = victim.do("open", source="rid", arena=arena.name)["error"]
    assert by_rid == attack.facts.get("by_rid", attack.gets)
    assert victim.do("look", arena=arena.name) == ["live"]
    # Nobody dies of reaping it either.
    arena.close()
    victim.do("reap", arena=arena.name, force=False)
    assert victim.do("reap", arena=arena.name, force=True) in ([], [""])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it gives files to another user")
@pytest.mark.parametrize("attack", corpus("files"))
def test_a_file(attack, arena, victim, is_answered, text):
    record = add(arena, "rid")
    with forged_file(Path(path_of(arena.segment.data)), attack.facts):
        is_answered(attack, text(record.ticket))
        by_rid = victim.do("open", source="rid", arena=arena.name)["error"]
        assert by_rid == attack.facts["by_rid"]
        assert victim.do("look", arena=arena.name) in (["live"], ["dead"], ["unreadable"])
        victim.do("reap", arena=arena.name, force=False)
        # Not the arena's own file: nobody takes it away, nor dies of it.
        victim.do("reap", arena=arena.name, force=True)
