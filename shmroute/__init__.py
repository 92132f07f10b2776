"""shmroute: a rollout engine's expert routing, mapped by the trainer instead of shipped to it.

::

    from shmroute import ShmRouteReader

    with ShmRouteReader(rid) as routes:       # or a ticket, or a response's meta_info
        routes.numpy()                        # [tokens, moe_layers, top_k], zero-copy
        routes.release()

    shmroute.read_batch(tickets, device="cuda")  # packed [sum(tokens), layers, top_k]; needs torch

See ``reader`` for reading, ``arena`` for writing, ``layout`` for the bytes.
"""

from .arena import Arena
from .batch import RouteBatch, read_batch
from .errors import (
    ArenaFull,
    ArenaNotFound,
    ArenaTooSmall,
    ChecksumMismatch,
    IncompleteRoutes,
    InvalidTicket,
    LayoutMismatch,
    LeaseUnavailable,
    NotOnThisNode,
    ReplayError,
    RouteFailed,
    RouteGone,
    RouteNotFound,
    RouteTimeout,
    ShmRouteError,
    WriterDied,
)
from .layout import RouteLayout
from .metadata import WeightRun
from .partition import Partition
from .reader import ShmRouteReader
from .reaper import reap
from .releasing import release
from .views import RouteArray

__all__ = [
    "Arena",
    "ArenaFull",
    "ArenaNotFound",
    "ArenaTooSmall",
    "ChecksumMismatch",
    "IncompleteRoutes",
    "InvalidTicket",
    "LayoutMismatch",
    "LeaseUnavailable",
    "NotOnThisNode",
    "Partition",
    "ReplayError",
    "RouteArray",
    "RouteBatch",
    "RouteFailed",
    "RouteGone",
    "RouteLayout",
    "RouteNotFound",
    "RouteTimeout",
    "ShmRouteError",
    "ShmRouteReader",
    "WeightRun",
    "WriterDied",
    "read_batch",
    "reap",
    "release",
]
