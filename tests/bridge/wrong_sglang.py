"""Run by test_sites in a child process: SGLang with one thing changed, then the start check.

Prints a JSON object: what was changed -> what the check said (null: nothing).
"""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# As in a scheduler process, where the target's module is imported before plugins are loaded.
import sglang.srt.entrypoints.openai.serving_chat
import sglang.srt.entrypoints.openai.serving_completions
import sglang.srt.managers.scheduler  # noqa: F401

from sglang_bridge import plugin, scheduler, sites
from sglang_bridge.errors import StartRefused

BASIC = (sites.ADD_ARGUMENTS, sites.FROM_ARGUMENTS, sites.RESOLVE)
EVERY = (*BASIC, *sites.LAUNCHER, *sites.SCHEDULER, *sites.USED)


@contextmanager
def without(target: str) -> Iterator[None]:
    """The target is gone from its module, or from its class and that one's bases."""
    path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(path)
    owners = [one for one in getattr(owner, "__mro__", (owner,)) if name in vars(one)]
    kept = {one: vars(one)[name] for one in owners}
    fields = getattr(owner, "__dataclass_fields__", {})
    field = fields.pop(name, None)
    constructor = None if fields else getattr(owner, "__init__", None)
    code = getattr(constructor, "__code__", None)
    if code is not None:
        # As if the constructor set it under another name.
        names = tuple("another_name" if one == name else one for one in code.co_names)
        constructor.__code__ = code.replace(co_names=names)
    for one in kept:
        delattr(one, name)
    try:
        yield
    finally:
        if code is not None:
            constructor.__code__ = code
        for one, value in kept.items():
            setattr(one, name, value)
        if field is not None:
            fields[name] = field


@contextmanager
def replaced(target: str, value: Any) -> Iterator[None]:
    """The target is something else."""
    path, _, name = target.rpartition(".")
    with without(target):
        owner = pkgutil.resolve_name(path)
        setattr(owner, name, value)
        try:
            yield
        finally:
            delattr(owner, name)


@contextmanager
def inherited(target: str) -> Iterator[None]:
    """The class no longer has a form of its own, only its base's."""
    path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(path)
    original = vars(owner)[name]
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, original)


def said(check: Callable[[], None]) -> str | None:
    try:
        check()
    except StartRefused as refused:
        return str(refused)
    except SystemExit as stop:
        return f"SystemExit: {stop}"
    return None


def check_everything() -> None:
    sites.check_sites(EVERY)
    sites.check_attributes()


def main() -> None:
    found: dict[str, str | None] = {"nothing": said(check_everything)}
    for site in EVERY:
        with without(site.target):
            found[f"renamed {site.target}"] = said(check_everything)
        if set(site.parameters) - {"self"}:
            with replaced(site.target, lambda something, *, entirely, other: None):
                found[f"changed {site.target}"] = said(check_everything)
        if site.own:
            with inherited(site.target):
                found[f"inherited {site.target}"] = said(check_everything)
    for target, names in sites.ATTRIBUTES.items():
        for name in names:
            with without(f"{target}.{name}"):
                found[f"without {target}.{name}"] = said(check_everything)
    found["everything back"] = said(check_everything)

    # A hook that SGLang cannot apply is only logged by it.
    for site in sites.SCHEDULER:
        found[f"not hooked {site.target}"] = said(functools.partial(sites.apply, site))
    found["all hooked"] = said(scheduler.register)
    # What the loader would swallow ends the process instead.
    os.environ["SHMROUTE_ARENA"] = "asked-for"
    with without(sites.RESOLVE.target):
        found["registered"] = said(plugin.register)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
