"""Find the records that may belong to a rid, in all arenas of a name, the newest first; and
say why one is not to be had.

A hash is a hint: whoever opens a candidate compares the full rid under its lease, and finds
by the generation whether the slot has gone on to another record since.
"""

from __future__ import annotations

from . import segments
from .attached import AttachedArena, attach_all
from .errors import (
    ArenaNotFound,
    RouteFailed,
    RouteGone,
    RouteNotFound,
    RouteTimeout,
    ShmRouteError,
)
from .reaper import is_alive
from .ticket import Ticket

# Later than any record that was ever sealed.
_IN_FLIGHT = (1 << 63) - 1


def candidates(wanted: int, arena: str | None) -> list[tuple[int, int, int, AttachedArena]]:
    """``(time, generation, slot, arena)`` of the records that may have this rid, newest first.

    Data-parallel ranks and restarted engines have arenas of their own, so generations do not
    compare; the time of sealing does. What a living writer is writing is newest of all.
    """
    found = []
    for attached in attach_all(arena):
        for slot in attached.slots_of(wanted):
            generation = life_of(attached, slot)
            if generation:
                found.append((_time_of(attached, slot, generation), generation, slot, attached))
    return sorted(found, key=lambda candidate: candidate[:2], reverse=True)


def life_of(attached: AttachedArena, slot: int) -> int:
    """The slot's generation, sealed or not; of a free slot the last that it had."""
    memory = attached.memory
    word = int(memory.words[slot])
    return word & ~1 if word else max(memory.row(slot).generation, memory.failure(slot).generation)


def _time_of(attached: AttachedArena, slot: int, generation: int) -> int:
    """When the slot's record was sealed or failed; one that a dead writer was writing counts
    by its arena's age."""
    row = attached.memory.row(slot)
    if row.generation == generation:
        return row.sealed_ns
    failure = attached.memory.failure(slot)
    if failure.generation == generation:
        return failure.failed_ns
    if int(attached.memory.words[slot]) & 1 and is_alive(attached.segment):
        return _IN_FLIGHT
    return attached.memory.description.created_ns


def ended(attached: AttachedArena, slot: int, generation: int, rid: str) -> ShmRouteError:
    """Why a generation is over: it failed, or it was released or evicted."""
    failure = attached.memory.failure(slot)
    if failure.generation == generation:
        return RouteFailed(f"rid {rid!r}: the engine gave this record up: {failure.reason}")
    return RouteGone(
        f"rid {rid!r}: the record (generation {generation}) was released or evicted; open it "
        "before releasing it, or keep records longer (--shmroute-retention, "
        "--shmroute-keep-versions, a larger --shmroute-capacity)"
    )


def timed_out(
    source: Ticket | str, arena: str | None, timeout: float, *, in_flight: bool
) -> ShmRouteError:
    rid = source if isinstance(source, str) else source.rid
    if in_flight:
        return RouteTimeout(
            f"rid {rid!r}: still being written after {timeout} s; a longer timeout, or look at "
            "the engine's log"
        )
    found = attach_all(arena)
    if not found:
        return ArenaNotFound(
            f"no arena {arena or '(any name)'} under {segments.SHM_DIR} after {timeout} s: is the "
            "engine running with --shmroute-arena, as this user, and is /dev/shm shared with it "
            "(docker --ipc=host)?"
        )
    return RouteNotFound(
        f"rid {rid!r} is in none of {len(found)} arenas "
        f"({', '.join(sorted({a.segment.arena for a in found}))}) after {timeout} s: it has not "
        "finished, asked for no routes, was served inline or was evicted. With n > 1 the engine "
        "makes up a rid for each choice: use each choice's meta_info['id'] or its ticket"
    )
