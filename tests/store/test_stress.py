"""One writer, three readers that are killed at random, an arena that is used again and again."""

from __future__ import annotations

import random
import time

import pytest

from shmroute.attached import attach_all
from shmroute.counters import read_counters

SECONDS = 7.0

WRITER = """
    import random
    arena = Arena.create(NAME, LAYOUT, capacity="256KiB", slots=24, retention=0.02)
    chance, made, full, failed = random.Random(SEED), 0, 0, 0
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        rid = f"r{chance.randrange(12)}"
        try:
            record = arena.reserve(rid, tokens=chance.randrange(1, 900))
        except ArenaFull:
            full += 1
            time.sleep(1e-4)
            continue
        rows = pattern(rid, record.generation, record.tokens)
        half = record.tokens // 2
        record.rows[:half] = rows[:half]
        if chance.random() < 0.05:
            record.fail("by chance")
            failed += 1
            continue
        record.rows[half:] = rows[half:]
        record.seal()
        made += 1
        if chance.random() < 0.2:
            arena.writer.maintain()
    say(made=made, full=full, failed=failed)
    hear()
"""

READER = """
    import random
    from collections import Counter, deque
    chance, seen, tickets = random.Random(), Counter(), deque(maxlen=200)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        by_ticket = tickets and chance.random() < 0.4
        source = chance.choice(tickets) if by_ticket else f"r{chance.randrange(12)}"
        try:
            with ShmRouteReader(source, arena=NAME, timeout=0) as routes:
                ticket = routes.ticket
                if by_ticket and decode(ticket).generation != decode(source).generation:
                    seen["stale"] += 1
                seen["opened"] += 1
                seen["torn"] += not is_intact(routes)
                tickets.append(ticket)
                if chance.random() < 0.5:
                    routes.release()
                if chance.random() < 0.1:
                    time.sleep(0.002)
                seen["torn"] += not is_intact(routes)
        except (RouteGone, RouteNotFound, RouteTimeout, RouteFailed) as error:
            seen[type(error).__name__] += 1
        if seen.total() % 50 == 0:
            say(**seen)
    say(**seen)
"""


@pytest.fixture
def chance():
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


def test_nothing_torn_nothing_stale_nothing_lost(actor, chance, name):
    writer = actor(WRITER, SEED=chance.randrange(1 << 32), SECONDS=SECONDS)
    until = time.monotonic() + 30
    while not attach_all(name):
        assert time.monotonic() < until
        time.sleep(0.01)
    begun = time.monotonic()
    readers = [actor(READER, SECONDS=SECONDS + 60) for _ in range(3)]
    everyone = list(readers)
    while time.monotonic() < begun + SECONDS - 1:
        time.sleep(chance.uniform(0.2, 1.0))
        readers.pop(0).kill()
        readers.append(actor(READER, SECONDS=SECONDS + 60))
        everyone.append(readers[-1])
    wrote = writer.hear()
    for reader in readers:
        reader.kill()
    totals: dict[str, int] = {}
    for reader in everyone:
        for key, count in reader.last_said().items():
            totals[key] = totals.get(key, 0) + count
    print(wrote, totals)
    assert totals.get("torn", 0) == totals.get("stale", 0) == 0
    assert wrote["made"] > 200
    assert totals["opened"] > 200
    assert totals["RouteGone"]

    (arena,) = attach_all(name)
    counted = read_counters(arena.memory.counters)
    assert counted["reserved"] == wrote["made"] + wrote["failed"]
    assert counted["reserved"] == counted["sealed"] + counted["failed"]
    words = arena.memory.words
    assert not (words & 1).any()
    held = int((words != 0).sum())
    assert counted["sealed"] - counted["released"] - counted["evicted"] == held
