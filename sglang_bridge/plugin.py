"""The plugin's entry point: which hooks go where, in which process.

SGLang calls ``register`` in every process that it starts, before it parses its flags. With
no arena asked for, nothing is registered. Otherwise:

- the launcher learns the flags, checks that this SGLang is one the bridge knows, refuses
  what it cannot keep its promises with, and reaps arenas when its engine has gone. It may be
  a child process itself (trainers start their engines in one), so every process has the
  hooks that make it one; the record that it resolves carries a mark that it was checked;
- a scheduler gets the capture hooks, and does not start from a record without that mark.

Errors end the process: SGLang swallows a plugin's exceptions, and an engine without its
hooks would go on natively.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from shmroute import reaper, segments
from shmroute.arena import checked_size

from . import settings, sites
from .errors import StartRefused
from .settings import Settings
from .versions import resolved_arguments

logger = logging.getLogger("shmroute")

# Another engine may have an arena of this name, and lives on: so long it is waited for nothing.
_DYING_SECONDS = 2.0


def register() -> None:
    """Entry point of ``sglang.srt.plugins``; calling it again does nothing more."""
    try:
        asked = Settings.from_environment().arena
        spawned = multiprocessing.parent_process() is not None
        if asked or (not spawned and settings.flags_wanted()):
            _register_launcher()
        if asked and spawned and "sglang.srt.managers.scheduler" in sys.modules:
            from . import scheduler

            scheduler.register()
    except (StartRefused, ValueError) as error:
        # SystemExit, because SGLang's loader swallows every Exception.
        raise SystemExit(f"shmroute: the engine does not start: {error}") from error
    except Exception as error:
        raise SystemExit(
            f"shmroute: the engine does not start: {type(error).__name__}: {error}"
        ) from error


# -- launcher ----------------------------------------------------------------------------------


@functools.cache
def _register_launcher() -> None:
    basic = (sites.ADD_ARGUMENTS, sites.FROM_ARGUMENTS, sites.RESOLVE)
    sites.check_sites(basic)
    sites.hook(sites.ADD_ARGUMENTS, _add_arguments, "AFTER")
    sites.hook(sites.FROM_ARGUMENTS, _from_arguments, "AROUND")
    sites.hook(sites.RESOLVE, _resolve, "AROUND")
    sites.apply(*basic)


def _add_arguments(_result: None, parser: Any) -> None:
    settings.add_arguments(parser)


def _from_arguments(original: Callable[..., Any], cls: type, arguments: Any) -> Any:
    try:
        settings.from_arguments(arguments).to_environment()
    except ValueError as error:
        raise SystemExit(f"shmroute: {error}") from error
    return original(cls, arguments)


def _resolve(original: Callable[[Any], None], arguments: Any) -> None:
    """Around ``ServerArgs``' resolution: the one place that every way of starting passes.

    It is called several times for one record, in each process that the record reaches.
    """
    wanted = Settings.from_environment()
    if not wanted.arena or sites.checked_for(arguments) == wanted.arena:
        return original(arguments)
    fresh = not getattr(arguments, "_resolution_finished", False)
    if fresh:
        arguments.enable_return_routed_experts = True
    original(arguments)
    prepare_launch(wanted, arguments)
    sites.mark_checked(arguments, wanted.arena)
    return None


def prepare_launch(wanted: Settings, arguments: Any) -> None:
    """Check everything that can be known before processes are started, then hook the launcher.

    Raises
    ------
    StartRefused
        This SGLang or this configuration is not one in which routes are known to be right.
    ArenaTooSmall
        /dev/shm or the memory limit cannot hold the arenas.
    """
    from .refused import refuse_features

    sites.check_sites((*sites.LAUNCHER, *sites.SCHEDULER, *sites.USED))
    sites.check_attributes()
    _check_imports()
    from sglang.srt.environ import envs

    resolved = resolved_arguments(arguments)
    if not resolved.enable_return_routed_experts:
        raise StartRefused("the ServerArgs were resolved without enable_return_routed_experts")
    refuse_features(resolved)
    _check_capacity(wanted)
    if envs.SGLANG_RUST_SERVER.get():
        raise StartRefused("SGLANG_RUST_SERVER: its responses do not pass where tickets are put in")
    reaper.reap(wanted.arena)
    # The arenas themselves are made once the model's layers are known; that they would fit
    # is checked before minutes of loading.
    ranks = max(1, resolved.dp_size) * max(1, resolved.attn_dp_size)
    segments.check_memory(wanted.capacity * ranks, wanted.arena)
    _hook_launcher()
    _launched.add(wanted.arena)


def _check_capacity(wanted: Settings) -> None:
    """What no model's rows would fit need not wait for the model's."""
    try:
        checked_size(wanted.capacity, wanted.slots, row_bytes=1)
    except ValueError as error:
        raise StartRefused(f"--shmroute-capacity, --shmroute-slots: {error}") from error


def _check_imports() -> None:
    """What a scheduler process imports for the hooks must be there before one is started."""
    try:
        from . import scheduler  # noqa: F401
    except ImportError as error:
        raise StartRefused(
            f"SGLang {sites.version()}: {error}; shmroute does not know this version of it. Use a "
            "version that the README lists"
        ) from error


# Arenas of the engines that this process has launched, to be reaped when they are killed.
_launched: set[str] = set()


@functools.cache
def _hook_launcher() -> None:
    sites.hook(sites.CHAT, _refuse_several_choices, "AFTER")
    sites.hook(sites.COMPLETION, _refuse_several_choices, "AFTER")
    sites.hook(sites.KILLED, functools.partial(_reap_after_kill, os.getpid()), "AFTER")
    sites.apply(sites.CHAT, sites.COMPLETION, sites.KILLED)


def _refuse_several_choices(result: str | None, _serving: Any, request: Any) -> str | None:
    """OpenAI's response has one place for routes: with several choices the rest would be lost."""
    if result or not request.return_routed_experts:
        return result
    if getattr(request, "return_meta_info", False) and not request.stream:
        return result  # here every choice carries its own
    several = (request.n or 1) > 1 or _prompts(request) > 1
    if not several:
        return result
    return (
        "return_routed_experts with several choices (n > 1, or a list of prompts): this API "
        "returns the routes of one choice only and the others would be lost. Send one request "
        "per choice, or use the native /generate, where every choice carries its own"
    )


def _prompts(request: Any) -> int:
    prompt = getattr(request, "prompt", None)
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return 1
    return len(prompt)


def _reap_after_kill(
    launcher: int,
    _result: None,
    parent_pid: int | None = None,
    include_parent: bool = True,
    *_args: Any,
    **_options: Any,
) -> None:
    """The launcher has killed its engine: remove what nobody needs of its arenas."""
    if os.getpid() == launcher and parent_pid in (None, launcher) and not include_parent:
        deadline = time.monotonic() + _DYING_SECONDS
        for arena in _launched:
            _reap_dying(arena, deadline)


def _reap_dying(arena: str, deadline: float) -> None:
    """A killed scheduler keeps its arena alive until the kernel has taken it apart."""
    while True:
        reaper.reap(arena)
        mine = (one for one in segments.list_segments(arena) if one.uid == os.geteuid())
        if not any(map(reaper.is_alive, mine)) or time.monotonic() >= deadline:
            return
        time.sleep(0.02)
