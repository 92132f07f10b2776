"""A plugin for SGLang that writes down which hooks shmroute has in each process.

``SGLANG_HOOK_PROBE`` names the folder; every process of the engine keeps a file there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

VARIABLE = "SGLANG_HOOK_PROBE"
INTERVAL = 0.5


def register() -> None:
    """Entry point of ``sglang.srt.plugins``."""
    # Other plugins register after this one, and hooks may come later still.
    threading.Thread(target=_keep_writing, daemon=True).start()


def _keep_writing() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    process = multiprocessing.current_process().name
    if multiprocessing.parent_process() is None:
        process = "launcher"
    file = Path(os.environ[VARIABLE], f"{os.getpid()}.json")
    while True:
        registered = list(HookRegistry._hooks.items())
        hooks = sorted(target for target, hooks in registered if any(map(_may_be_ours, hooks)))
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"process": process, "hooks": hooks}))
        unfinished.rename(file)
        time.sleep(INTERVAL)


def _may_be_ours(hook: tuple[Any, Any, Any]) -> bool:
    """Not another distribution's; hooks that come after the plugins' loading name none."""
    source = hook[2]
    return source is None or source.dist_name.startswith("shmroute")


class HookProbe:
    """The probe as a distribution that an engine finds on its path.

    Parameters
    ----------
    folder
        An empty one, for the distribution and for what the probe writes.
    """

    def __init__(self, folder: Path) -> None:
        self._written = folder / "written"
        self._written.mkdir()
        information = folder / "path" / "hook_probe-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: hook-probe\nVersion: 1.0\n"
        )
        (information / "entry_points.txt").write_text(
            "[sglang.srt.plugins]\nhook_probe = hook_probe:register\n"
        )
        path = os.pathsep.join([str(information.parent), str(Path(__file__).parent)])
        self.env = {"PYTHONPATH": path, VARIABLE: str(self._written)}

    def hooks(self) -> dict[str, list[str]]:
        """Targets of shmroute's hooks by process; waits for what each process writes next."""
        now = time.time()
        deadline = time.monotonic() + 30.0
        while any(file.stat().st_mtime < now for file in self._written.glob("*.json")):
            assert time.monotonic() < deadline, "a process has stopped writing"
            time.sleep(INTERVAL / 5)
        found = [json.loads(file.read_text()) for file in self._written.glob("*.json")]
        return {process["process"]: process["hooks"] for process in found}
