"""Host memory that routes cost: a real engine and its trainers, three ways.

    python bench/memory_overhead.py [WAY ...] [--json PATH] [--quick]

The engine is SGLang's own server, on a CPU unless torch sees a GPU, with a model of real routing
width: 48 MoE layers, top-8 of 128 experts, small otherwise. It is started with routes off, with
SGLang's own (``native``) and with an arena, and answers the same requests; nothing is released, so
that all rows are in flight between engine and trainers.

What is measured
    - Of each process of the engine, at rest with all responses held: private memory (USS, which
      has what only this process maps of an arena), proportional (PSS), own (RssAnon), shared
      (RssShmem), locked (VmLck, VmPin), and the most that was resident under the load (VmHWM). Of
      all together, the most memory of their own that the last load took (`memory_watch`). Bytes in
      /dev/shm, and on the GPU where there is one.
    - How that grows with tokens in flight, of each process beyond what it had before any of them,
      whatever it was asked for, and with tensor-parallel ranks.
    - Of 1, 4 and 8 trainer ranks that read the batch (`trainer_ranks`: a pipeline stage's 12 layers
      each, packed): private memory and PSS at most, and private memory while they hold the batch,
      beyond what they had after a first read. PSS has a rank's part of all pages of the arena that
      it has mapped, which is shown alone, too; private memory has none, since the engine has mapped
      them as well. What the native way's responses take is counted once, as if one process kept the
      texts.
    - Bytes for each row in flight, beside the floor: moe_layers * top_k * itemsize.

How
    Engines one after the other, so that libraries are shared by one engine's processes only. Memory
    of an idle engine differs between starts by some MiB, so figures of a row are taken from what is
    held, not from differences of whole processes.

    --quick shows that everything is read, not what it is: with an arena only, unless ways are
    named, which are started side by side, so that they share their libraries' pages, which PSS
    shows; with SGLang's dummy weights instead of a checkpoint's; a small batch, and one number of
    ranks that read it. What a start takes is mostly SGLang's import in three processes.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import trainer_ranks
from bench_command import main
from memory_engines import OUTPUT_TOKENS, WAYS, MeasuredEngine, Reading, Way
from result_file import Row
from rich.progress import Progress
from route_chains import EXPERTS, LAYERS, ROUTES, TOP_K
from small_models import qwen3_moe
from trainer_ranks import Batch, Ranks

MIB = 1 / (1 << 20)
FLOOR = ROUTES.row_bytes
SHOWN = {
    "Uss": "USS",
    "Pss": "PSS",
    "RssAnon": "own memory",
    "RssShmem": "shared memory",
    "VmLck": "locked",
    "VmPin": "pinned",
    "VmHWM": "resident at most",
}
GROWING = ("Uss", "Pss", "RssShmem")
TRAINERS: dict[Way, tuple[trainer_ranks.Way, ...]] = {
    "off": (),
    "native": ("native", "native, one by one"),
    "arena": ("as stored", "int32"),
}
QUICK_HELP = "a small load on an engine with an arena, under a minute"


@dataclass(frozen=True, slots=True)
class Size:
    """The load and what reads it.

    Attributes
    ----------
    requests
        Of one step; every step adds as many.
    tensor_parallel
        Sizes of it, each with every way.
    quick
        Of `MeasuredEngine`.
    """

    requests: int
    tokens: int
    steps: int
    kv_tokens: int
    capacity: str
    ranks: tuple[int, ...]
    tensor_parallel: tuple[int, ...]
    quick: bool = False

    def groups(self, ways: Sequence[Way]) -> list[list[tuple[int, Way]]]:
        """Tensor-parallel sizes and ways of the engines that run at the same time."""
        engines = [(tp, way) for tp in self.tensor_parallel for way in ways]
        return [engines] if self.quick else [[engine] for engine in engines]


FULL = Size(
    requests=16,
    tokens=505,
    steps=3,
    kv_tokens=65_536,
    capacity="256MiB",
    ranks=(1, 4, 8),
    tensor_parallel=(1, 2),
)
QUICK = Size(
    requests=2,
    tokens=57,
    steps=1,
    kv_tokens=8_192,
    capacity="64MiB",
    ranks=(2,),
    tensor_parallel=(1,),
    quick=True,
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One engine with its trainers.

    Attributes
    ----------
    held
        What was read with so many rows in flight, none to begin with.
    most
        Bytes of their own that the engine's processes took at most in the step after which there
        were so many rows.
    carried
        Bytes of the responses' texts for routes, all together.
    trainers
        By number of ranks and way of reading, their readings.
    """

    way: Way
    tp: int
    held: dict[int, Reading]
    most: dict[int, int]
    carried: int
    trainers: dict[int, dict[trainer_ranks.Way, list[trainer_ranks.Reading]]]

    @property
    def rows(self) -> int:
        return max(self.held)

    @property
    def loaded(self) -> Reading:
        return self.held[self.rows]

    @property
    def unloaded(self) -> Reading:
        return self.held[0]


