"""Is this machine, and this Python environment, ready for an arena and for the engine?

Each check looks at one thing that has kept somebody's arena from starting, or the plugin
from being loaded without a word, and names the remedy.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import segments

PLUGIN, PLUGIN_GROUP = "shmroute", "sglang.srt.plugins"
OLDEST_SGLANG, NEWEST_SGLANG = (0, 5, 13), (0, 5, 23)
SGLANG_ON_GPUS = (0, 5, 17)
OK, NOTE, PROBLEM = "ok", "note", "problem"
_GPU_DEVICE = Path("/dev/nvidiactl")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; ``remedy`` is empty unless something should be done."""

    what: str
    verdict: str
    found: str
    remedy: str = ""


def examine(capacity: int) -> list[Finding]:
    """Run every check for an arena of ``capacity`` bytes."""
    return [finding for check in _CHECKS for finding in check(capacity)]


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


def _memory(capacity: int) -> Iterator[Finding]:
    for free, limit in segments.memory_limits():
        found = f"{_mib(free)} free"
        if limit.endswith(segments.SHM_DIR):
            status = os.statvfs(segments.SHM_DIR)
            found += f" of {_mib(status.f_blocks * status.f_frsize)}"
            remedy = (
                "docker run --shm-size=... or --ipc=host; Kubernetes: an emptyDir of medium "
                f"Memory at {segments.SHM_DIR}; else mount -o remount,size=... {segments.SHM_DIR}"
            )
        else:
            remedy = "raise it (docker --memory, the pod's limits.memory), or end what uses it"
        if free >= capacity:
            yield Finding(limit, OK, found)
        else:
            short = f"{found}; an arena of {_mib(capacity)} does not fit"
            yield Finding(limit, PROBLEM, short, f"{remedy}; or a smaller --shmroute-capacity")


def _memlock(capacity: int) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = "unlimited" if limit == resource.RLIM_INFINITY else _mib(limit)
    if not _GPU_DEVICE.exists():
        yield Finding("locked memory", OK, f"{found}; no GPU here, so nothing is page-locked")
    elif limit == resource.RLIM_INFINITY or limit >= capacity:
        yield Finding("locked memory", OK, found)
    else:
        yield Finding(
            "locked memory",
            NOTE,
            f"{found}, less than the arena's {_mib(capacity)}",
            "where page-locking the arena fails: ulimit -l unlimited (docker --ulimit memlock=-1)",
        )


def _node(capacity: int) -> Iterator[Finding]:
    try:
        yield Finding("boot id", OK, segments.boot_id())
    except OSError as error:
        yield Finding(
            "boot id",
            PROBLEM,
            str(error),
            "mount /proc: the boot id tells this node's tickets from another's",
        )


def _sglang(capacity: int) -> Iterator[Finding]:
    found = _sglang_version()
    if found is None:
        remedy = (
            "pip install '.[sglang]' in shmroute's own folder, where the engine runs; a trainer "
            "needs it not"
        )
        yield Finding("sglang", NOTE, "not installed in this environment", remedy)
        return
    version = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    named = OLDEST_SGLANG, NEWEST_SGLANG, SGLANG_ON_GPUS
    oldest, newest, tested = (".".join(map(str, one)) for one in named)
    if version < OLDEST_SGLANG:
        yield Finding("sglang", PROBLEM, found, f"pip install 'sglang>={oldest}'")
    elif version > NEWEST_SGLANG:
        remedy = "nothing, if the engine starts: it stops at start where a hook site has changed"
        yield Finding("sglang", NOTE, f"{found}, newer than {newest}", remedy)
    elif version != SGLANG_ON_GPUS and _GPU_DEVICE.exists():
        remedy = (
            f"nothing, if --shmroute-shadow finds no difference; or pip install sglang=={tested}"
        )
        yield Finding("sglang", NOTE, f"{found}; on a GPU {tested} is tested", remedy)
    else:
        yield Finding("sglang", OK, found)
    yield from _plugin()


def _plugin() -> Iterator[Finding]:
    what = f"plugin {PLUGIN_GROUP}: {PLUGIN}"
    visible = [
        entry
        for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)
        if entry.name == PLUGIN
    ]
    if not visible:
        remedy = "pip install . in shmroute's own folder, into the environment that sglang runs in"
        yield Finding(what, PROBLEM, "SGLang cannot see it", remedy)
        return
    # Read as SGLang reads it: empty is no whitelist, a lone comma is one that admits nothing.
    whitelist = os.environ.get("SGLANG_PLUGINS", "")
    allowed = {name.strip() for name in whitelist.split(",")} - {""}
    if whitelist and PLUGIN not in allowed:
        remedy = f"SGLANG_PLUGINS={','.join(sorted(allowed | {PLUGIN}))}, or unset it"
        yield Finding(what, PROBLEM, f"left out: SGLANG_PLUGINS={whitelist}", remedy)
    else:
        yield Finding(what, OK, visible[0].value)


def _sglang_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


_CHECKS: tuple[Callable[[int], Iterator[Finding]], ...] = (_memory, _memlock, _node, _sglang)
