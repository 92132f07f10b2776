"""Run by test_plugin in a child process: what a user sees who has the package and no arena.

Prints a JSON list: for this process and one that it spawned, the hooks that the plugin
registered, the platform that SGLang chose and whether the CPU platform was even imported.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from typing import Any


def look(_: int = 0) -> dict[str, Any]:
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    return {
        "hooks": [
            target
            for target, hooks in HookRegistry._hooks.items()
            for _kind, hook, _source in hooks
            if "sglang_bridge" in getattr(hook, "__module__", "")
        ],
        "loaded": "sglang_bridge.plugin" in sys.modules,
        "platform": type(current_platform).__name__,
        "cpu_platform": "shmroute_cpu_platform.platform" in sys.modules,
    }


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.map_async(look, [0])
        here = look()
        json.dump([here, *spawned.get(200)], sys.stdout)


if __name__ == "__main__":
    main()
