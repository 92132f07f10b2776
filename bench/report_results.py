"""Result files as a report reads them: all of them, or single figures out of the newest."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_file import validate

# What else a machine states are versions.
_HARDWARE = {"cpu", "cores", "gpu", "driver", "kernel", "python"}
_SHOWN = {"sglang": "SGLang"}


@dataclass(frozen=True, slots=True)
class Result:
    """One result file; ``name`` is the file's, without its ending."""

    name: str
    bench: str
    command: str
    commit: str
    date: str
    machine: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    def value(self, name: str) -> float:
        """The figure of this name.

        Raises
        ------
        KeyError
            There is none.
        """
        for row in self.rows:
            if row["name"] == name:
                return float(row["value"])
        raise KeyError(f"{self.name}.json has no figure {name!r}")

    def matching(self, pattern: str) -> Iterator[tuple[re.Match[str], dict[str, Any]]]:
        """Rows whose whole name matches."""
        for row in self.rows:
            found = re.fullmatch(pattern, row["name"])
            if found:
                yield found, row

    @property
    def ran_on(self) -> str:
        """The machine, in words."""
        machine = self.machine
        parts = [f"{machine['cpu']}, {machine['cores']} cores", machine["gpu"] or "no GPU"]
        parts.append(f"Linux {machine['kernel']}, Python {machine['python']}")
        versions = {name: value for name, value in machine.items() if name not in _HARDWARE}
        for name, version in (*versions.items(), ("driver", machine.get("driver"))):
            if version:
                parts.append(f"{_SHOWN.get(name, name)} {version}")
        return "; ".join(parts)


class Results:
    """All result files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.all = [_read(path) for path in sorted(folder.glob("*.json"))]

    def of(self, bench: str) -> list[Result]:
        return [result for result in self.all if result.bench == bench]

    def only(self, bench: str) -> Result | None:
        """The result of a benchmark that has one file; None without it."""
        found = self.of(bench)
        return found[0] if found else None

    def median(self, results: Sequence[Result], name: str) -> float:
        """Of a figure that several of these have.

        Raises
        ------
        KeyError
            None of them has it.
        """
        found = [result.value(name) for result in results if any(result.matching(re.escape(name)))]
        if not found:
            raise KeyError(f"no result has a figure {name!r}")
        return statistics.median(found)


def _read(path: Path) -> Result:
    given = json.loads(path.read_text())
    validate(given)
    return Result(path.stem, rows=tuple(given.pop("rows")), **given)
