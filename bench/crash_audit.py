"""The checker of the crash campaign: reads the logs of all processes, and nothing else.

It knows from the writers' logs what may be read, and holds what every reader saw against it:

torn      rows of several records, out of place, or fewer or more than the record has
stale     whole rows of another record than the one asked for; an older record than the newest
exposed   a record was read that its writer never began to seal, or gave up
lost      a sealed record that nobody released and nothing evicted cannot be read
leaked    slots, heap or files that are not usable again when nobody has them
unnamed   an error without a name of its own, a name that cannot be here, or a crash

A process that is killed has written its intents but perhaps not its facts, so in between the
checker lets both be true, and nothing else.
"""

from __future__ import annotations

import bisect
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from crash_log import Event
from crash_rows import key_of

KINDS = ("torn", "stale", "exposed", "lost", "leaked", "unnamed")
GONE = ("RouteGone", "ArenaNotFound")
_EXPECTED = {*GONE, "RouteNotFound", "RouteTimeout", "RouteFailed", "WriterDied"}


class Finding(NamedTuple):
    """Something that must not be, and in whose log it is seen."""

    kind: str
    process: str
    event: Event


@dataclass(slots=True)
class _Record:
    rid: str
    tokens: int
    sealing_at: float | None = None
    sealed_at: float | None = None
    failing: bool = False
    released: bool = False


@dataclass(slots=True)
class _WriterLife:
    retention: float = float("inf")
    records: dict[int, _Record] = field(default_factory=dict)
    died_at: float = float("inf")
    sealed_of: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))


@dataclass(slots=True)
class Audit:
    """What the logs of one era, or of several, come to."""

    findings: list[Finding] = field(default_factory=list)
    reads: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: Audit) -> None:
        self.findings += other.findings
        self.reads += other.reads
        self.refused += other.refused
        self.kills += other.kills
        self.counts += other.counts

    def found(self, kind: str) -> int:
        return sum(finding.kind == kind for finding in self.findings)


def audit(logs: Mapping[str, Iterable[Event]]) -> Audit:
    """Check the logs of one era, by the process that wrote them."""
    kept = {name: list(events) for name, events in logs.items()}
    checker = _Checker(kept)
    for name, events in kept.items():
        for event in events:
            checker.check(name, event)
    checker.check_proofs()
    return checker.result


