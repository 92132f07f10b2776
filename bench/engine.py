"""End to end on the real engine, over HTTP: what routes cost it, and how they reach a trainer.

    python bench/engine.py throughput itl latency memory turns --json PATH [--quick] [--trace]
    python bench/engine.py steady --json PATH
    python bench/engine.py turns --starts off,native,arena --json PATH
    python bench/engine.py throughput --starts off,arena,arena,off --rounds 5 --json PATH

SGLang's HTTP servers of three configurations (``engine_setup``) are started one after the other,
in turns; a process of its own (``engine_worker``) puts every block asked for on each:

    throughput   160 requests of 256 + 512 tokens; all finish in one step
    together     the same 160 in one HTTP request, which the scheduler gets in one message: each
                 load is the same forwards, whatever arrives when. Not in it is what 160 HTTP
                 requests cost, and natively all routes come in one answer at its end
    unasked      the first, nobody asks for routes
    itl          inter-token latency of 64 streams while requests of 8K and of 32K tokens finish
                 beside them, singly and four in one step
    latency      from the last token's response to the rows in a trainer process, and on its
                 GPU, at 1K, 8K and 32K tokens, alone and with 64 streams beside
    memory       of every process, the GPU and the arena, 160 records held
    turns        conversations of four turns, each turn's prompt being all before it: rows of the
                 whole prompt, and with ``routed_experts_start_len`` only those that are new
    steady       320 requests of many lengths, finishes spread out; with prefill CUDA graphs

Requests are streamed where the time of a token counts, whole responses elsewhere. The 64 streams
are read by a process that does nothing else: what a client makes of a native answer of 67 MB is
not the engine's (``engine_streams``, ``engine_http``). Bytes of responses are those of HTTP.

With a GPU: Qwen3-30B-A3B's dimensions, random weights. Without one a tiny model shows that
everything runs. `engine_workloads` says how each load is timed, `engine_figures` how figures
follow. ``--trace`` adds what the scheduler thread spends (`engine_trace`).

Between two engines that are up one after the other a GPU and its host change by more than routes
cost. ``--rounds N`` has one engine of each configuration up at the same time, on one GPU, and gives
them the blocks in turns: N times in the order of ``--starts``. Their loads are smaller, as two have
to fit, and every turn has the same prompts; while one is measured the others have nothing to do.

``--raw FOLDER`` keeps each engine's measurements, and takes those that are there into the
figures: alternating starts can be spread over several commands on one machine. The result file
names them all. The exit code is 1 when a figure misses its budget, 2 when an engine failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import engine_trace
from bench_command import bar, end_in_good_order
from engine_figures import result_rows
from engine_process import EngineStartError
from engine_server import EngineServer
from engine_setup import CONFIGURATIONS, has_gpu, scale_for, server_flags, write_model
from engine_worker import Specification
from result_file import exit_code, print_table, write
from rich.progress import Progress

import shmroute

BLOCKS = ("throughput", "together", "unasked", "itl", "latency", "memory", "turns", "steady")
# What little KV cache has room for.
ROUNDS_BLOCKS = ("throughput", "together", "unasked", "itl", "steady")
WORKER = Path(__file__).with_name("engine_worker.py")
END_SECONDS = 10.0  # what killing an engine and writing the figures takes
LOOK_SECONDS = 1.0


class Bench:
    """One command: its engines, in turn."""

    def __init__(self, options: argparse.Namespace, folder: Path, progress: Progress) -> None:
        self._options = options
        self._folder = folder
        self._console = progress.console
        turns = len(options.starts) * (options.rounds or 1)
        self._blocks = BlocksBar(progress, options.blocks, turns)
        self._raw = options.raw or folder / "raw"
        self._raw.mkdir(parents=True, exist_ok=True)
        self._logs = options.logs or folder
        self._logs.mkdir(parents=True, exist_ok=True)
        self._gpu = has_gpu()
        self._model = write_model(folder / "model", self._gpu)
        self._began = time.monotonic()
        self._longest = 0.0
        self.arena = f"bench-engine-{os.getpid()}"
        self.failed: list[str] = []

    def run(self) -> None:
        """Measure for as many of the starts as there is time for."""
        if self._options.rounds:
            self._take_turns()
        else:
            self._each(self._options.starts, self._run_engine)

    def _each(self, configurations: Iterable[str], measure: Callable[[str], None]) -> None:
        for configuration in configurations:
            began = time.monotonic()
            if self._longest > self._left():
                self._say(f"{configuration}: no time left for another one")
                break
            measure(configuration)
            self._blocks.end_engine()
            self._longest = max(self._longest, time.monotonic() - began)

    def _run_engine(self, configuration: str) -> None:
        try:
            with self._engine(configuration) as server:
                self._load(configuration, server)
        except EngineStartError as error:
            self._fail(f"{configuration}: {error}")

    def _take_turns(self) -> None:
        """All engines up at once, each measured while the others have nothing to do."""
        with contextlib.ExitStack() as at_end:
            servers = {}
            for configuration in dict.fromkeys(self._options.starts):
                try:
                    servers[configuration] = at_end.enter_context(self._engine(configuration))
                except EngineStartError as error:
                    self._fail(f"{configuration}: {error}")
                    return
            self._each(
                self._options.starts * self._options.rounds,
                lambda configuration: self._load(configuration, servers[configuration]),
            )

    @contextlib.contextmanager
    def _engine(self, configuration: str) -> Iterator[EngineServer]:
        """A server that is up."""
        name = self._next_name(configuration)
        server = self._server(configuration, name)
        self._blocks.begin_engine(name)
        try:
            server.start()
            self._say(f"{name}: started in {server.start_seconds:.0f} s")
            yield server
        finally:
            with _undisturbed():
                server.stop()
                if configuration == "arena":
                    shmroute.reap(self.arena, force=True)

    def _load(self, configuration: str, server: EngineServer) -> None:
        """Put the blocks on an engine that is up."""
        name = self._next_name(configuration)
        self._blocks.begin_engine(name)
        self._blocks.begin_blocks()
        self._measure(
            name,
            Specification(
                configuration=configuration,
                blocks=tuple(self._options.blocks),
                arena=self.arena,
                url=server.url,
                server=server.pid,
                start_seconds=server.start_seconds,
                gpu=self._gpu,
                quick=self._options.quick,
                rounds=bool(self._options.rounds),
                runs=self._options.runs,
                trace=str(server.trace or ""),
                result=str(self._raw / f"{name}.json"),
                command=" ".join(["python bench/engine.py", *_shown(sys.argv[1:])]),
            ),
        )

    def _next_name(self, configuration: str) -> str:
        """Of the next measurement: what it is, and its number behind those of earlier commands."""
        return f"{len(list(self._raw.glob('*.json'))) + 1:02}-{configuration}"

    def _server(self, configuration: str, name: str) -> EngineServer:
        trace = self._raw / f"{name}.trace" if self._options.trace else None
        flags = server_flags(
            configuration,
            scale_for(self._gpu, self._options.quick, bool(self._options.rounds)),
            arena=self.arena,
            gpu=self._gpu,
            prefill_graph="steady" in self._options.blocks,
        )
        if trace:
            engine_trace.create(trace)
        log = self._logs / f"engine-{name}.log"
        return EngineServer(self._model, flags, gpu=self._gpu, trace=trace, log=log)

    def _measure(self, name: str, specification: Specification) -> None:
        """Have all blocks run; a worker that is not through when time is up keeps what it has."""
        path, log = self._folder / f"{name}.spec", self._logs / f"worker-{name}.log"
        path.write_text(json.dumps(dataclasses.asdict(specification)))
        with log.open("wb") as output:
            worker = subprocess.Popen(
                [sys.executable, str(WORKER), str(path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = self._follow(worker, Path(specification.result))
            if code is None:
                self._say(f"{name}: cut off, the time is up")
                return
            if code != 0:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
                self._fail(f"{name}: exit code {code}; end of {log}:\n{tail}")
            self._say(f"{name}: ended after {time.monotonic() - self._began:.0f} s in all")
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)  # with its trainer and its streams
                worker.wait()

    def _follow(self, worker: subprocess.Popen[bytes], result: Path) -> int | None:
        """Wait for the worker and show how far it is; its exit code, None when the time is up."""
        until = time.monotonic() + max(1.0, self._left())
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return worker.wait(min(left, LOOK_SECONDS))
            self._blocks.show(result)
        return None

    def figures(self) -> list[dict[str, Any]]:
        """What every engine measured, those of earlier commands in ``--raw`` included."""
        paths = sorted(self._raw.glob("*.json"), key=lambda path: int(path.name.partition("-")[0]))
        runs = [json.loads(path.read_text()) for path in paths]
        alike = self._options.quick, bool(self._options.rounds)
        return [run for run in runs if (run["quick"], run.get("rounds", False)) == alike]

    def _left(self) -> float:
        return self._options.seconds - END_SECONDS - (time.monotonic() - self._began)

    def _fail(self, message: str) -> None:
        self.failed.append(message)
        self._say(message)

    def _say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


class BlocksBar:
    """The bar: the blocks of all engines, those that are through."""

    def __init__(self, progress: Progress, blocks: Collection[str], engines: int) -> None:
        self._progress, self._blocks = progress, blocks
        self._task = progress.add_task("", total=engines * len(blocks))
        self._before = 0  # blocks of the engines that are through
        self._name = ""
        self._read_at = 0

    def begin_engine(self, name: str) -> None:
        self._name = name
        self._progress.update(self._task, description=f"{name}: starting")

    def begin_blocks(self) -> None:
        self._show({})

    def show(self, result: Path) -> None:
        """Show what the figures say that an engine's worker has written so far."""
        with contextlib.suppress(FileNotFoundError):  # no load is through
            if (written_at := result.stat().st_mtime_ns) != self._read_at:
                self._read_at = written_at
                self._show(json.loads(result.read_text()))

    def _show(self, figures: dict[str, Any]) -> None:
        through = [block for block in self._blocks if f"{block}_seconds" in figures]
        left = [block for block in self._blocks if block not in through]
        what = f"{self._name}: {left[0] if left else 'ending'}"
        completed = self._before + len(through)
        self._progress.update(self._task, description=what, completed=completed)

    def end_engine(self) -> None:
        """All of its blocks are through, or will never be."""
        self._before += len(self._blocks)
        self._progress.update(self._task, completed=self._before)