class Bench:
    """Engines, loads, and what was read."""

    def __init__(self, size: Size, ways: Sequence[Way], folder: Path, progress: Progress) -> None:
        self._size, self._ways = size, ways
        self._folder, self._progress = folder, progress
        self._model = qwen3_moe(
            folder / "model",
            num_experts=EXPERTS,
            top_k=TOP_K,
            layers=1 if size.quick else LAYERS,
            hidden=64,
            expert_width=16,
        )
        self._arena = f"bench-memory-{os.getpid()}"
        self.measured: list[Measured] = []

    def run(self) -> None:
        groups = self._size.groups(self._ways)
        self._task = self._progress.add_task("engines", total=sum(map(len, groups)))
        for group in groups:
            with ExitStack() as at_end:
                engines = [at_end.enter_context(closing(self._engine(*each))) for each in group]
                for engine in engines:
                    engine.launch()
                for engine, (tp, _) in zip(engines, group, strict=True):
                    engine.finish_start()
                    self.measured.append(self._measure(engine, tp))
                    self._progress.advance(self._task)

    def _engine(self, tp: int, way: Way) -> MeasuredEngine:
        size = self._size
        return MeasuredEngine(
            way,
            self._model,
            self._arena,
            size.kv_tokens,
            size.capacity,
            tp,
            self._folder / f"{way}-{tp}.log",
            quick=size.quick,
        )

    def _measure(self, engine: MeasuredEngine, tp: int) -> Measured:
        size = self._size
        texts: list[str] = []
        held, most = {0: engine.reading()}, {}
        for _ in range(size.steps):
            with engine.watch() as watch:
                texts += engine.ask(size.requests, size.tokens)
            rows = len(texts) * (size.tokens + OUTPUT_TOKENS - 1)
            held[rows], most[rows] = engine.reading(), watch.most
        trainers = self._trainers(engine.way, texts) if tp == 1 else {}
        return Measured(engine.way, tp, held, most, sum(map(len, texts)), trainers)

    def _trainers(
        self, way: Way, texts: Sequence[str]
    ) -> dict[int, dict[trainer_ranks.Way, list[trainer_ranks.Reading]]]:
        if not TRAINERS[way]:
            return {}
        batch = Batch([base64.b64decode(text) for text in texts] if way == "arena" else [], [])
        for number, text in enumerate(texts if way == "native" else ()):
            path = self._folder / f"text-{number}"
            path.write_text(text)
            batch.texts.append(path)
        found = {}
        for count in self._size.ranks:
            with closing(Ranks(count, batch)) as ranks:
                for kind in TRAINERS[way]:  # what is made on first use
                    ranks.read(kind, afresh=True)
                found[count] = {kind: ranks.read(kind, afresh=True) for kind in TRAINERS[way]}
        return found


# -- figures -------------------------------------------------------------------------------------


def figures(measured: Sequence[Measured]) -> list[Row]:
    rows: list[Row] = [Row("floor: bytes a row", FLOOR, "B")]
    for each in measured:
        rows += _of_engine(each)
        rows += _of_growth(each)
        rows += _of_rows(each)
        rows += _of_trainers(each)
    return rows + list(_beyond_off(measured))


def _named(each: Measured) -> str:
    return each.way if each.tp == 1 else f"{each.way}, TP {each.tp}"


def _of_engine(each: Measured) -> Iterator[Row]:
    name, loaded = _named(each), each.loaded
    for role, process in loaded.roles.items():
        for field, shown in SHOWN.items():
            yield _mib(f"{name}: {role}: {shown}", process.get(field, 0))
    for field in ("Uss", "Pss", "RssAnon"):
        yield _mib(f"{name}: all processes: {SHOWN[field]}", loaded.total(field))
    yield _mib(f"{name}: /dev/shm but for arenas", loaded.shm)
    if loaded.arena:
        yield _mib(f"{name}: /dev/shm, the arena", loaded.arena["taken"])
        yield _mib(f"{name}: route table", loaded.arena["table"])
    if loaded.gpu is not None:
        yield _mib(f"{name}: GPU in use", loaded.gpu)


