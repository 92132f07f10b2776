"""The command line of a benchmark: its options, its bar, its table, its result file, its end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from result_file import Row, exit_code, print_table, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).parent / "results"

Measure = Callable[..., Sequence[Row]]


def main(
    bench: str,
    description: str | None,
    quick: str,
    measure: Measure,
    *,
    redrawn_by_hand: bool = False,
    parts: Sequence[str] = (),
    packages: Sequence[str] = (),
) -> int:
    """Run ``bench/BENCH.py``: parse, measure, print, write; its exit code.

    Parameters
    ----------
    quick
        What ``--quick`` does, for ``--help``.
    measure
        Given ``--quick`` and a bar, and with ``parts`` those asked for, gives the rows; see
        ``end_in_good_order``.
    redrawn_by_hand
        The bar shows what is new when ``measure`` refreshes it, and has no thread.
    parts
        What may be named on the command line, to measure no more than that.
    packages
        Distributions that it measures, whose versions the result file states.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = f"bench/results/{bench}.json, with --quick none"
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help=f"the result file; default: {default}"
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    if parts:
        parser.add_argument(
            "parts", nargs="*", metavar="PART", help=f"only these, of {', '.join(parts)}"
        )
    options = parser.parse_args()
    named: list[str] = options.parts if parts else []
    check_named(parser, "part", named, parts)
    end_in_good_order()
    with bar(redrawn_by_hand=redrawn_by_hand) as progress:
        rows = measure(options.quick, progress, *([named] if parts else []))
    print_table(rows, bench.replace("_", " "))
    path = options.json or (None if options.quick else RESULTS / f"{bench}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        asked = [f"python bench/{bench}.py", *named, *(["--quick"] * options.quick)]
        write(path, bench, " ".join(asked), rows, packages)
    return exit_code(rows)


def bar(*, redrawn_by_hand: bool = False) -> Progress:
    """A benchmark's bar; where standard error is no terminal it is shown once, at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Drawn seldom: its thread takes the interpreter from what is timed.
    return Progress(
        *columns,
        console=Console(stderr=True),
        refresh_per_second=1,
        auto_refresh=not redrawn_by_hand,
    )


def check_named(
    parser: argparse.ArgumentParser, what: str, named: Sequence[str], known: Collection[str]
) -> None:
    """Refuse names that are not known; none at all is no error, of which argparse's own check
    says that it is none of the choices.
    """
    unknown = [name for name in named if name not in known]
    if unknown:
        parser.error(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")


def end_in_good_order() -> None:
    """Have SIGINT and SIGTERM end this process by SystemExit, the first one only, so that its
    clean-up is not cut short. SIGINT also in the background of a shell, which has it ignored here
    and, without this, in every child.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)


def _interrupted(number: int, _frame: Any) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)
