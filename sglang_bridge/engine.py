"""``sglang_bridge.Engine``: SGLang's offline engine with an arena."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from typing import Any

from sglang.srt.entrypoints.engine import Engine as SGLangEngine

from . import plugin
from .errors import StartRefused
from .settings import Settings, parse_value

_PREFIX = "shmroute_"


class Engine(SGLangEngine):
    """``sglang.Engine`` that takes ``shmroute_*`` arguments.

    ::

        engine = sglang_bridge.Engine(model_path=..., shmroute_arena="rollouts")
        out = engine.generate(prompt, return_routed_experts=True)
        with ShmRouteReader(out) as routes: ...

    Parameters
    ----------
    shmroute_arena, shmroute_capacity, shmroute_slots, ...
        As the flags ``--shmroute-*``; sizes may be numbers or texts like ``"8GiB"``.
    kwargs
        SGLang's own arguments.

    Raises
    ------
    StartRefused
        SGLang would not load the plugin, or it refuses this configuration.
    ArenaTooSmall
        /dev/shm cannot hold the arena.
    """

    def __init__(self, **kwargs: Any) -> None:
        ours = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(_PREFIX)}
        wanted = with_arguments(Settings.from_environment(), ours)
        if not wanted.arena:
            raise ValueError("shmroute_arena=NAME is needed; without an arena use sglang.Engine")
        check_plugin_allowed()
        wanted.to_environment()
        # SGLang loads plugins once a process: this one may have had no arena then.
        plugin.register()
        super().__init__(**kwargs)


def with_arguments(settings: Settings, given: dict[str, Any]) -> Settings:
    """Override settings by keyword arguments named like the flags; unknown names raise."""
    fields = {_PREFIX + field.name: field for field in dataclasses.fields(Settings)}
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise TypeError(f"unknown arguments {unknown}; known are {sorted(fields)}")
    values = {}
    for name, value in given.items():
        field = fields[name]
        parsed = parse_value(field, value, name) if isinstance(value, str) else value
        values[field.name] = parsed
    return dataclasses.replace(settings, **values)


def check_plugin_allowed() -> None:
    """SGLang's whitelist can leave the plugin out without a word: then no routes would come.

    Raises
    ------
    StartRefused
        ``SGLANG_PLUGINS`` does not name it, or the distribution is not installed.
    """
    group = importlib.metadata.entry_points(group="sglang.srt.plugins")
    if "shmroute" not in group.names:
        raise StartRefused("SGLang does not see the plugin: install the shmroute distribution")
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]
    if any(allowed) and "shmroute" not in allowed:
        raise StartRefused(
            f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} leaves the plugin out: add shmroute to "
            "it or unset it"
        )
