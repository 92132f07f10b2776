"""All results in one page: tables and plots out of ``bench/results``.

    python bench/report.py [--quick]

Reads ``bench/results/*.json`` and writes ``bench/RESULTS.md``, every row with its command, machine
and commit, the plots beside the results, and the part of ``README.md`` between its two markers. A
test holds both texts to what this writes. ``--quick`` leaves the plots as they are, ``--json`` says
which results were read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from report_results import Result, Results
from result_file import Row, formatted, write
from rich.console import Console
from rich.progress import track

HERE = Path(__file__).parent
RESULTS, PAGE, README = HERE / "results", HERE / "RESULTS.md", HERE.parent / "README.md"
BEGIN, END = "<!-- written by bench/report.py -->\n", "<!-- end of what bench/report.py writes -->"

#: By benchmark: names of rows that make a table of their own, with one line for each ``line`` and
#: one column for each ``column``.
PIVOTS = {
    "transports": (
        r"(?P<table>\d+ MB, \d+ readers?): (?P<line>.+): (?P<column>[^:]+(: [^:]+)?)",
        r"(?P<table>a reader of two killed): (?P<line>[^:]+): (?P<column>.+)",
    ),
    "memory_overhead": (
        r"(?P<table>(off|native|arena)(, TP \d+)?): "
        r"(?P<line>HTTP server|(scheduler|detokenizer|other).*|all processes): (?P<column>[^:]+)",
        r"(?P<table>\d+ ranks?), (?P<line>.+): (?P<column>[^:]+)",
    ),
}


# -- the page ------------------------------------------------------------------------------------


def page(results: Results) -> str:
    """The whole of ``RESULTS.md``."""
    parts = [
        "# Results\n",
        "Written by `python bench/report.py` out of `bench/results/`; do not edit.\n",
        *_summary(results),
        "## Where each comes from\n",
        *_runs(results.all),
    ]
    for result in results.all:
        parts += _section(result)
    return "\n".join(parts).rstrip() + "\n"


def _runs(results: Sequence[Result]) -> Iterator[str]:
    yield _table(
        ("result", "command", "commit", "date", "machine"),
        (
            (f"[{each.name}](#{each.name})", f"`{each.command}`", each.commit, each.date,
             each.ran_on)
            for each in results
        ),
    )  # fmt: skip


def _section(result: Result) -> Iterator[str]:
    yield f"## {result.name}\n"
    yield f"`{result.command}`, commit {result.commit}, {result.date}. {result.ran_on}.\n"
    if (RESULTS / f"{result.name}.svg").exists():
        yield f"![{result.name}](results/{result.name}.svg)\n"
    tables, rest = _pivoted(result)
    for title, lines in tables.items():
        columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
        yield f"**{title}**\n"
        yield _table(
            ("", *columns),
            (
                (line, *(cells.get(column, "") for column in columns))
                for line, cells in lines.items()
            ),
        )
    if rest:
        yield _table(
            ("what", "value", "budget", "kept"),
            ((row["name"], _value(row), _budget(row), _kept(row)) for row in rest),
        )


def _pivot(lines: Mapping[str, Mapping[str, str]]) -> str:
    columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
    shown = ((line, *(cells.get(each, "") for each in columns)) for line, cells in lines.items())
    return _table(("", *columns), shown)


def _pivoted(result: Result) -> tuple[dict[str, dict[str, dict[str, str]]], list[dict]]:
    """Rows by table, line and column, and those that are in no such table."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    rest = []
    for row in result.rows:
        patterns = PIVOTS.get(result.bench, ())
        found = next(filter(None, (re.fullmatch(each, row["name"]) for each in patterns)), None)
        if found is None:
            rest.append(row)
            continue
        lines = tables.setdefault(found["table"], {})
        lines.setdefault(found["line"], {})[found["column"]] = _value(row)
    return tables, rest


def _value(row: dict) -> str:
    return f"{formatted(row['value'])} {row['unit']}".strip()


def _budget(row: dict) -> str:
    if "budget" not in row:
        return ""
    return f"{'at most' if row['sense'] == 'max' else 'at least'} {formatted(row['budget'])}"


def _kept(row: dict) -> str:
    return {True: "yes", False: "**no**", None: ""}[row.get("ok")]


def _table(head: Sequence[str], lines: Iterator[Sequence[str]]) -> str:
    shown = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(map(_escaped, cells))} |\n" for cells in shown)


def _escaped(cell: str) -> str:
    """A cell's text may have the character that ends cells."""
    return cell.replace("|", "\\|")


# -- the four figures ----------------------------------------------------------------------------


def _summary(results: Results) -> Iterator[str]:
    lines = list(summary(results))
    if lines:
        yield "## The four that matter\n"
        head = ("", "shmroute", "SGLang native", "best of the others", "command", "machine")
        yield _table(head, iter(lines))


def summary(results: Results) -> Iterator[tuple[str, ...]]:
    """What, with shmroute, natively, with the best peer, and where that comes from."""
    transports, memory = results.only("transports"), results.only("memory_overhead")
    if transports:
        yield _transport(transports, "12 MB, 8 readers", "producer", "calling thread")
        what = "until an ndarray is there"
        yield _transport(transports, "12 MB, 8 readers", what, "until all have an ndarray")
    if memory:
        yield _memory(memory)
    yield from _output(results)


def _transport(result: Result, load: str, measured: str, shown: str) -> tuple[str, ...]:
    values = {
        match[1]: row["value"] for match, row in result.matching(rf"{load}: (.+): {measured}, p50")
    }
    arena, native = values.pop("arena"), values.pop("SGLang native")
    best = min(values, key=lambda way: values[way])
    return (
        f"{load}: {shown}",
        f"{formatted(arena)} ms",
        f"{formatted(native)} ms",
        f"{formatted(values[best])} ms, {best}",
        *_origin(result),
    )