def _of_growth(each: Measured) -> Iterator[Row]:
    """What there is more than before the load, by tokens in flight."""
    before = each.unloaded
    for tokens, most in each.most.items():
        reading, load = each.held[tokens], f"beyond before the load, {tokens} tokens"
        for role, process in reading.roles.items():
            had = before.roles.get(role, {})
            for field in GROWING:
                more = process.get(field, 0) - had.get(field, 0)
                yield _mib(f"{_named(each)}: {role}: {SHOWN[field]} {load}", more)
        name = f"{_named(each)}: all processes"
        for field in GROWING:
            more = reading.total(field) - before.total(field)
            yield _mib(f"{name}: {SHOWN[field]} {load}", more)
        yield _mib(f"{name}: own memory at most, beyond before the last of {tokens} tokens", most)
        yield _mib(f"{_named(each)}: /dev/shm but for arenas {load}", reading.shm - before.shm)
        if reading.gpu is not None and before.gpu is not None:
            yield _mib(f"{_named(each)}: GPU in use {load}", reading.gpu - before.gpu)


def _of_rows(each: Measured) -> Iterator[Row]:
    """Bytes for each row in flight between engine and trainers, by how many there are."""
    name = _named(each)
    if each.way == "native":
        yield Row(f"{name}: response text a row, {each.rows} rows", each.carried / each.rows, "B")
    if each.way != "arena":
        return
    for rows, reading in each.held.items():
        if rows:
            what = f"{name}: arena in use a row, {rows} rows"
            held = reading.arena["in_use"] - each.unloaded.arena["in_use"]
            yield Row(what, _rounded(held / rows), "B", FLOOR * 1.02, "max")
    yield Row(f"{name}: response text a row, {each.rows} rows", each.carried / each.rows, "B")


def _of_trainers(each: Measured) -> Iterator[Row]:
    kept = each.carried if each.way == "native" else each.loaded.arena.get("in_use", 0)
    for count, readings in each.trainers.items():
        ranks = "1 rank" if count == 1 else f"{count} ranks"
        for kind, taken in readings.items():
            name = f"{ranks}, {kind}"
            private = sum(reading.held.private for reading in taken)
            most = sum(reading.grown.private for reading in taken)
            yield _mib(f"{name}: private at most", most)
            yield _mib(f"{name}: PSS at most", sum(one.grown.pss for one in taken))
            if each.way == "arena":
                mapped = sum(one.grown.arena for one in taken)
                yield _mib(f"{name}: PSS at most, the arena's pages alone", mapped)
            yield _mib(f"{name}: private with the packed batch", private)
            held = (kept + private) / each.rows
            yield Row(f"{name}: bytes a row, records and ranks", _rounded(held), "B")
            yield Row(f"{name}: the same at most", _rounded((kept + most) / each.rows), "B")


def _beyond_off(measured: Sequence[Measured]) -> Iterator[Row]:
    """What an engine with routes has more than one without, at rest and before any load."""
    off = {each.tp: each.unloaded for each in measured if each.way == "off"}
    for each in measured:
        if each.way == "off" or each.tp not in off:
            continue
        more = each.unloaded.total("RssAnon") - off[each.tp].total("RssAnon")
        yield _mib(f"{_named(each)}: own memory beyond routes off, before the load", more)


def _mib(name: str, size: float) -> Row:
    return Row(name, _rounded(size * MIB), "MiB")


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def measure(quick: bool, progress: Progress, ways: Sequence[Way]) -> list[Row]:
    """Figures; the folder with the engines' logs stays where something failed."""
    folder = Path(tempfile.mkdtemp(prefix="bench-memory-"))
    ways = ways or (("arena",) if quick else WAYS)
    try:
        bench = Bench(QUICK if quick else FULL, ways, folder, progress)
        bench.run()
    except Exception:
        print(f"logs: {folder}", file=sys.stderr)
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return figures(bench.measured)


if __name__ == "__main__":
    sys.exit(main("memory_overhead", __doc__, QUICK_HELP, measure, parts=WAYS))
