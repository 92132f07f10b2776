"""What can go wrong, by name.

::

    ShmRouteError
    ├── ArenaNotFound (FileNotFoundError)   no arena of that name on this node
    ├── ArenaTooSmall (OSError)             /dev/shm or the memory limit cannot hold the arena
    ├── ArenaFull                           no space or no slot for this record now
    ├── LeaseUnavailable (OSError)          the kernel refused a descriptor, mapping or lock
    ├── LayoutMismatch                      the segment is not one this version reads
    ├── InvalidTicket (ValueError)          these bytes are no ticket, or do not fit their record
    ├── NotOnThisNode                       the record lies in another node's memory
    ├── RouteNotFound (KeyError)            no record of this rid
    ├── RouteTimeout (TimeoutError)         the record exists and was not sealed in time
    ├── RouteGone                           the record was released or evicted
    ├── RouteFailed                         the record was given up after its ticket had left
    ├── WriterDied                          the writer died before the record was sealed
    ├── IncompleteRoutes                    some rows are missing
    ├── ChecksumMismatch                    the rows differ from what was sealed
    └── ReplayError (RuntimeError)          routes and the model that shall replay them do not fit

Every message gives the figures and the remedy.
"""

from __future__ import annotations


class ShmRouteError(Exception):
    """Base of every error that shmroute raises on purpose."""


class ArenaNotFound(ShmRouteError, FileNotFoundError):
    """No arena of that name is visible to this process."""


class ArenaTooSmall(ShmRouteError, OSError):
    """The arena cannot be given its memory: required, available and remedy are in the message."""


class ArenaFull(ShmRouteError):
    """No extent or no slot is free, and nothing could be reclaimed."""


class LeaseUnavailable(ShmRouteError, OSError):
    """The kernel refused a file descriptor, a mapping or a lock that reading or writing needs."""


class LayoutMismatch(ShmRouteError):
    """A segment is not an arena, or of another layout version, or does not fit its own header."""


class InvalidTicket(ShmRouteError, ValueError):
    """Bytes that are no ticket of this version, or whose fields contradict the record."""


class NotOnThisNode(ShmRouteError):
    """The ticket was issued on another node."""


class RouteNotFound(ShmRouteError, KeyError):
    """No live or dead arena holds a record of this rid."""

    def __str__(self) -> str:
        # KeyError would print the message as a quoted repr.
        return str(self.args[0]) if self.args else ""


class RouteTimeout(ShmRouteError, TimeoutError):
    """The record was still being written when the timeout ran out."""


class RouteGone(ShmRouteError):
    """The record was released or evicted; its space may hold another record by now."""


class RouteFailed(ShmRouteError):
    """The writer gave the record up after its ticket had left."""


class WriterDied(ShmRouteError):
    """The writer process ended before it sealed the record."""


class IncompleteRoutes(ShmRouteError):
    """The record misses rows and the reader did not ask for ``allow_missing=True``."""


class ChecksumMismatch(ShmRouteError):
    """The rows in memory do not have the checksum that was sealed with them."""


class ReplayError(ShmRouteError, RuntimeError):
    """Routes cannot be replayed in this model: another router, other layers, tokens or experts."""
