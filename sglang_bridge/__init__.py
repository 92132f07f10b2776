"""shmroute's plugin for SGLang: routes of finished requests go to a shared-memory arena.

Turned on by ``--shmroute-arena NAME`` (or ``SHMROUTE_ARENA``, or ``sglang_bridge.Engine``);
without it nothing of SGLang is touched. See ``plugin`` for the hooks, ``publisher`` for what
happens to a finished request, ``refused`` for what does not go with it.
"""

from typing import TYPE_CHECKING, Any

from .errors import StartRefused

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Engine", "StartRefused"]


def __getattr__(name: str) -> Any:
    # Importing SGLang takes many seconds, and the plugin is imported by every process.
    if name == "Engine":
        from .engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
