"""Any order of steps, in real processes that are killed at will, against a model of dictionaries.

``make test`` runs a fixed sample in about 20 s. For a longer one::

    SHMROUTE_MODEL_EXAMPLES=2000 python -m pytest -s tests/store/test_model.py

The seed is printed; ``SHMROUTE_MODEL_SEED`` gives the same examples again, as long as the same
modules are loaded, since Hypothesis draws numbers that it finds in them, too. A sample that has not
come across everything that it should is followed by another. Where a process dies
within a step is the business of ``tests/crash``; here processes are killed between steps, so that
after each one every word, extent, counter and answer is known.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable

import numpy as np
from actors import pattern
from forked import ForkServer, Process
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model import FAILED, SEALED, WRITING, Life, Model, Record, size_of

from shmroute import ShmRouteError, ShmRouteReader, reap, reaper, segments
from shmroute.counters import read_counters
from shmroute.memory import ArenaMemory
from shmroute.ticket import decode

EXAMPLES = int(os.environ.get("SHMROUTE_MODEL_EXAMPLES", 0))
SEED = int(os.environ.get("SHMROUTE_MODEL_SEED", random.randrange(1 << 32) if EXAMPLES else 8))
SAMPLES_OF_MAKE_TEST, EXAMPLES_OF_MAKE_TEST, STEPS = 8, 120, 50

SLOTS, CAPACITY = 6, 53248  # a heap of 32 KiB, of which the largest record takes two fifths
READERS = 3
RIDS = st.sampled_from(["a", "b", "c", "a rid of more bytes than the others"])
TOKENS = st.sampled_from([1, 5, 40, 100, 200, 400])
MISSING = st.sampled_from([(), (), ((0, 1),)])

# A sample in which one of these never happened would prove little.
MUST_BE_SEEN = (
    "evicted",
    "evicted for room",
    "full",
    "lease: IncompleteRoutes",
    "lease: RouteNotFound",
    "lease: got",
    "looked: ArenaNotFound",
    "looked: RouteFailed",
    "looked: RouteGone",
    "looked: RouteTimeout",
    "looked: WriterDied",
    "looked: intact",
    "reader killed with leases",
    "reap: a reader has records open",
    "reap: records are neither released nor expired",
    "reap: removed",
    "released twice",
    "taken over from a dead one",
    "writer killed with records in flight",
)


class StoreModel(RuleBasedStateMachine):
    """One arena name, at most one writer, up to three readers, and whoever reaps."""

    def __init__(self, server: ForkServer, seen: Counter[str]) -> None:
        super().__init__()
        self.server, self.seen = server, seen
        self.name = f"t{os.getpid()}-{secrets.token_hex(3)}"
        self.model = Model()
        self.memory: dict[str, ArenaMemory] = {}
        self.writer: Process | None = None
        self.readers: dict[Process, dict[str, tuple[Life, Record, bool]]] = {}
        self.handles = (f"h{number}" for number in itertools.count())

    @property
    def life(self) -> Life:
        assert self.model.writing_life is not None
        return self.model.writing_life

    # -- writers -----------------------------------------------------------------------------

    @initialize(expires=st.booleans())
    def first_writer(self, expires: bool) -> None:
        self.takeover(expires)
        self.start_reader()

    @precondition(lambda self: self.writer is None)
    @rule(expires=st.booleans())
    def takeover(self, expires: bool) -> None:
        """A new writer's life; its creation reaps what dead ones left."""
        self.writer = self.server.start("model_processes.Writer")
        retention = 0.0 if expires else 3600.0
        made = self.writer.do(
            "create", name=self.name, capacity=CAPACITY, slots=SLOTS, retention=retention
        )
        self.seen["taken over from a dead one"] += bool(self.model.there)
        life = self.model.begin(made["segment"], SLOTS, made["heap"], expires=expires)
        segment = segments.parse_segment(life.segment)
        assert segment is not None
        self.memory[life.segment] = ArenaMemory.open(segment)

    @precondition(lambda self: self.writer and self.life.counts["requested"] >= 4)
    @rule()
    def kill_writer(self) -> None:
        self.writer.kill()
        self.seen["writer killed with records in flight"] += bool(self.life.in_state(WRITING))
        self.writer, self.life.alive = None, False

    @precondition(lambda self: self.writer and self.life.counts["requested"] >= 4)
    @rule()
    def close_writer(self) -> None:
        life = self.life
        self.writer.do("close")
        life.alive = False
        self.model.reap_one(life, force=False)
        self.writer.kill()
        self.writer = None

    # -- records -----------------------------------------------------------------------------

    @precondition(lambda self: self.writer)
    @rule(rid=RIDS, tokens=TOKENS)
    def reserve(self, rid: str, tokens: int) -> None:
        self.reserve_one(rid, tokens)

    def reserve_one(self, rid: str, tokens: int) -> Record | None:
        life, size = self.life, size_of(rid, tokens)
        life.counts["requested"] += 1
        released, evicted = life.recycled_for(size)
        given = self.writer.do("reserve", rid=rid, tokens=tokens)
        life.recycled(released, "released")
        life.recycled(evicted, "evicted")
        self.seen["evicted for room"] += len(evicted)
        if given is None:
            assert not life.has_room(size)
            life.forget(rid)
            life.counts["inline"] += 1
            return None
        assert life.has_room(size)
        assert given["size"] == size
        record = Record(rid, tokens, **given)
        life.reserved(record)
        return record

    def taken_back(self, life: Life) -> list[Record]:
        """Sealed records whose word is another one now, the first to be evicted first."""
        words = self.memory[life.segment].words
        gone = [r for r in life.in_state(SEALED) if int(words[r.slot]) != r.generation]
        return sorted(gone, key=lambda record: record.ended_at)

    @precondition(lambda self: self.writer and self.life.in_state(WRITING))
    @rule(data=st.data())
    def write_half(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(self.life.in_state(WRITING)))
        self.writer.do("write_half", generation=record.generation)

    @precondition(lambda self: self.writer and self.life.in_state(WRITING))
    @rule(data=st.data(), missing=MISSING)
    def seal(self, data: st.DataObject, missing: tuple[tuple[int, int], ...]) -> None:
        self.seal_one(data.draw(st.sampled_from(self.life.in_state(WRITING))), missing)

    def seal_one(self, record: Record, missing: tuple[tuple[int, int], ...] = ()) -> None:
        self.writer.do("seal", generation=record.generation, missing=missing)
        self.life.sealed(record, missing, self.model.now())

    @precondition(lambda self: self.writer and self.life.in_state(WRITING))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(self.life.in_state(WRITING)))
        self.writer.do("fail", generation=record.generation)
        self.life.failed(record, self.model.now())

    @precondition(lambda self: self.writer)
    @rule(rid=RIDS, tokens=TOKENS, missing=MISSING)
    def finish(self, rid: str, tokens: int, missing: tuple[tuple[int, int], ...]) -> None:
        """A whole request."""
        record = self.reserve_one(rid, tokens)
        if record is not None:
            self.seal_one(record, missing)

    @precondition(lambda self: self.writer)
    @rule(rid=RIDS, tokens=TOKENS)
    def fill_up(self, rid: str, tokens: int) -> None:
        """Requests until one goes inline, or until each only evicts another."""
        for _ in range(2 * SLOTS):
            record = self.reserve_one(rid, tokens)
            if record is None:
                self.seen["full"] += 1
                return
            self.seal_one(record)

    # -- space -------------------------------------------------------------------------------

    @precondition(lambda self: self.writer)
    @rule()
    def reclaim(self) -> None:
        expected = self.life.reclaimable()
        assert self.writer.do("reclaim") == len(expected)
        self.life.recycled(expected, "released")

    @precondition(lambda self: self.writer and self.life.expires)
    @rule(until_bytes=st.sampled_from([0, 1, 4096, 12288]))
    def evict(self, until_bytes: int) -> None:
        expected, freed = [], 0
        for record in self.life.evictable():
            expected.append(record)
            freed += record.size
            if until_bytes and freed >= until_bytes:
                break
        assert self.writer.do("evict", until_bytes=until_bytes) == len(expected)
        self.life.recycled(expected, "evicted")
        self.seen["evicted"] += len(expected)

    @precondition(lambda self: self.writer)
    @rule()
    def maintain(self) -> None:
        life, released = self.life, self.life.reclaimable()
        self.writer.do("maintain")
        evicted = [record for record in self.taken_back(life) if record not in released]
        life.recycled(released, "released")
        assert evicted == life.evictable()[: len(evicted)]
        life.recycled(evicted, "evicted")

    # -- readers -----------------------------------------------------------------------------

    @precondition(lambda self: len(self.readers) < READERS)
    @rule()
    def start_reader(self) -> None:
        self.readers[self.server.start("model_processes.Reader")] = {}

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(list(self.readers)))
        found = [life.segment for life in reversed(self.model.there)]
        assert reader.do("attach", name=self.name) == found

    @precondition(lambda self: self.readers and self.model.records(lambda *_: True))
    @rule(data=st.data(), allow_missing=st.booleans(), only_view=st.booleans())
    def lease_by_ticket(self, data: st.DataObject, allow_missing: bool, only_view: bool) -> None:
        life, record = data.draw(self.some_record())
        answer = life.answer(record, allow_missing=allow_missing)
        self.lease(data, record.ticket, life, record, answer, allow_missing, only_view)

    def some_record(self) -> st.SearchStrategy[tuple[Life, Record]]:
        """Mostly one that can be read: what has gone only goes on being gone."""
        wanted = self.model.records(lambda life, record: not life.removed and record.wanted)
        recent = self.model.records(lambda *_: True)[-12:]
        return st.sampled_from([*wanted, *wanted, *recent])

    @precondition(lambda self: self.readers and self.model.names)
    @rule(data=st.data(), allow_missing=st.booleans(), only_view=st.booleans())
    def lease_by_rid(self, data: st.DataObject, allow_missing: bool, only_view: bool) -> None:
        rid = data.draw(st.sampled_from(["nobody's", *sorted(self.model.names)]))
        answer = self.model.answer_to(rid, allow_missing=allow_missing)
        life, record = self.model.find(rid) or (None, None)
        self.lease(data, rid, life, record, answer, allow_missing, only_view)

    def lease(
        self,
        data: st.DataObject,
        source: str,
        life: Life | None,
        record: Record | None,
        answer: str,
        allow_missing: bool,
        only_view: bool,
    ) -> None:
        reader, handle = data.draw(st.sampled_from(list(self.readers))), next(self.handles)
        said = reader.do(
            "open",
            handle=handle,
            source=source,
            name=self.name,
            allow_missing=allow_missing,
            only_view=only_view,
        )
        self.seen[f"lease: {said['error'] or 'got'}"] += 1
        assert self.is_answer(said["error"], life, answer)
        if not said["error"]:
            assert life is not None
            assert record is not None
            assert (said["segment"], said["generation"]) == (life.segment, record.generation)
            assert said["intact"]
            assert tuple(map(tuple, said["missing"])) == record.missing
            record.leases += 1
            self.readers[reader][handle] = life, record, only_view

    @staticmethod
    def is_answer(error: str, life: Life | None, expected: str) -> bool:
        if life is not None and life.removed:
            # Who has it mapped still knows that it was there.
            return error in ("ArenaNotFound", "RouteGone")
        return error == expected

    def leases(self) -> list[tuple[Process, str]]:
        return [(reader, handle) for reader, held in self.readers.items() for handle in held]

    @precondition(lambda self: self.leases())
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        reader, handle = data.draw(st.sampled_from(self.leases()))
        reader.do("close", handle=handle)
        _life, record, _only_view = self.readers[reader].pop(handle)
        record.leases -= 1

    @precondition(lambda self: self.leases())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reader, handle = data.draw(st.sampled_from(self.leases()))
        _life, record, only_view = self.readers[reader][handle]
        if not only_view:
            reader.do("release", handle=handle)
            self.seen["released twice"] += record.released
            record.released = True

    @precondition(lambda self: self.readers and self.model.records(lambda *_: True))
    @rule(data=st.data())
    def release_by_ticket(self, data: st.DataObject) -> None:
        life, record = data.draw(self.some_record())
        reader = data.draw(st.sampled_from(list(self.readers)))
        said = reader.do("release_by", source=record.ticket, name=self.name)
        answer = "ArenaNotFound" if life.removed else life.answer(record)
        # What is gone, failed or orphaned needs no release.
        assert said["error"] == ("RouteTimeout" if answer == "RouteTimeout" else "")
        assert said["released"] == (answer == "")
        record.released |= answer == ""

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def kill_reader(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(list(self.readers)))
        reader.kill()
        held = self.readers.pop(reader)
        self.seen["reader killed with leases"] += bool(held)
        for _life, record, _only_view in held.values():
            record.leases -= 1

    # -- the reaper --------------------------------------------------------------------------

    @precondition(lambda self: self.model.there_dead())
    @rule(force=st.booleans())
    def reap(self, force: bool) -> None:
        found = {outcome.segment.base: outcome.kept for outcome in reap(self.name, force=force)}
        expected = self.model.reap(force=force)
        assert found == expected
        for kept in expected.values():
            self.seen[f"reap: {kept.lstrip('0123456789 ') or 'removed'}"] += 1

    # -- what must hold after every step -----------------------------------------------------

    @invariant()
    def space_is_conserved_and_no_extents_overlap(self) -> None:
        self.seen["steps"] += 1
        if self.writer is None:
            return
        space = self.writer.do("space")
        held = [[record.offset, record.size] for record in self.life.held]
        position = 0
        for offset, size in sorted([*space["free"], *space["waiting"], *held]):
            assert offset == position
            position += size
        assert position == self.life.heap

    @invariant()
    def every_word_is_its_record_s(self) -> None:
        for life in self.model.there:
            memory = self.memory[life.segment]
            assert memory.words.tolist() == life.words
            for record in life.in_state(SEALED):
                row = memory.row(record.slot)
                assert (row.generation, row.tokens) == (record.generation, record.tokens)
                assert (row.extent_offset, row.extent_bytes) == (record.offset, record.size)

    @invariant()
    def every_request_is_counted_once(self) -> None:
        for life in self.model.there:
            counted, counts = read_counters(self.memory[life.segment].counters), life.counts
            for name in ("reserved", "sealed", "failed", "released", "evicted", "incomplete"):
                assert counted[name] == counts[name], name
            for name in ("rows_sealed", "rows_missing"):
                assert counted[name] == counts[name], name
            requested = counted["ticketed"] + counted["inline"] + counted["failed_requests"]
            assert counted["finished"] == counts["requested"] == requested
            in_flight = len(life.in_state(WRITING))
            assert counted["reserved"] == counted["sealed"] + counted["failed"] + in_flight
            assert counted["ticketed"] == counted["sealed"] + in_flight
            assert counted["failed_requests"] == counted["failed"]

    @invariant()
    def leased_rows_stay_as_they_were(self) -> None:
        for reader, held in self.readers.items():
            assert not held or reader.do("torn") == []

    @invariant()
    def every_ticket_and_rid_gets_its_answer(self) -> None:
        """Sealed ones exactly their rows, unsealed and released ones never any."""
        recent = {id(record) for _life, record in self.model.records(lambda *_: True)[-6:]}
        for life, record in self.model.records(
            lambda life, record: (
                id(record) in recent
                or (not life.removed and record.state in (WRITING, SEALED, FAILED))
            )
        ):
            self.look(record.ticket, life, record, life.answer(record))
        for rid in self.model.names:
            self.look(rid, *(self.model.find(rid) or (None, None)), self.model.answer_to(rid))

    def look(self, source: str, life: Life | None, record: Record | None, answer: str) -> None:
        error, routes = "", None
        try:
            routes = ShmRouteReader(source, arena=self.name, timeout=0, allow_missing=True)
        except ShmRouteError as raised:
            error = type(raised).__name__
        self.seen[f"looked: {error or 'intact'}"] += 1
        assert self.is_answer(error, life, answer), (source, error, answer)
        if routes is None:
            return
        with routes:
            assert life is not None
            assert record is not None
            assert decode(routes.ticket).segment.base == life.segment
            assert decode(routes.ticket).generation == record.generation
            rows = pattern(record.rid, record.generation, record.tokens)
            assert np.array_equal(routes.numpy(), rows)
            assert routes.missing == record.missing

    # -- the end -----------------------------------------------------------------------------

    def teardown(self) -> None:
        """Whoever is left is killed, and then the reaper leaves nothing."""
        self.seen["examples"] += 1
        for process in [*self.readers, *([self.writer] if self.writer else [])]:
            process.kill()
        self.memory.clear()
        for segment in list(segments.list_segments(self.name)):
            reaper.reap_segment(segment, force=True)
        left = [entry for entry in os.listdir(segments.SHM_DIR) if self.name in entry]
        for entry in left:
            os.unlink(segments.path_of(entry))
        assert not left


def test_any_order_of_steps_is_as_the_model_says(
    fork_server: ForkServer, record_property: Callable[[str, int], None]
) -> None:
    seen = Counter[str]()
    for number in range(1 if EXAMPLES else SAMPLES_OF_MAKE_TEST):
        run_sample(fork_server, SEED + number, seen)
        if not unseen(seen):
            break
    for what, count in sorted(seen.items()):
        print(f"{count:7} {what}")
        record_property(what, count)
    assert unseen(seen) == []


def run_sample(server: ForkServer, number: int, seen: Counter[str]) -> None:
    examples = EXAMPLES or EXAMPLES_OF_MAKE_TEST
    print(f"seed {number}, {examples} examples of up to {STEPS} steps")
    run_state_machine_as_test(
        seed(number)(lambda: StoreModel(server, seen)),
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )


def unseen(seen: Counter[str]) -> list[str]:
    return [what for what in MUST_BE_SEEN if not seen[what]]
