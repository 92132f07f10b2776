"""The tests that try to break the store, run longer than ``make test`` runs them, and counted.

    python bench/trust.py [CAMPAIGN...] [--seed N] [--json PATH] [--quick]

Problem: a test that passes says nothing of how much it tried.

Approach: each campaign is a set of pytest files, run as they are with a seed and more examples.
Cases and what became of them come from pytest's own report; what a test counted itself (steps,
reads, how often each answer was given), from its properties there. A campaign fails if a case
failed, or if none ran. Kills within a step are ``crash_campaign``'s, time is ``soak``'s.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from bench_command import check_named, end_in_good_order
from result_file import Row, exit_code, print_table, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parents[1]
TAIL = 60  # lines of a campaign that failed
# Of tests/store/test_model.py: few examples of any other may not come across everything.
SEED_OF_MAKE_TEST = 8


@dataclass(frozen=True, slots=True)
class Campaign:
    """Test files, and the environment variable that says how many examples they take.

    ``slow``: not one of those that ``--quick`` runs unless it is named.
    """

    about: str
    tests: tuple[str, ...]
    variable: str | None = None
    examples: int = 0
    slow: bool = False


CAMPAIGNS = {
    "model": Campaign(
        "any order of steps in real processes, against a model of dictionaries",
        ("store/test_model.py",),
        "SHMROUTE_MODEL_EXAMPLES",
        2500,
    ),
    "hostile": Campaign(
        "a corpus of attacks, other users' files",
        ("store/test_attacks.py", "store/test_other_users.py"),
    ),
    "fuzzing": Campaign(
        "made-up input for every parser",
        ("store/test_fuzzing.py",),
        "SHMROUTE_FUZZ_EXAMPLES",
        20_000,
    ),
    "resources": Campaign(
        "what runs out, stops, forks, is interrupted, or comes twice",
        (
            "store/test_full_shm.py",
            "store/test_descriptors.py",
            "store/test_lock_refusals.py",
            "store/test_signals.py",
            "store/test_interruptions.py",
            "store/test_forks.py",
            "store/test_threads.py",
            "store/test_stopped.py",
            "store/test_clocks.py",
            "store/test_many_rids.py",
            "store/test_newest.py",
            "store/test_deaths.py",
            "store/test_reaping_races.py",
            "store/test_stress.py",
        ),
        slow=True,
    ),
    "engine": Campaign(
        "faults that mix up routes, made in a real engine",
        ("engine/test_faults.py", "engine/test_integrity.py"),
        slow=True,
    ),
}


def run(name: str, seed: int, *, quick: bool) -> list[Row]:
    """Run one campaign; its rows."""
    campaign = CAMPAIGNS[name]
    with tempfile.TemporaryDirectory(prefix="bench-trust-") as folder:
        report = Path(folder) / "report.xml"
        began = time.monotonic()
        output = _pytest(campaign, seed, report, quick=quick)
        seconds = time.monotonic() - began
        if not report.exists():
            sys.exit(f"{name}: pytest wrote no report:\n{output}")
        rows = [*_rows(name, report), Row(f"{name}: took", round(seconds, 1), "s")]
    if exit_code(rows):
        print("\n".join(output.splitlines()[-TAIL:]), file=sys.stderr)
    if campaign.variable and not quick:
        rows.append(Row(f"{name}: examples asked for, of each kind", campaign.examples, ""))
    return rows


def _pytest(campaign: Campaign, seed: int, report: Path, *, quick: bool) -> str:
    environment = {**os.environ, "SHMROUTE_MODEL_SEED": str(seed), "PYTHONDONTWRITEBYTECODE": "1"}
    if campaign.variable and not quick:
        environment[campaign.variable] = str(campaign.examples)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # The newer form of the report has no place for what a test counted.
    command += ["-o", "junit_family=xunit1", f"--junit-xml={report}", f"--hypothesis-seed={seed}"]
    command += [str(ROOT / "tests" / name) for name in campaign.tests]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return child.communicate()[0]
    finally:
        if child.poll() is None:
            # As Ctrl-C would, so that its fixtures clean up; it ends the processes it started.
            child.send_signal(signal.SIGINT)
            child.wait()


def _rows(name: str, report: Path) -> Iterator[Row]:
    """What pytest's report says of a campaign."""
    cases = [*ElementTree.parse(report).iter("testcase")]
    bad = [case for case in cases if _has(case, "failure") or _has(case, "error")]
    skipped = [case for case in cases if _has(case, "skipped")]
    yield Row(f"{name}: cases", len(cases) - len(skipped), "", 1, "min")
    yield Row(f"{name}: cases that failed", len(bad), "", 0, "max")
    yield Row(f"{name}: cases that could not run here", len(skipped), "")
    for case in cases:
        for counted in case.iter("property"):
            what, count = counted.get("name"), counted.get("value")
            yield Row(f"{name}: {what}", float(count or 0), "")


def _has(case: ElementTree.Element, what: str) -> bool:
    return case.find(what) is not None


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    described = "; ".join(f"{name}: {one.about}" for name, one in CAMPAIGNS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "campaigns", nargs="*", metavar="CAMPAIGN", help=f"default: all; {described}"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=None,
        help="of the examples; default: random, with --quick that of make test",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result file")
    swift = ", ".join(name for name, one in CAMPAIGNS.items() if not one.slow)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"as many examples as make test takes; of all, {swift} only",
    )
    options = parser.parse_args(argv)
    check_named(parser, "campaign", options.campaigns, CAMPAIGNS)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")
    if options.seed is None:
        options.seed = SEED_OF_MAKE_TEST if options.quick else random.randrange(1 << 32)
    return options


def _command(asked: Sequence[str], seed: int, *, quick: bool) -> str:
    return shlex.join(
        ["python", "bench/trust.py", *asked, "--seed", str(seed), *(["--quick"] * quick)]
    )


def main() -> int:
    options = _arguments()
    end_in_good_order()
    names = options.campaigns or [
        name for name, one in CAMPAIGNS.items() if not (options.quick and one.slow)
    ]
    console = Console(stderr=True)
    console.print(f"seed {options.seed}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    rows = [Row("seed", options.seed, "")]
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            rows += run(name, options.seed, quick=options.quick)
            progress.advance(task)
    print_table(rows, "trust")
    if options.json:
        command = _command(options.campaigns, options.seed, quick=options.quick)
        write(options.json, "trust", command, rows)
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
