"""The order of a seal: all that the even word stands for, the word, the end of the lease."""

from __future__ import annotations

import pytest
from actors import is_intact, pattern

from shmroute import ShmRouteReader, WriterDied
from shmroute.leases import ExclusiveLeases


def test_who_comes_as_the_lease_ends_finds_the_record_sealed(arena, monkeypatch):
    record = arena.reserve("r", tokens=20)
    record.rows[...] = pattern("r", record.generation, 20)
    original, read = ExclusiveLeases.release, []

    def unlock(self, slot):
        monkeypatch.undo()
        unlocked = original(self, slot)
        with ShmRouteReader(record.ticket, timeout=0) as routes:
            read.append(is_intact(routes))
        return unlocked

    monkeypatch.setattr(ExclusiveLeases, "release", unlock)
    record.seal()
    assert read == [True]


@pytest.mark.parametrize(
    ("module", "function"), [("msgpack", "packb"), ("zlib", "crc32"), ("layout", "write_record")]
)
def test_a_writer_killed_before_the_even_word_has_not_sealed(actor, module, function, name):
    """In a slot that had a record before, whose fields are still there."""
    writer = actor(
        """
        import msgpack, zlib
        from shmroute import layout
        arena = Arena.create(NAME, LAYOUT, capacity="2MiB", slots=1, checksum=True)
        shmroute.release(add(arena, "earlier").ticket)
        arena.writer.reclaim()
        record = arena.reserve("r", tokens=20)
        say(ticket=record.ticket.hex())
        die_after(globals()[MODULE], FUNCTION)
        record.seal()
        """,
        MODULE=module,
        FUNCTION=function,
    )
    assert writer.wait() == -9
    for source in (bytes.fromhex(writer.last_said()["ticket"]), "r"):
        with pytest.raises(WriterDied):
            ShmRouteReader(source, arena=name, timeout=0)
