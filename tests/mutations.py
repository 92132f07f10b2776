"""Take the guards of the protocol out, one at a time, and see which test notices.

    python tests/mutations.py                     every guard, 3 to 10 minutes on 2 cores
    python tests/mutations.py --only reaper       those with this word in name or file
    python tests/mutations.py --json PATH         and write the result file

Problem
    A test that would pass without the guard that it is about proves nothing, and nobody sees it.

Approach
    ``guards`` lists every guard with its text. Each is replaced in a copy of the sources, and
    the tests that it names run there, in a process of their own: one of them must fail. A
    test run that dies or hangs has noticed, too; one that cannot even be collected has not,
    since then the replacement is wrong and not the guard gone. All those tests must pass in
    a copy without a change. The working tree is only read.

What a killed run leaves behind is removed: its processes, and what it has under /dev/shm (the
fixtures put the number of their process into the names of arenas).
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

import psutil
from guards import GUARDS, Guard
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))
import result_file  # noqa: E402
from result_file import Row  # noqa: E402

SHM = Path("/dev/shm")
_COPIED = ("shmroute", "sglang_bridge", "tests", "bench", "pyproject.toml")
_AT_ONCE = 2
# A run takes 1 to 10 s on an idle machine, all tests of a suite together 20. Much more is allowed,
# since a hang counts as noticed, and a busy machine must not look like one.
_SECONDS, _SECONDS_UNCHANGED = 240.0, 480.0
_SECONDS_TO_TEAR_DOWN = 10.0
_PYTEST = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")
# Looking for plugins in an environment as large as SGLang's takes a second.
_NO_OTHER_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_SAME_EXAMPLES = ("-p", "_hypothesis_pytestplugin", "--hypothesis-seed=0")
_TESTS_FAILED, _PASSED = 1, 0


class StaleGuard(Exception):
    """The table of guards does not fit the sources any more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of tests ended.

    Attributes
    ----------
    how
        "failed", "died" (the whole process, of a signal) or "hung": noticed. "passed",
        "skipped", or "broken": nothing was tried.
    noticed_by
        The test that failed, where pytest could still say so.
    """

    how: str
    noticed_by: str
    seconds: float
    output: str

    @property
    def noticed(self) -> bool:
        return self.how in ("failed", "died", "hung")


class SourceCopy:
    """A copy of the sources, in which one guard at a time is taken out."""

    # No two versions of a file have the same time, by which Python tells whether its compiled
    # form is still good. (Some time in 2001, unlike any file of the checkout.)
    _times = itertools.count(1_000_000_000)

    def __init__(self, folder: Path) -> None:
        self.root = folder
        ignore = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
        for name in _COPIED:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignore)
            else:
                shutil.copy2(source, target)

    @contextmanager
    def without(self, guard: Guard) -> Iterator[None]:
        """The copy without a guard.

        Raises
        ------
        StaleGuard
            Its text does not occur in its file exactly once.
        """
        path = self.root / guard.file
        whole = path.read_text()
        check_text(guard, whole)
        self._write(path, whole.replace(guard.text, guard.without))
        try:
            yield
        finally:
            self._write(path, whole)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        written = next(self._times)
        os.utime(path, (written, written))

    def environment(self) -> dict[str, str]:
        """Variables under which this process's children and theirs import the copy."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        paths = filter(None, (str(self.root), os.environ.get("PYTHONPATH")))
        return {**kept, **_NO_OTHER_PLUGINS, "PYTHONPATH": os.pathsep.join(paths)}

    def run(self, tests: Iterable[str], seconds: float, *options: str) -> Outcome:
        """Run tests, given by their node ids below ``tests/``."""
        nodes = [f"tests/{test}" for test in tests]
        if find_spec("hypothesis"):  # what runs on a GPU can do without
            options = (*options, *_SAME_EXAMPLES)
        begun = time.monotonic()
        said = self.root / "output.txt"
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *_PYTEST, *options, *nodes],
                cwd=self.root,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            hung = _wait(process, seconds)
        _remove_arenas_of(process.pid)
        text = said.read_text(errors="replace")
        how = "hung" if hung else _how(process.returncode, text)
        return Outcome(how, _first_failure(text), time.monotonic() - begun, text)


def check_text(guard: Guard, whole: str) -> None:
    """Raise StaleGuard unless the guard's text occurs once in the whole of its file."""
    count = whole.count(guard.text)
    if count != 1:
        raise StaleGuard(
            f"the text of the guard {guard.name!r} occurs {count} times in {guard.file}, not once: "
            f"follow the change of that file in tests/guards.py. The text is\n{guard.text}"
        )


def _how(status: int, text: str) -> str:
    if status == _PASSED:
        return "skipped" if re.search(r"^\d+ skipped in ", text, re.MULTILINE) else "passed"
    if status == _TESTS_FAILED:
        return "failed"
    return "died" if status < 0 else "broken"


