"""Benchmark figures: one row each, held to a budget, printed and written with the machine.

Problem: a figure is worth nothing without what it ran on and how to run it
again, and a budget that nobody checks is forgotten.

Approach: every benchmark collects `Row` objects; `write` puts them into one JSON
object with command, commit and machine, `print_table` shows the same rows, and
`exit_code` is 1 as soon as one row misses its budget.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Sense = Literal["max", "min"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; ``sense`` says whether ``budget`` is the most or the least allowed."""

    name: str
    value: float
    unit: str
    budget: float | None = None
    sense: Sense | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) != (self.sense is None):
            raise ValueError(f"{self.name}: a budget needs a sense ('max' or 'min') and vice versa")
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name}: {self.value} is not a figure")

    @property
    def ok(self) -> bool | None:
        """Whether the budget is kept; None without one."""
        if self.budget is None:
            return None
        return self.value <= self.budget if self.sense == "max" else self.value >= self.budget

    def as_json(self) -> dict[str, Any]:
        shown = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.budget is None:
            return shown
        return {**shown, "budget": self.budget, "sense": self.sense, "ok": self.ok}


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures were taken on; absent packages and devices are None.

    ``packages`` are distributions whose version matters, besides those that it names anyhow.
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _gpu("name"),
        "driver": _gpu("driver_version"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "sglang", "numpy", *packages)},
    }


def commit() -> str | None:
    """Short hash of the benchmark's own checkout, ``+dirty`` when it was changed.

    ``SHMROUTE_BENCH_COMMIT`` says it where the files were copied to a machine without git.
    """
    if os.environ.get("SHMROUTE_BENCH_COMMIT"):
        return os.environ["SHMROUTE_BENCH_COMMIT"]
    here = ["git", "-C", str(Path(__file__).parent)]
    found = _output([*here, "rev-parse", "--short", "HEAD"])
    if not found:
        return None
    return f"{found}+dirty" if _output([*here, "status", "--porcelain"]) else found


def write(
    path: Path | str, bench: str, command: str, rows: Sequence[Row], packages: Sequence[str] = ()
) -> None:
    """Write the result file of one run; ``packages`` as in `machine`."""
    result = {
        "bench": bench,
        "command": command,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(packages),
        "rows": [row.as_json() for row in rows],
    }
    validate(result)
    Path(path).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def validate(result: dict[str, Any]) -> None:
    """Raise ValueError unless ``result`` is a complete result object."""
    missing = {"bench", "command", "commit", "date", "machine", "rows"} - result.keys()
    if missing:
        raise ValueError(f"the result lacks {', '.join(sorted(missing))}")
    lacking = {"cpu", "cores", "gpu", "kernel", "python"} - result["machine"].keys()
    if lacking:
        raise ValueError(f"the machine lacks {', '.join(sorted(lacking))}")
    if not result["rows"]:
        raise ValueError("the result has no rows")
    for shown in result["rows"]:
        fields = {key: value for key, value in shown.items() if key != "ok"}
        if Row(**fields).as_json() != shown:
            raise ValueError(f"{shown['name']}: 'ok' does not follow from value and budget")


def print_table(rows: Sequence[Row], title: str | None = None) -> None:
    """Print the rows, those that miss their budget in red."""
    table = Table(title=title)
    table.add_column("what")
    for heading in ("value", "unit", "budget", "ok"):
        table.add_column(heading, justify="right" if heading != "unit" else "left")
    for row in rows:
        sign = "" if row.budget is None else f"{'<=' if row.sense == 'max' else '>='} "
        budget = "" if row.budget is None else f"{sign}{formatted(row.budget)}"
        verdict = {None: "", True: "yes", False: "NO"}[row.ok]
        style = "red" if row.ok is False else None
        table.add_row(row.name, formatted(row.value), row.unit, budget, verdict, style=style)
    Console().print(table)


def exit_code(rows: Sequence[Row]) -> int:
    """1 when a row misses its budget, else 0."""
    return int(any(row.ok is False for row in rows))


def formatted(value: float) -> str:
    """Four significant digits, without an exponent for what people read."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu(what: str) -> str | None:
    """A property of the first GPU, None without one."""
    said = _output(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"])
    return said.splitlines()[0] if said else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    """Standard output of ``command``, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
