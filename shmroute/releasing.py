"""Release records that nobody needs any more, from any process of the node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import ArenaNotFound, RouteFailed, RouteGone, ShmRouteError, WriterDied
from .reader import ShmRouteReader
from .ticket import Ticket, parse_source


def release(sources: Any, *, arena: str | None = None, timeout: float = 5.0) -> int:
    """Release records by ticket (or rid, or response); returns how many were open to release.

    Idempotent and usable from any process of the node: records that are gone, failed or
    inline count as released already.

    Parameters
    ----------
    sources
        One source or several, as ``ShmRouteReader`` takes them.
    arena
        With rids: the arena's name; None searches all of this user's arenas.
    timeout
        Seconds to wait for a record that is still in flight.

    Raises
    ------
    RouteNotFound, RouteTimeout, InvalidTicket, ...
        What was wrong with the first source that could not be released; the others are.
    """
    released = 0
    failures: list[ShmRouteError] = []
    for source in as_many(sources):
        try:
            with ShmRouteReader(source, arena=arena, timeout=timeout, allow_missing=True) as routes:
                routes.release()
                released += not routes.inline
        except (RouteGone, RouteFailed, WriterDied):
            continue  # nothing left to release
        except ArenaNotFound as error:
            # A ticket's record is gone with its arena; a rid may only have been looked for wrongly.
            if not isinstance(parse_source(source), Ticket):
                failures.append(error)
        except ShmRouteError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return released


def as_many(sources: Any) -> Iterable[Any]:
    """One source or several, as several."""
    single = isinstance(sources, str | bytes | bytearray | memoryview | dict)
    return [sources] if single else sources