class _Checker:
    def __init__(self, logs: Mapping[str, list[Event]]) -> None:
        self.result = Audit()
        self._lives: dict[str, _WriterLife] = {}
        self._asked_to_prove: set[str] = set()
        self._proved: set[str] = set()
        died_at = _ends(logs)
        for name, events in logs.items():
            self._learn(events, died_at.get(name, float("inf")))
        for events in logs.values():
            self._learn_releases(events)
        for life in self._lives.values():
            for order in life.sealed_of.values():
                order.sort()

    # -- what may be read ----------------------------------------------------------------------

    def _learn(self, events: list[Event], died_at: float) -> None:
        """Take a writer's log in; other logs have no ``created``."""
        life = _WriterLife(died_at=died_at)
        for event in events:
            did = event["did"]
            if did == "born" and event["retention"] is not None:
                life.retention = event["retention"]
            elif did == "created":
                self._lives[event["arena"]] = life
            elif did == "reserved":
                life.records[event["generation"]] = _Record(event["rid"], event["tokens"])
            elif did == "failing":
                life.records[event["generation"]].failing = True
            elif did == "sealing":
                life.records[event["generation"]].sealing_at = event["at"]
            elif did == "sealed":
                record = life.records[event["generation"]]
                record.sealed_at = event["at"]
                life.sealed_of[record.rid].append((event["at"], event["generation"]))
            elif did == "releasing all":
                for record in life.records.values():
                    record.released = True

    def _learn_releases(self, events: list[Event]) -> None:
        for event in events:
            if event["did"] == "releasing":
                record = self._record(event["arena"], event["generation"])
                if record is not None:
                    record.released = True

    def _record(self, arena: str, generation: int) -> _Record | None:
        life = self._lives.get(arena)
        return None if life is None else life.records.get(generation)

    # -- what was seen -------------------------------------------------------------------------

    def check(self, name: str, event: Event) -> None:
        did = event["did"]
        if did == "read":
            if event["how"] == "held":
                self.result.counts["looks again before letting go"] += 1
            else:
                self.result.reads += 1
            self._check_read(name, event)
        elif did == "refused":
            self.result.refused[event["error"]] += 1
            self._check_refusal(name, event)
        elif did == "unnamed":
            self._find("unnamed", name, event)
        elif did == "proved":
            self._proved.add(name)
            self.result.counts["slots proved usable"] += event["usable"]
            if event["usable"] != event["slots"] or not event["heap"]:
                self._find("leaked", name, event)
        elif did == "left":
            if event["files"]:
                self._find("leaked", name, event)
        elif did == "reached":
            self.result.kills[event["point"]] += 1
        else:
            self._check_life(name, event)

    def _check_life(self, name: str, event: Event) -> None:
        did = event["did"]
        if did == "end":
            if event["status"] not in (0, -signal.SIGKILL):
                self._find("unnamed", event["process"], event)
            self.result.counts["killed"] += event["status"] == -signal.SIGKILL
            if event["outside"]:
                self.result.kills[f"{event['role']}, from outside"] += 1
        elif did == "prove":
            self._asked_to_prove.add(event["process"])
        elif did == "sealed":
            self.result.counts["sealed"] += 1
        elif did == "reserved":
            self.result.counts["reserved"] += 1

    def check_proofs(self) -> None:
        """A writer that was to prove its slots and did not has not shown them usable."""
        for name in sorted(self._asked_to_prove - self._proved):
            self._find("leaked", name, {"did": "prove", "missing": True})

    def _check_read(self, name: str, event: Event) -> None:
        record = self._record(event["arena"], event["generation"])
        if record is None or record.sealing_at is None or record.failing:
            self._find("exposed", name, event)
            return
        key = key_of(event["arena"], record.rid, event["generation"])
        whole = len(event["keys"]) == 1 and event["orderly"]
        if not whole or event["tokens"] != record.tokens:
            self._find("torn", name, event)
        elif event["keys"] != [key] or self._is_another(event, record):
            self._find("stale", name, event)
        if "unreaped" in event and not record.released:
            self.result.counts["unreleased records read after their writer's death"] += 1

    def _is_another(self, event: Event, record: _Record) -> bool:
        """Whether a whole record is not the one that was asked for."""
        if not event["rid"] == record.rid == event["asked_rid"]:
            return True
        if "asked" in event:
            return bool(event["asked"] != [event["arena"], event["generation"]])
        return event["how"] == "rid" and self._has_newer(event)

    def _has_newer(self, event: Event) -> bool:
        """Whether a newer record of the rid was sealed in that arena before the opening began."""
        order = self._lives[event["arena"]].sealed_of[event["rid"]]
        before = order[: bisect.bisect_left(order, (event["since"], 0))]
        return any(generation > event["generation"] for _at, generation in before[-4:])

    def _check_refusal(self, name: str, event: Event) -> None:
        if event["error"] not in _EXPECTED:
            self._find("unnamed", name, event)
            return
        record = self._record(*event["asked"]) if "asked" in event else None
        if record is None or record.sealed_at is None or record.sealed_at > event["since"]:
            return
        # It was sealed before the opening began, so it is there, or somebody ended it. While
        # somebody looks whether to reclaim it, its lease is busy for a moment.
        if event["error"] == "RouteTimeout" and "unreaped" not in event:
            return
        excused = record.released or self._may_be_evicted(event, record)
        if event["error"] not in GONE or not excused:
            self._find("lost", name, event)

    def _may_be_evicted(self, event: Event, record: _Record) -> bool:
        assert record.sealing_at is not None
        life = self._lives[event["asked"][0]]
        # A dead writer evicts nothing; whoever reaps does, unless nobody has reaped yet.
        seen_at = life.died_at if event.get("unreaped") else event["at"]
        return record.sealing_at + life.retention <= seen_at

    def _find(self, kind: str, name: str, event: Event) -> None:
        self.result.findings.append(Finding(kind, name, event))


def _ends(logs: Mapping[str, list[Event]]) -> dict[str, float]:
    """When each process had ended, out of the log of the one that waited for it."""
    return {
        event["process"]: event["at"]
        for events in logs.values()
        for event in events
        if event["did"] == "end"
    }