def _first_failure(text: str) -> str:
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", text, re.MULTILINE)
    return found[1] if found else ""


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the end of a run, whose processes end with it; whether it had to be ended."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)  # pytest tears its fixtures down
    try:
        process.wait(_SECONDS_TO_TEAR_DOWN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for one in family:
        try:
            one.kill()  # by number and time of start: never another process
        except psutil.NoSuchProcess:
            continue


def _remove_arenas_of(pid: int) -> None:
    named = re.compile(rf"shmroute-\d+-(t|bridge-|gpu-){pid}-.*")
    for path in SHM.iterdir():
        if named.fullmatch(path.name):
            path.unlink(missing_ok=True)


class Gate:
    """Runs everything that is asked of it, two runs at a time.

    ``unchanged`` and ``outcome`` wait for theirs.
    """

    def __init__(self, folder: Path, guards: Sequence[Guard]) -> None:
        self._copies: SimpleQueue[SourceCopy] = SimpleQueue()
        for index in range(_AT_ONCE):
            self._copies.put(SourceCopy(folder / f"copy-{index}"))
        self._workers = ThreadPoolExecutor(_AT_ONCE)
        tests: dict[str, dict[str, None]] = {}
        for guard in guards:
            tests.setdefault(guard.suite, {}).update(dict.fromkeys(guard.noticed_by))
        self._unchanged: dict[str, Future[Outcome]] = {
            suite: self._workers.submit(self._run_unchanged, list(of_suite))
            for suite, of_suite in tests.items()
        }
        self._outcomes: dict[Guard, Future[Outcome]] = {
            guard: self._workers.submit(self._take_out, guard) for guard in guards
        }

    def unchanged(self, suite: str) -> Outcome:
        """All tests that the guards of a suite name, with every guard in place."""
        return self._unchanged[suite].result()

    def outcome(self, guard: Guard) -> Outcome:
        """Its tests without the guard."""
        return self._outcomes[guard].result()

    def close(self) -> None:
        """Wait for the runs under way, and begin no other."""
        self._workers.shutdown(cancel_futures=True)

    @contextmanager
    def _copy(self) -> Iterator[SourceCopy]:
        copy = self._copies.get()
        try:
            yield copy
        finally:
            self._copies.put(copy)

    def _run_unchanged(self, tests: list[str]) -> Outcome:
        with self._copy() as copy:
            return copy.run(tests, _SECONDS_UNCHANGED)

    def _take_out(self, guard: Guard) -> Outcome:
        # That a test fails is enough. To show where, pytest would parse the sources, and where a
        # thread that logs an error does so as well, Python 3.11 may end both with a SystemError.
        with self._copy() as copy, copy.without(guard):
            return copy.run(guard.noticed_by, _SECONDS, "-x", "--tb=no")


def has_cuda() -> bool:
    """Whether guards of streams and page locks can be taken out here."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def print_table(outcomes: dict[Guard, Outcome]) -> None:
    table = Table(title="guards taken out", show_lines=True)
    for heading in ("guard", "promise", "noticed by", "s"):
        table.add_column(heading, justify="right" if heading == "s" else "left")
    for guard, outcome in outcomes.items():
        table.add_row(guard.name, guard.promise, told(outcome), f"{outcome.seconds:.1f}")
    Console(width=160).print(table)


def told(outcome: Outcome) -> str:
    """Who noticed, or that nobody did."""
    if not outcome.noticed:
        return f"NOBODY ({outcome.how})"
    how = "" if outcome.how == "failed" else f"the run {outcome.how} "
    return (how + outcome.noticed_by).strip()


def main() -> int:
    options = _options()
    asked = [guard for guard in GUARDS if options.only in f"{guard.name} {guard.file}"]
    guards = [guard for guard in asked if not guard.gpu or has_cuda()]
    for guard in asked:
        try:
            check_text(guard, (ROOT / guard.file).read_text())
        except StaleGuard as stale:
            sys.exit(str(stale))
    with tempfile.TemporaryDirectory(prefix="shmroute-mutations-") as folder:
        gate = Gate(Path(folder), guards)
        try:
            unchanged = [gate.unchanged(suite) for suite in {guard.suite: None for guard in guards}]
            outcomes = {guard: gate.outcome(guard) for guard in guards}
        finally:
            gate.close()
    print_table(outcomes)
    for outcome in unchanged:
        if outcome.how != "passed":
            print(outcome.output)
    rows = [*_rows(asked, outcomes, unchanged)]
    result_file.print_table(rows[:5], "mutation gate")
    if options.json:
        command = shlex.join(["python", "tests/mutations.py", *sys.argv[1:]])
        result_file.write(options.json, "mutations", command, rows)
    return result_file.exit_code(rows)


def _rows(
    asked: Sequence[Guard], outcomes: dict[Guard, Outcome], unchanged: Iterable[Outcome]
) -> Iterator[Row]:
    tried = {guard: outcome for guard, outcome in outcomes.items() if outcome.how != "skipped"}
    noticed = [outcome for outcome in tried.values() if outcome.noticed]
    yield Row("guards taken out", len(tried), "")
    yield Row("noticed", len(noticed), "", len(tried), "min")
    yield Row("of these by a run that died or hung", sum(o.how != "failed" for o in noticed), "")
    yield Row(
        "suites that fail with every guard in place",
        sum(outcome.how != "passed" for outcome in unchanged),
        "",
        0,
        "max",
    )
    yield Row("guards whose tests need a GPU or root, not taken out", len(asked) - len(tried), "")
    for guard, outcome in tried.items():
        yield Row(f"{guard.name}: {told(outcome)}", round(outcome.seconds, 1), "s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="guards with this word in name or file")
    parser.add_argument("--json", type=Path, help="write the result file here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