def _memory(result: Result) -> tuple[str, ...]:
    arena, native, lean = (
        formatted(result.value(f"8 ranks, {way}: the same at most"))
        for way in ("as stored", "native", "native, one by one")
    )
    floor = formatted(result.value("floor: bytes a row"))
    return (
        f"host bytes for each row in flight, 8 trainer ranks, at most (a row is {floor} B)",
        f"{arena} B",
        f"{native} B",
        f"{lean} B, native decoded sample by sample",
        *_origin(result),
    )


def _output(results: Results) -> Iterator[tuple[str, ...]]:
    """Output of the real engine while 160 requests finish in one step, of that without routes.

    Each share is one result's, so of one GPU; of several results their median, of those without a
    trace where there are some, and the lowest and highest of all.
    """
    shares, used = [], []
    for way in ("arena", "native"):
        name = f"{way} / off, all finish in one step: output"
        found = [
            each
            for each in results.of("engine")
            if each.machine["gpu"] and any(each.matching(name))
        ]
        if not found:
            return
        untraced = [each for each in found if "--trace" not in each.command] or found
        all_shares = [each.value(name) for each in found]
        share = f"{results.median(untraced, name):.1f}%"
        if len(found) > 1:
            share += f" ({min(all_shares):.1f} to {max(all_shares):.1f})"
        shares.append(share)
        used += found
    yield (
        "output with routes, of that without, 160 requests that finish in one step: median of the "
        "results, untraced ones where there are (of all)",
        *shares,
        "",
        *_origin(*used),
    )


def _origin(*results: Result) -> tuple[str, str]:
    commands = dict.fromkeys(f"`{each.command}` ({each.commit})" for each in results)
    machines = dict.fromkeys(each.machine["gpu"] or each.machine["cpu"] for each in results)
    return "; ".join(commands), "; ".join(machines)


def readme_part(results: Results) -> str:
    """What stands between the markers of ``README.md``."""
    lines = [line[:-2] for line in summary(results)]
    table = _table(("", "shmroute", "SGLang native", "best of the others"), iter(lines))
    transports = results.only("transports")
    beside = "".join(_lmdb(transports)) if transports else ""
    page = "\n[All results](bench/RESULTS.md), with their commands, machines and commits.\n"
    return f"{BEGIN}\n{table}{beside}{page}\n{END}"


def _lmdb(result: Result) -> Iterator[str]:
    """The plot, and what the way takes that is sooner there."""

    held = "12 MB, 8 readers: {}: shared memory"
    left = "a reader of two killed: {}: left in shared memory"

    def of(way: str, what: str) -> str:
        return formatted(result.value(what.format(way)))

    yield "\n![time until eight readers have a record, by its size and way]"
    yield "(bench/results/transports.svg)\n"
    yield "\nLMDB hands a record on sooner, a small one most. It takes "
    yield f"{of('LMDB', held)} MiB for one (the arena {of('arena', held)}),\n"
    yield "and what a killed reader had open keeps it from using space again until somebody\n"
    yield f"asks for dead readers: {of('LMDB', left)} MiB after eight more records "
    yield f"(the arena {of('arena', left)}).\n"
    yield "\nWhat is sooner with 8 readers, in ms:\n"
    for size in ("1 MB", "12 MB", "60 MB"):
        load = f"{size}, 8 readers"
        yield from _sooner(result, load, "producer", f"{size}, on the calling thread")
        what = f"{size}, until all have an ndarray"
        yield from _sooner(result, load, "until an ndarray is there", what)


def _sooner(result: Result, load: str, measured: str, shown: str) -> Iterator[str]:
    """The ways that take less time than the arena."""
    values = {
        match[1]: row["value"] for match, row in result.matching(rf"{load}: (.+): {measured}, p50")
    }
    arena = values.pop("arena")
    sooner = sorted((value, way) for way, value in values.items() if value < arena)
    ways = ", ".join(f"{way} {formatted(value)}" for value, way in sooner) or "nothing"
    yield f"- {shown} (the arena {formatted(arena)}): {ways}\n"


def with_part(readme: str, results: Results) -> str:
    """``README.md`` with that part renewed.

    Raises
    ------
    ValueError
        The markers are not there, once each.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError("README.md lacks the two markers of bench/report.py")
    before, _, rest = readme.partition(BEGIN)
    return before + readme_part(results) + rest.partition(END)[2]


# -- the command ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="texts only, no plots")
    parser.add_argument("--json", type=Path, metavar="PATH", help="a result file about the results")
    options = parser.parse_args()
    results = Results(RESULTS)
    console = Console(stderr=True)
    if not options.quick:
        from report_plots import PLOTS  # matplotlib takes a second to import

        for result in track(results.all, description="plots", console=console):
            if result.bench in PLOTS:
                PLOTS[result.bench](result, RESULTS / f"{result.name}.svg")
    PAGE.write_text(page(results))
    README.write_text(with_part(README.read_text(), results))
    console.print(f"{len(results.all)} results, {PAGE.name} and {README.name} written")
    if options.json:
        write(options.json, "report", "python bench/report.py", list(_counted(results)))


def _counted(results: Results) -> Iterator[Row]:
    yield Row("results", len(results.all), "")
    for each in results.all:
        missed = sum(row.get("ok") is False for row in each.rows)
        yield Row(f"{each.name}: figures", len(each.rows), "")
        yield Row(f"{each.name}: budgets missed", missed, "")


if __name__ == "__main__":
    main()
