"""Readers of the crash campaign: one that lives on what is there, one that examines the dead.

A reader opens records by rid and by ticket, also those still being written, looks at every row,
keeps some, looks again before it lets go, and releases a part. An examiner opens every record
that a dead writer ever issued a ticket for.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crash_life import Life
from crash_log import EventLog, read_log
from crash_rows import look
from crash_writer import rid_of

from shmroute import ShmRouteError, ShmRouteReader
from shmroute.ticket import Ticket, decode

_HELD_MAX = 4
_STEPS_BETWEEN_NEWS = 50
_NEWS_BYTES = 2048


def read(life: Life, releases: float) -> None:
    """Read until killed; of what is opened, this share is released."""
    chance, log = life.begin()
    reading = _Reading(life, chance, log, releases)
    while True:
        for _ in range(_STEPS_BETWEEN_NEWS):
            reading.step()
        reading.hear_news()


class _Reading:
    """Records that are held, and tickets that may be used again."""

    def __init__(self, life: Life, chance: random.Random, log: EventLog, releases: float) -> None:
        self._life = life
        self._chance = chance
        self._log = log
        self._releases = releases
        self._held: deque[tuple[ShmRouteReader, dict[str, Any]]] = deque()
        self._tickets: deque[bytes] = deque(maxlen=24)

    def step(self) -> None:
        by_ticket = bool(self._tickets) and self._chance.random() < 0.6
        source = self._chance.choice(self._tickets) if by_ticket else rid_of(self._chance)
        timeout = 2e-3 if self._chance.random() < 0.02 else 0.0
        opened = open_record(self._log, source, self._life.arena, timeout)
        if opened is None:
            if isinstance(source, bytes) and self._chance.random() < 0.7:
                self._tickets.remove(source)  # most often it is gone
            return
        routes, record = opened
        self._tickets.append(routes.ticket)
        if self._chance.random() < self._releases:
            # The acknowledgement may be all that a killed process leaves: say so before.
            self._log.write("releasing", arena=record["arena"], generation=record["generation"])
            routes.release()
        if self._chance.random() < 0.3:
            self._held.append(opened)
        else:
            routes.close()
        while len(self._held) > self._chance.randrange(1, _HELD_MAX + 1):
            self._let_go()

    def _let_go(self) -> None:
        routes, record = self._held.popleft()
        seen = look(routes.numpy())
        self._log.write("read", **{**record, "how": "held"}, keys=seen.keys, orderly=seen.orderly)
        routes.close()

    def hear_news(self) -> None:
        """Tickets out of the newest writer's log, as a trainer has them before the copy ends."""
        logs = sorted(self._life.folder.glob("*-writer.log"))
        if logs:
            self._tickets.extend(_tickets_of(_tail(logs[-1])))


def open_record(
    log: EventLog, source: bytes | str, arena: str, timeout: float, **noted: Any
) -> tuple[ShmRouteReader, dict[str, Any]] | None:
    """Open a record, look at its rows, and write down what came of it."""
    since = time.monotonic()
    asked = {**_asked(source), **noted}
    try:
        routes = ShmRouteReader(source, arena=arena, timeout=timeout)
    except ShmRouteError as error:
        log.write("refused", since=since, error=type(error).__name__, **asked)
        return None
    except Exception as error:
        log.write("unnamed", error=repr(error), **asked)
        return None
    ticket = decode(routes.ticket)
    assert isinstance(ticket, Ticket)
    record = {
        "since": since,
        **asked,
        "arena": ticket.segment.arena_id.hex(),
        "generation": ticket.generation,
        "rid": routes.rid,
        "tokens": routes.tokens,
    }
    seen = look(routes.numpy())
    log.write("read", **record, keys=seen.keys, orderly=seen.orderly)
    return routes, record


def _asked(source: bytes | str) -> dict[str, Any]:
    if isinstance(source, str):
        return {"how": "rid", "asked_rid": source}
    ticket = decode(source)
    assert isinstance(ticket, Ticket)
    return {
        "how": "ticket",
        "asked_rid": ticket.rid,
        "asked": [ticket.segment.arena_id.hex(), ticket.generation],
    }


def _tail(path: Path) -> Sequence[bytes]:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _NEWS_BYTES))
        return file.read().split(b"\n")[1:-1]


def _tickets_of(lines: Sequence[bytes]) -> list[bytes]:
    marked = [line.partition(b'"ticket":"')[2] for line in lines]
    return [bytes.fromhex(text[: text.index(b'"')].decode()) for text in marked if text]


def examine(life: Life, dead: Sequence[Life]) -> None:
    """Open every record of dead writers by its ticket; of the last one nothing was reaped yet."""
    _chance, log = life.begin()
    for writer in dead:
        for event in read_log(writer.log_path):
            if event["did"] == "reserved":
                ticket = bytes.fromhex(event["ticket"])
                opened = open_record(log, ticket, life.arena, 0.0, unreaped=writer is dead[-1])
                if opened is not None:
                    opened[0].close()
