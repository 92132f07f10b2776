"""What the demo is doing: progress bars on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """The console, and one progress bar (or line) a step on it."""

    def __init__(self) -> None:
        plain = not sys.stdout.isatty()
        self.console = Console(highlight=False, width=120 if plain else None)

    @contextmanager
    def step(self, what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """One long step; the function that it gives counts one of ``total`` as done."""
        if not self.console.is_terminal:
            began = time.monotonic()
            self.console.print(f"{what} ...")
            yield lambda: None
            self.console.print(f"    {time.monotonic() - began:.1f} s")
            return
        count = [MofNCompleteColumn()] if total else []
        columns = (TextColumn("{task.description:<58}"), BarColumn(20), TimeElapsedColumn())
        with Progress(*columns, *count, console=self.console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)
            progress.update(task, total=total or 1, completed=total or 1)
