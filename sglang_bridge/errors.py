"""The bridge's errors."""

from __future__ import annotations


class StartRefused(RuntimeError):
    """The engine must not start: it would return wrong routes, or none, unnoticed."""


class DeviceError(RuntimeError):
    """A CUDA call failed; later ones cannot be trusted."""