def _starts(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = set(names) - set(CONFIGURATIONS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{sorted(unknown)} are none of {CONFIGURATIONS}")
    return names


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("blocks", nargs="+", choices=BLOCKS, metavar="BLOCK")
    parser.add_argument("--json", type=Path, metavar="PATH", help="the result file")
    parser.add_argument("--quick", action="store_true", help="shorter loads, one engine")
    parser.add_argument("--trace", action="store_true", help="time the scheduler thread's hooks")
    parser.add_argument(
        "--starts",
        type=_starts,
        default=None,
        metavar="A,B,...",
        help="engines, in order (off,arena,native,off,arena; with --quick arena)",
    )
    parser.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="times that each engine is given throughput, together and turns",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"all engines at once, N rounds of --starts in turns; of {', '.join(ROUNDS_BLOCKS)}",
    )
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="start no engine that would end later"
    )
    parser.add_argument("--raw", type=Path, metavar="FOLDER", help="keeps every measurement")
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="keeps logs of engines and workers"
    )
    options = parser.parse_args()
    if options.starts is None:
        every = ["off", "arena", "native", "off", "arena"]
        options.starts = ["arena"] if options.quick else every
    if options.rounds is not None:
        _check_rounds(parser, options)
    return options


def _check_rounds(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: at least one is needed")
    others = set(options.blocks) - set(ROUNDS_BLOCKS)
    if others or options.quick:
        parser.error(f"--rounds goes with {', '.join(ROUNDS_BLOCKS)}, and not with --quick")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A Ctrl-C or SIGTERM takes effect once this is through."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main() -> int:
    options = _arguments()
    end_in_good_order()
    folder = Path(tempfile.mkdtemp(prefix="shmroute-engine-"))
    progress = bar()
    bench = Bench(options, folder, progress)
    try:
        # An interruption still gets the figures of the engines that were through.
        with contextlib.ExitStack() as at_end:
            at_end.callback(_report, bench, options)
            with progress:
                bench.run()
        rows = result_rows(bench.figures())
    finally:
        if bench.failed:
            print(f"logs: {options.logs or folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 2 if bench.failed else exit_code(rows)


def _report(bench: Bench, options: argparse.Namespace) -> None:
    runs = bench.figures()
    rows = result_rows(runs)
    if not rows:
        return
    print_table(rows, "shmroute engine")
    if options.json:
        commands = dict.fromkeys(run["command"] for run in runs)
        write(options.json, "engine", "; ".join(commands), rows)


def _shown(words: list[str]) -> list[str]:
    """The command line without its folders and the result file."""
    shown, skip = [], False
    for word in words:
        if not skip and word not in ("--json", "--raw", "--logs", "--seconds"):
            shown.append(word)
        skip = word in ("--json", "--raw", "--logs", "--seconds")
    return shown


if __name__ == "__main__":
    sys.exit(main())
