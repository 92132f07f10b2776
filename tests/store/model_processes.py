"""The writer and the reader of the model test, see ``forked``."""

from __future__ import annotations

import base64
from typing import Any

from actors import LAYOUT, is_intact, pattern

from shmroute import Arena, ArenaFull, ShmRouteError, ShmRouteReader, release
from shmroute.attached import attach_all
from shmroute.counters import ENGINE, SharedCounters
from shmroute.ticket import decode


class Writer:
    """An engine: each request gets a ticket, or its rows inline when the arena is full."""

    def __init__(self) -> None:
        self._open: dict[int, Any] = {}

    def create(self, name: str, **options: Any) -> dict[str, Any]:
        self._arena = Arena.create(name, LAYOUT, **options)
        self._requests = SharedCounters(self._arena.memory.counters, ENGINE)
        return {"segment": self._arena.segment.base, "heap": self._arena.writer._allocator.total}

    def reserve(self, rid: str, tokens: int) -> dict[str, Any] | None:
        self._requests.add("finished")
        try:
            record = self._arena.reserve(rid, tokens=tokens)
        except ArenaFull:
            self._requests.add("inline")
            self._arena.inline(rid, pattern(rid, 0, tokens))
            return None
        self._requests.add("tickets")
        self._open[record.generation] = record
        return {
            "slot": record.slot,
            "generation": record.generation,
            "offset": record.offset,
            "size": record.plan.total_bytes,
            "ticket": base64.b64encode(record.ticket).decode(),
        }

    def write_half(self, generation: int) -> None:
        record = self._open[generation]
        half = record.tokens // 2
        record.rows[:half] = pattern(record.rid, generation, record.tokens)[:half]

    def seal(self, generation: int, missing: list[list[int]]) -> None:
        record = self._open.pop(generation)
        record.rows[...] = pattern(record.rid, generation, record.tokens)
        record.seal(missing=[(first, end) for first, end in missing])

    def fail(self, generation: int) -> None:
        self._open.pop(generation).fail("as the test wants")
        self._requests.add("failed_after_ticket")

    def reclaim(self) -> int:
        return self._arena.writer.reclaim()

    def evict(self, until_bytes: int) -> int:
        return self._arena.writer.evict_expired(until_bytes=until_bytes)

    def maintain(self) -> None:
        self._arena.writer.maintain()

    def space(self) -> dict[str, Any]:
        """Free extents, and those that wait to be taken back."""
        writer = self._arena.writer
        waiting = [(offset, size) for _slot, offset, size in writer._freed]
        return {"free": writer._allocator.free_extents(), "waiting": waiting}

    def close(self) -> None:
        self._arena.close()


class Reader:
    """A trainer: it opens records, keeps readers or only views of their rows, lets go of them."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}
        self._expected: dict[str, Any] = {}

    def attach(self, name: str) -> list[str]:
        return [attached.segment.base for attached in attach_all(name)]

    def open(
        self, handle: str, source: str, name: str, allow_missing: bool, only_view: bool
    ) -> dict[str, Any]:
        try:
            routes = ShmRouteReader(source, arena=name, timeout=0, allow_missing=allow_missing)
        except ShmRouteError as error:
            return {"error": type(error).__name__}
        generation = decode(routes.ticket).generation
        self._held[handle] = routes.numpy()[1:] if only_view else routes
        self._expected[handle] = pattern(routes.rid, generation, routes.tokens)
        return {
            "error": "",
            "segment": decode(routes.ticket).segment.base,
            "generation": generation,
            "intact": is_intact(routes),
            "missing": routes.missing,
        }

    def torn(self) -> list[str]:
        """Handles whose rows are not those that were opened."""
        return [handle for handle in self._held if not self._is_intact(handle)]

    def _is_intact(self, handle: str) -> bool:
        held, expected = self._held[handle], self._expected[handle]
        if isinstance(held, ShmRouteReader):
            return bool((held.numpy() == expected).all())
        return bool((held == expected[1:]).all())

    def release(self, handle: str) -> None:
        self._held[handle].release()

    def release_by(self, source: str, name: str) -> dict[str, Any]:
        try:
            return {"error": "", "released": release(source, arena=name, timeout=0)}
        except ShmRouteError as error:
            return {"error": type(error).__name__, "released": 0}

    def close(self, handle: str) -> None:
        del self._held[handle], self._expected[handle]
