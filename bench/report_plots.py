"""Plots of result files: what is compared in the report, drawn by matplotlib as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from report_results import Result

# The text of a figure stays text, and the file is the same whenever it is drawn again.
matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "shmroute", "font.size": 9}

from matplotlib import pyplot  # noqa: E402 (the backend comes first)

SIZE = (7.2, 3.4)
ARENA, FLOOR = "tab:blue", "0.55"
OTHERS = ("tab:red", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive",
          "tab:cyan", "tab:gray", "black", "gold")  # fmt: skip
MARKS = "os^Dv<>phX*P"


def transports(result: Result, path: Path) -> None:
    """Time until all readers have the rows, by size of record, for the most readers."""
    pattern = r"(\d+) MB, (\d+) readers?: (.+): until an ndarray is there, p50"
    found = [
        (int(match[1]), int(match[2]), match[3], row["value"])
        for match, row in result.matching(pattern)
    ]
    most = max(readers for _, readers, _, _ in found)
    lines: dict[str, dict[float, float]] = {}
    for size, readers, way, value in found:
        if readers == most:
            lines.setdefault(way, {})[size] = value
    _lines(
        path,
        lines,
        x="record, MB",
        y="ms",
        title=f"until the last of {most} readers has an ndarray",
    )


def memory(result: Result, path: Path) -> None:
    """Bytes a row at most, by number of trainer ranks, beside the floor."""
    pattern = r"(\d+) ranks?, (.+): the same at most"
    lines: dict[str, dict[float, float]] = {}
    names = {
        "native": "native",
        "native, one by one": "native, sample by sample",
        "as stored": "arena",
        "int32": "arena, widened to int32",
    }
    for match, row in result.matching(pattern):
        lines.setdefault(names[match[2]], {})[int(match[1])] = row["value"]
    _lines(
        path,
        lines,
        x="trainer ranks",
        y="bytes a row",
        title="records in flight and what their readers take at most",
        floor=result.value("floor: bytes a row"),
    )


def scaling(result: Result, path: Path) -> None:
    """Costs by record length."""
    lines: dict[str, dict[float, float]] = {}
    for match, row in result.matching(r"(.+), (\d+) tokens, p50"):
        lines.setdefault(match[1], {})[int(match[2])] = row["value"]
    _lines(path, lines, x="tokens of a record", y="us", title="cost by record length")


#: By benchmark: how its plot is drawn.
PLOTS: Mapping[str, Callable[[Result, Path], None]] = {
    "transports": transports,
    "memory_overhead": memory,
    "scaling": scaling,
}


def _lines(
    path: Path,
    lines: Mapping[str, Mapping[float, float]],
    *,
    x: str,
    y: str,
    title: str,
    floor: float | None = None,
) -> None:
    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    others = iter(OTHERS)
    for (name, points), mark in zip(lines.items(), MARKS, strict=False):
        style: dict[str, Any] = {"color": ARENA, "linewidth": 2, "linestyle": "-"}
        if not name.startswith("arena"):
            style = {"color": next(others), "linewidth": 1}
        elif name != "arena":
            style["linestyle"] = ":"
        axes.plot(list(points), list(points.values()), marker=mark, label=name, **style)
    if floor is not None:
        axes.axhline(floor, color=FLOOR, linestyle="--", linewidth=1, label="floor")
    _scales(axes, sorted({size for points in lines.values() for size in points}))
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(True, which="major", linewidth=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _scales(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
