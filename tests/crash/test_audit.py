"""The checker of the crash campaign finds what it is there for, and nothing else.

Each test gives it the logs of a small campaign that went well, with one thing changed.
"""

from __future__ import annotations

import copy
import signal
from pathlib import Path

import pytest
from crash_audit import KINDS, Audit, audit
from crash_log import Event, EventLog, read_log
from crash_rows import key_of, look, rows_of

ARENA, OTHER = "a" * 16, "b" * 16
Logs = dict[str, list[Event]]


def sealed(rid: str, generation: int, at: float) -> list[Event]:
    return [
        {"did": "reserved", "at": at, "rid": rid, "generation": generation, "slot": 0, "tokens": 5},
        {"did": "sealing", "at": at + 0.1, "generation": generation},
        {"did": "sealed", "at": at + 0.2, "generation": generation},
    ]


def read(rid: str, generation: int, since: float, **changed: object) -> Event:
    return {
        "did": "read",
        "at": since + 0.1,
        "since": since,
        "how": "ticket",
        "asked_rid": rid,
        "asked": [ARENA, generation],
        "arena": ARENA,
        "generation": generation,
        "rid": rid,
        "tokens": 5,
        "keys": [key_of(ARENA, rid, generation)],
        "orderly": True,
        **changed,
    }


def refused(generation: int, since: float, error: str, **noted: object) -> Event:
    asked = {"how": "ticket", "asked_rid": "r", "asked": [ARENA, generation]}
    return {"did": "refused", "at": since + 0.1, "since": since, "error": error, **asked, **noted}


def ended(process: str, at: float, status: int = -signal.SIGKILL, outside: bool = False) -> Event:
    role = process.partition("-")[2]
    facts = {"process": process, "role": role, "status": status, "outside": outside}
    return {"did": "end", "at": at, **facts}


GOOD: Logs = {
    "0-writer": [
        {"did": "born", "at": 0.0, "role": "writer", "retention": None},
        {"did": "created", "at": 0.5, "arena": ARENA, "slots": 12},
        *sealed("r", 2, 1.0),
        *sealed("r", 4, 2.0),
        *sealed("other", 6, 3.0),
        {"did": "reserved", "at": 4.0, "rid": "open", "generation": 8, "slot": 1, "tokens": 5},
        {"did": "reserved", "at": 4.1, "rid": "bad", "generation": 10, "slot": 2, "tokens": 5},
        {"did": "failing", "at": 4.2, "generation": 10},
        {"did": "proved", "at": 5.0, "usable": 12, "slots": 12, "heap": True},
        {"did": "reached", "at": 5.1, "point": "writer, seal 3"},
    ],
    "1-reader": [
        {"did": "born", "at": 0.0, "role": "reader", "retention": None},
        read("r", 2, 1.5),
        read("r", 4, 2.5, how="rid"),
        {"did": "releasing", "at": 3.0, "arena": ARENA, "generation": 2},
        refused(2, 3.5, "RouteGone"),
        refused(8, 4.5, "RouteTimeout"),
        refused(10, 4.6, "RouteFailed"),
    ],
    "2-examiner": [
        read("r", 4, 7.0, unreaped=True),
        read("other", 6, 7.1, unreaped=True),
        refused(8, 7.2, "WriterDied", unreaped=True),
    ],
    "campaign": [
        {"did": "prove", "at": 4.9, "process": "0-writer"},
        ended("1-reader", 5.0, outside=True),
        ended("0-writer", 6.0),
        ended("2-examiner", 8.0, status=0),
        {"did": "left", "at": 9.0, "files": []},
    ],
}


@pytest.fixture
def logs() -> Logs:
    return copy.deepcopy(GOOD)


def kinds_found(logs: Logs) -> list[str]:
    return [finding.kind for finding in audit(logs).findings]


def test_nothing_is_found_where_nothing_is_wrong(logs):
    assert kinds_found(logs) == []


def test_kills_and_reads_are_counted(logs):
    result = audit(logs)
    assert result.kills == {"writer, seal 3": 1, "reader, from outside": 1}
    assert (result.reads, result.counts["killed"]) == (4, 2)
    assert result.counts["unreleased records read after their writer's death"] == 2


# -- each kind of finding ----------------------------------------------------------------------

MIXED = [key_of(ARENA, "r", 2), key_of(ARENA, "r", 4)]

