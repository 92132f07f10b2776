"""Names: which slot a search for a rid finds, however slots are used, freed and used again."""

from __future__ import annotations

import os
import secrets
import signal
from typing import Any

import numpy as np
import pytest
from actors import LAYOUT, add
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmroute import Arena, ArenaFull, ShmRouteReader, reaper, release
from shmroute.memory import rid_hash

SLOTS = 4
RIDS = st.sampled_from([f"rid-{index}" for index in range(6)])


class Names(RuleBasedStateMachine):
    """Few slots and few rids, against a scan of the whole table at every step."""

    def __init__(self) -> None:
        super().__init__()
        run = f"t{os.getpid()}-{secrets.token_hex(3)}"
        self.arena = Arena.create(run, LAYOUT, capacity="1MiB", slots=SLOTS, retention=0.0)
        self.table = np.zeros(SLOTS, dtype=np.uint64)
        self.open: list[Any] = []
        self.sealed: list[Any] = []

    def forget(self, rid: str) -> None:
        self.table[self.table == rid_hash(rid)] = 0

    @rule(rid=RIDS)
    def reserve(self, rid: str) -> None:
        try:
            record = self.arena.reserve(rid, tokens=1)
        except ArenaFull:
            return
        self.forget(rid)
        self.table[record.slot] = rid_hash(rid)
        self.open.append(record)

    @rule(rid=RIDS)
    def answer_inline(self, rid: str) -> None:
        self.arena.inline(rid, np.zeros((1, *LAYOUT.row_shape), LAYOUT.dtype))
        self.forget(rid)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        record = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        record.seal()
        self.sealed.append(record)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.open.pop(data.draw(st.integers(0, len(self.open) - 1))).fail("no")

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        record = self.sealed.pop(data.draw(st.integers(0, len(self.sealed) - 1)))
        release(record.ticket)

    @rule()
    def reclaim(self) -> None:
        self.arena.writer.reclaim()

    @rule()
    def evict(self) -> None:
        self.arena.writer.evict_expired()

    @invariant()
    def the_table_is_what_a_scan_would_make_of_it(self) -> None:
        assert self.arena.memory.hashes.tolist() == self.table.tolist()

    @invariant()
    def the_writer_knows_each_name_of_the_table_and_no_other(self) -> None:
        names = {int(name): slot for slot, name in enumerate(self.table) if name}
        assert self.arena.writer._slot_named == names

    def teardown(self) -> None:
        self.arena.close()
        reaper.reap_segment(self.arena.segment, force=True)


TestNames = Names.TestCase
TestNames.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def test_a_fork_of_the_writer_takes_no_name_from_its_parent(arena):
    add(arena, "rid", tokens=3)
    rows = np.zeros((1, *LAYOUT.row_shape), LAYOUT.dtype)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        arena.inline("rid", rows)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with ShmRouteReader("rid", arena=arena.name, timeout=0) as routes:
        assert routes.tokens == 3


def test_a_fork_answers_inline_while_another_thread_of_its_parent_reserved(arena):
    """The lock that a thread of the parent held at the fork has no owner in the child."""
    rows = np.zeros((1, *LAYOUT.row_shape), LAYOUT.dtype)
    with arena.writer._reserving:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            os._exit(len(arena.inline("rid", rows)) == 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("rid", ["rid", "\udc80"], ids=["text", "lone-surrogate"])
def test_a_name_that_no_record_has_is_forgotten_without_a_word(arena, rid):
    arena.writer.forget_name(rid)
    assert not arena.memory.hashes.any()
