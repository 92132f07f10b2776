"""The command line of a benchmark: its options, its bar, its table, its result file, its end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from result_file import Row, exit_code, print_table, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).parent / "results"

Measure = Callable[[bool, Progress], Sequence[Row]]


def main(
    bench: str,
    description: str | None,
    quick: str,
    measure: Measure,
    *,
    redrawn_by_hand: bool = False,
) -> int:
    """Run ``bench/BENCH.py``: parse, measure, print, write; its exit code.

    Parameters
    ----------
    quick
        What ``--quick`` does, for ``--help``.
    measure
        Given ``--quick`` and a bar, gives the rows; see ``end_in_good_order``.
    redrawn_by_hand
        The bar shows what is new when ``measure`` refreshes it, and has no thread.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = f"bench/results/{bench}.json, with --quick none"
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help=f"the result file; default: {default}"
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    options = parser.parse_args()
    end_in_good_order()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Drawn seldom: its thread takes the interpreter from what is timed.
    with Progress(
        *columns,
        console=Console(stderr=True),
        refresh_per_second=1,
        auto_refresh=not redrawn_by_hand,
    ) as progress:
        rows = measure(options.quick, progress)
    print_table(rows, bench.replace("_", " "))
    path = options.json or (None if options.quick else RESULTS / f"{bench}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, bench, f"python bench/{bench}.py" + " --quick" * options.quick, rows)
    return exit_code(rows)


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