WRONG: dict[str, tuple[str, str, Event]] = {
    "rows of two records": ("torn", "1-reader", read("r", 4, 2.5, keys=MIXED)),
    "rows out of place": ("torn", "1-reader", read("r", 4, 2.5, orderly=False)),
    "rows of zeros": ("torn", "1-reader", read("r", 4, 2.5, keys=[0], orderly=False)),
    "too few rows": ("torn", "1-reader", read("r", 4, 2.5, tokens=4)),
    "a record that changed while it was held": (
        "torn",
        "1-reader",
        read("r", 4, 2.5, how="held", keys=MIXED),
    ),
    "rows of another generation": (
        "stale",
        "1-reader",
        read("r", 4, 2.5, keys=[key_of(ARENA, "r", 2)]),
    ),
    "rows of another arena": ("stale", "1-reader", read("r", 4, 2.5, keys=[key_of(OTHER, "r", 4)])),
    "another generation than the ticket's": (
        "stale",
        "1-reader",
        read("r", 4, 2.5, asked=[ARENA, 2]),
    ),
    "another rid than asked for": ("stale", "1-reader", read("other", 6, 4.0, asked_rid="r")),
    "a record that was never sealed": ("exposed", "1-reader", read("open", 8, 4.5)),
    "a record that failed": ("exposed", "1-reader", read("bad", 10, 4.5)),
    "a record that nobody made": ("exposed", "1-reader", read("r", 12, 4.5)),
    "a sealed record gone, with its writer alive": (
        "lost",
        "1-reader",
        refused(6, 4.0, "RouteGone"),
    ),
    "a sealed record gone with its writer": (
        "lost",
        "2-examiner",
        refused(4, 7.0, "RouteGone", unreaped=True),
    ),
    "a sealed record that counts as unsealed": (
        "lost",
        "2-examiner",
        refused(4, 7.0, "WriterDied", unreaped=True),
    ),
    "a sealed record whose slot is blocked for ever": (
        "lost",
        "2-examiner",
        refused(4, 7.0, "RouteTimeout", unreaped=True),
    ),
    "files that nobody removes": (
        "leaked",
        "campaign",
        {"did": "left", "at": 9.0, "files": ["shmroute-0-x-" + ARENA]},
    ),
    "an error without a name": (
        "unnamed",
        "1-reader",
        {"did": "unnamed", "at": 3.0, "error": "OSError()"},
    ),
    "a name that says the arena is damaged": (
        "unnamed",
        "1-reader",
        refused(4, 3.0, "LayoutMismatch"),
    ),
    "a process that crashed": ("unnamed", "campaign", ended("3-reader", 5.0, status=-11)),
    "a process that raised": ("unnamed", "campaign", ended("3-writer", 5.0, status=1)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_it_is_found(logs, wrong):
    kind, process, event = WRONG[wrong]
    logs[process].append(event)
    assert kinds_found(logs) == [kind]


def test_a_rid_that_brought_an_older_record_is_stale(logs):
    by_rid = read("r", 2, 2.5, how="rid")
    del by_rid["asked"]
    logs["1-reader"].append(by_rid)
    assert kinds_found(logs) == ["stale"]


def test_a_rid_opened_before_the_newer_record_was_sealed_may_bring_the_older(logs):
    by_rid = read("r", 2, 2.1, how="rid")
    del by_rid["asked"]
    logs["1-reader"].append(by_rid)
    assert kinds_found(logs) == []


def change_proof(logs: Logs, **changed: object) -> None:
    (proof,) = [event for event in logs["0-writer"] if event["did"] == "proved"]
    proof.update(changed)


def test_a_leaked_slot_is_found(logs):
    change_proof(logs, usable=11)
    assert kinds_found(logs) == ["leaked"]


def test_a_leaked_extent_is_found(logs):
    change_proof(logs, heap=False)
    assert kinds_found(logs) == ["leaked"]


def test_a_proof_that_did_not_come_is_found(logs):
    logs["0-writer"] = [event for event in logs["0-writer"] if event["did"] != "proved"]
    assert kinds_found(logs) == ["leaked"]


def test_a_record_may_be_evicted_after_its_retention_and_not_before(logs):
    logs["0-writer"][0]["retention"] = 2.0
    gone = refused(6, 0.0, "RouteGone", unreaped=True)  # sealed at 3.2; its writer died at 6
    logs["2-examiner"].append({**gone, "since": 7.0, "at": 7.1})
    assert kinds_found(logs) == []
    logs["0-writer"][0]["retention"] = 3.5
    assert kinds_found(logs) == ["lost"]


def test_eras_add_up(logs):
    total = Audit()
    for kind in KINDS:
        assert total.found(kind) == 0
    total.add(audit(logs))
    logs["0-writer"].append(WRONG["an error without a name"][2])
    total.add(audit(logs))
    assert (total.reads, total.found("unnamed"), total.found("torn")) == (8, 1, 0)


# -- what the checker is given -----------------------------------------------------------------


def test_a_line_that_a_kill_cut_short_is_no_event(tmp_path: Path):
    path = tmp_path / "0-reader.log"
    log = EventLog(path)
    log.write("born", role="reader")
    log.write("read", generation=2)
    path.write_bytes(path.read_bytes()[:-3])
    assert [event["did"] for event in read_log(path)] == ["born"]


def test_whole_rows_are_seen_as_whole():
    key = key_of(ARENA, "r", 2)
    assert look(rows_of(key, 50)) == ([key], True)


def test_every_way_to_tear_rows_is_seen():
    one, other = key_of(ARENA, "r", 2), key_of(ARENA, "r", 4)
    torn = rows_of(one, 50)
    torn[20:30] = rows_of(other, 50)[20:30]
    assert look(torn) == (sorted([one, other]), True)
    shifted = rows_of(one, 51)[1:]
    assert not look(shifted).orderly
    unfinished = rows_of(one, 50)
    unfinished[49] = 0
    assert not look(unfinished).orderly
