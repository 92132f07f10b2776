"""The bridge's error: the engine must not start."""

from __future__ import annotations


class StartRefused(RuntimeError):
    """The engine must not start: it would return wrong routes, or none, unnoticed."""
