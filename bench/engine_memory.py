"""Memory of an engine's processes, of its GPU and of its arena, as the kernel and driver say.

``VmPin`` and ``VmLck`` do not show what CUDA page-locks; ``torch.cuda.host_memory_stats`` in the
scheduler (see ``engine_trace``) and the arena's size do.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil

from shmroute import inspection

FIELDS = ("VmRSS", "VmHWM", "RssAnon", "RssShmem", "VmLck", "VmPin")


def of_process(pid: int) -> dict[str, Any]:
    """Bytes by field of /proc/PID/status, proportional (Pss) and private (Uss) ones, its name."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in FIELDS:
                found[name] = int(value.split()[0]) * 1024
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                found["Pss"] = int(line.split()[1]) * 1024
            elif line.startswith("Private_"):
                found["Uss"] = found.get("Uss", 0) + int(line.split()[1]) * 1024
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        found["runs"] = words[0].decode(errors="replace").rpartition("/")[2]
    return found


def of_engine(server: int, arena: str | None) -> dict[str, Any]:
    """A server by its process id and its children, GPU and arena."""
    children = [child.pid for child in psutil.Process(server).children(recursive=True)]
    return {
        "main": of_process(server),
        "children": [of_process(pid) for pid in children],
        "gpu_used": gpu_used_if_any(),
        "arena": of_arena(arena) if arena else {},
    }


def scheduler(reading: dict[str, Any]) -> dict[str, Any]:
    """The engine's largest process: SGLang names it ``sglang::scheduler``."""
    named = [one for one in reading["children"] if "scheduler" in one.get("runs", "")]
    return max(named or reading["children"], key=lambda one: one.get("VmRSS", 0), default={})


def counters(arena: str) -> dict[str, int]:
    """Counters of the live arena of this name."""
    for report in inspection.inspect_all(arena):
        if report.counters:
            return report.counters
    return {}


def of_arena(arena: str) -> dict[str, Any]:
    """Bytes that the live arena of this name takes, has in use, and that its route table takes."""
    reports = [report for report in inspection.inspect_all(arena) if report.counters]
    if not reports:
        return {}
    return {
        "taken": reports[0].taken_bytes,
        "in_use": reports[0].use.unreleased_bytes if reports[0].use else 0,
        "table": reports[0].counters["table_bytes"],
    }


def gpu_used() -> int:
    """Bytes in use on the GPU that this process sees first, by whatever process.

    Raises
    ------
    OSError, subprocess.SubprocessError
        There is no nvidia-smi, or it does not answer.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", f"--id={first}", *query]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return int(done.stdout.split()[0]) << 20


def gpu_used_if_any() -> int | None:
    """`gpu_used`, None where there is no GPU."""
    try:
        return gpu_used()
    except (OSError, subprocess.SubprocessError):
        return None
