"""A process that opens what attackers made, and may not be harmed by it. See ``forked``."""

from __future__ import annotations

import _pickle
import ctypes
import json
import mmap
import pickle
import random
import re
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from shmroute import ShmRouteError, ShmRouteReader, attached, cli, inspection, reap

MEMORY, CPU_SECONDS = 256 << 20, 10


def _refuse(*_arguments: Any, **_options: Any) -> None:
    raise AssertionError("untrusted bytes came to pickle")


def _audit(event: str, _arguments: Any) -> None:
    if event == "pickle.find_class":
        _refuse()


def _readable(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if first <= address < end:
            return "r" in line.split()[1]
    return False


class Victim:
    """Bounded in memory and CPU; nothing may be unpickled in it."""

    def __init__(self) -> None:
        status = Path("/proc/self/status").read_text()
        mapped = int(re.findall(r"VmSize:\s+(\d+) kB", status)[0]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        for module in (pickle, _pickle):
            for name in ("load", "loads", "Unpickler"):
                setattr(module, name, _refuse)
        sys.addaudithook(_audit)

    def open(self, source: Any, arena: str | None = None) -> dict[str, str]:
        """The error, or nothing when the record was opened and all of it read."""
        try:
            with ShmRouteReader(source, arena=arena, timeout=0, allow_missing=True) as routes:
                routes.verify()
                said = [routes.native().sum(), routes.missing, routes.weight_versions, routes]
                return {"error": "", "says": str([*said, routes.ticket])}
        except ShmRouteError as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            public = next(name for name in names if not name.startswith("_"))
            return {"error": public, "says": str(error)}

    def guard(self, source: str) -> bool:
        """Attach with a page behind the mapping that nobody may touch; whether it is there."""
        anywhere = ctypes.CDLL(None).mmap
        tried = []
        while len(tried) < 99:
            # The kernel puts the next mapping right below the last, unless it fits into a gap.
            anywhere(None, mmap.PAGESIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            attached._attached.clear()
            self.open(source)
            (arena,) = attached._attached.values()
            tried.append(arena)  # it fills its gap
            self._end = arena.memory.heap_address + len(arena.memory.heap)
            if not _readable(self._end):
                return True
        return False

    def peek(self, behind: int) -> int:
        """Read a byte ``behind`` the mapping's end; -1 is within it."""
        return ctypes.string_at(self._end + behind, 1)[0]

    def look(self, arena: str, with_table: bool = False) -> list[str]:
        """What the commands make of it; the state of each segment. ``ls`` takes 60 ms."""
        table = [["ls"]] if with_table else []
        for command in (*table, ["stat", arena], ["gc", "--dry-run", arena]):
            done = CliRunner().invoke(cli.main, command)
            assert done.exit_code == 0, (command, done.output, done.exc_info)
            assert "\x1b" not in done.output
        reports = inspection.inspect_all(arena)
        json.dumps([report.as_json() for report in reports])
        return [report.state for report in reports]

    def reap(self, arena: str, force: bool) -> list[str]:
        return [outcome.kept for outcome in reap(arena, force=force)]

    def open_again_and_again(self, sources: list[Any], arena: str, seconds: float) -> Any:
        """Map the arena anew for each opening; how often each came of it."""
        seen, until = Counter[str](), time.monotonic() + seconds
        while time.monotonic() < until:
            attached._attached.clear()
            seen[self.open(random.choice(sources), arena)["error"] or "opened"] += 1
        return seen
