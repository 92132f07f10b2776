"""What the processes of the crash campaign leave behind them: one line an event.

Each process appends to a file of its own with one ``os.write`` a line, so that what it did
before a SIGKILL is in the file, and a line that was cut short can only be its last one.
Intents are written before an act (``sealing``) and facts after it (``sealed``): the checker
knows what may have happened, and what must have. ``at`` is CLOCK_MONOTONIC, which all
processes share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class EventLog:
    """The file of one process."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def write(self, did: str, **facts: Any) -> None:
        event = {"did": did, "at": time.monotonic(), **facts}
        os.write(self._fd, json.dumps(event, separators=(",", ":")).encode() + b"\n")


def read_log(path: Path) -> Iterator[Event]:
    """The events of one file; a last line that its writer did not finish is none."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)
