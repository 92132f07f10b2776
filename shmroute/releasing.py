"""Release records that nobody needs any more, from any process of the node."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import ArenaNotFound, RouteFailed, RouteGone, ShmRouteError, WriterDied
from .reader import ShmRouteReader
from .ticket import Ticket, parse_source

_SINGLE = (str, bytes, bytearray, memoryview, Mapping, Ticket)
_LISTS = (list, tuple)  # not a union, which Python would make anew for each source


def release(sources: Any, *, arena: str | None = None, timeout: float = 5.0) -> int:
    """Release records by ticket (or rid, or response); returns how many were open to release.

    Idempotent and usable from any process of the node: records that are gone, failed or
    inline count as released already.

    Parameters
    ----------
    sources
        One source or several, as ``ShmRouteReader`` takes them, or lists of them as
        ``read_batch`` does.
    arena
        With rids: the arena's name; None searches all of this user's arenas.
    timeout
        Seconds to wait for records that are still in flight, or not known yet, all together.

    Raises
    ------
    RouteNotFound, RouteTimeout, InvalidTicket, ...
        What was wrong with the first source that could not be released; the others are.
    """
    released = 0
    failures: list[ShmRouteError] = []
    deadline = time.monotonic() + timeout
    for source in itertools.chain.from_iterable(map(records_of, as_many(sources))):
        try:
            left = max(0.0, deadline - time.monotonic())
            with ShmRouteReader(source, arena=arena, timeout=left, allow_missing=True) as routes:
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
    """One source or several, as several; what is neither will be refused as a source."""
    several = isinstance(sources, Iterable) and not isinstance(sources, _SINGLE)
    return sources if several else [sources]


def is_sequence(source: Any) -> bool:
    """Whether it is the records of one sequence and not one record."""
    return isinstance(source, _LISTS) and not isinstance(source, Ticket)


def records_of(source: Any) -> Sequence[Any]:
    """The records of a sequence, or the one that it is."""
    return source if is_sequence(source) else (source,)
