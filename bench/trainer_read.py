"""A packed batch's routes for the ranks of a trainer, beside SGLang's native format.

    python bench/trainer_read.py [--json PATH] [--quick]

The batch is 64 records of 8,192 rows of Qwen3-30B-A3B (48 MoE layers, top-8 of 128 experts). A
rank is of one pipeline stage of four and takes 12 layers of every token.

What is measured
    - Natively a rank has each response's base64 text: decode it, view it as int32, reshape it,
      take the stage's layers, pad each sequence's last token, pack the batch. As trainers have
      it, with the batch's samples all decoded before it is packed; and, beside it, with each
      sample cut as soon as it is decoded, which needs the least memory.
    - "Kept memory": into the tensor of the batch before, both ways. Otherwise the batch before is
      gone by then, and the arena's way has its memory again by itself (``kept_memory``); native
      has new memory, which costs page faults.
    - With the arena a rank has each response's ticket: ``read_batch`` of the same layers, padded
      alike. "As stored" is one byte an id, what crosses PCIe to a GPU that widens it there;
      "int32" is widened on the CPU, the very tensor that the native way gives. "A quarter of the
      tokens" is a rank of two context-parallel by two sequence-parallel ones.
    - The time of one rank, and until the last of eight is done that begin at once. A text comes
      from the page cache and a ticket from the parent: neither way pays for the transport.
    - Memory at its most, beyond what the process had before: private bytes, and those with its
      part of what it shares (PSS), which has its part of all pages of the arena that it has mapped.
      Texts are not counted; beside private bytes the arena is, once for all ranks.

How
    Ranks are processes with one thread of torch, as torchrun starts them. Each reads the batch once
    every way, while memory is measured at the moment when all hold their most; then in turns, in
    memory that the process has freed before, for the times; medians. The rows of both ways are
    compared before. With --quick the batch is a quarter as large.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_command import main
from result_file import Row
from rich.progress import Progress
from route_chains import EXPERTS, ROUTES, SGLANG, new_rid
from store import capacity_for, scratch_arena
from trainer_ranks import Batch, Ranks, Way, check_equal

TOKENS = 8_192
NAMES: dict[Way, str] = {
    "native": "native",
    "native, one by one": "native, sample by sample",
    "native, kept memory": "native, sample by sample into kept memory",
    "as stored": "arena, as stored",
    "int32": "arena, int32",
    "as stored, share": "arena, a quarter of the tokens",
    "as stored, kept memory": "arena, as stored into kept memory",
    "int32, kept memory": "arena, int32 into kept memory",
}
WAYS = tuple(NAMES)


@dataclass(frozen=True, slots=True)
class Size:
    """Records of the batch, and how often one rank and eight read them; from the arena thrice."""

    records: int
    one: int
    eight: int


FULL = Size(records=64, one=7, eight=3)
QUICK = Size(records=16, one=3, eight=2)
ARENA_LAPS = 3


@contextlib.contextmanager
def both_ways(records: int, progress: Progress) -> Iterator[Batch]:
    """The records in an arena, and as SGLang's responses carry them; gone afterwards."""
    random = np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory(prefix="bench-trainer-read-") as folder,
        scratch_arena(capacity_for([TOKENS] * records, records), records) as arena,
    ):
        batch = Batch([], [], TOKENS)
        for number in progress.track(range(records), description="records"):
            with arena.reserve(new_rid(), tokens=TOKENS) as record:
                record.rows[...] = random.integers(0, EXPERTS, record.rows.shape, np.uint8)
            text = Path(folder) / f"{number}"
            text.write_bytes(SGLANG.encode(record.rows.astype(np.int32).tobytes()))
            batch.tickets.append(record.ticket)
            batch.texts.append(text)
        yield batch


@dataclass(frozen=True, slots=True)
class Measured:
    """Of each way by a number of ranks: seconds until the last was done, and bytes of all."""

    count: int
    seconds: dict[Way, float]
    private: dict[Way, int]
    pss: dict[Way, int]


def measure(count: int, batch: Batch, laps: int, progress: Progress) -> Measured:
    """Memory of each way, then its times."""
    task = progress.add_task("1 rank" if count == 1 else f"{count} ranks", total=laps + 1)
    times: dict[Way, list[float]] = {way: [] for way in WAYS}
    with contextlib.closing(Ranks(count, batch)) as ranks:
        grown = {way: [one.grown for one in ranks.read(way, afresh=True)] for way in WAYS}
        progress.advance(task)
        for _ in range(laps):
            for way in WAYS:  # in turns, so that a busy moment of the machine hits all of them
                for _ in range(1 if way.startswith("native") else ARENA_LAPS):
                    readings = ranks.read(way, afresh=False)
                    times[way].append(max(reading.seconds for reading in readings))
            progress.advance(task)
    return Measured(
        count,
        {way: statistics.median(times[way]) for way in WAYS},
        {way: sum(memory.private for memory in grown[way]) for way in WAYS},
        {way: sum(memory.pss for memory in grown[way]) for way in WAYS},
    )


# -- figures -------------------------------------------------------------------------------------


def figures(one: Measured, eight: Measured, arena_bytes: int) -> Iterator[Row]:
    for measured in (one, eight):
        for way in WAYS:
            name = f"{_named(measured)}: {NAMES[way]}"
            yield Row(name, _rounded(measured.seconds[way] * 1e3), "ms")
        yield from _ratios(measured)
    for way in WAYS:
        yield Row(f"one rank: private, {NAMES[way]}", _mib(one.private[way]), "MiB")
    yield from _memory_of_all(eight, arena_bytes)


def _ratios(measured: Measured) -> Iterator[Row]:
    name, seconds = _named(measured), measured.seconds
    stored, widened = seconds["as stored"], seconds["int32"]
    native, lean = seconds["native"], seconds["native, one by one"]
    kept, widened_kept = seconds["as stored, kept memory"], seconds["int32, kept memory"]
    lean_kept = seconds["native, kept memory"]
    yield Row(f"{name}: native / as stored into kept memory", _rounded(native / kept), "x")
    yield Row(f"{name}: native / int32 into kept memory", _rounded(native / widened_kept), "x")
    yield Row(f"{name}: both into kept memory, as stored", _rounded(lean_kept / kept), "x")
    yield Row(f"{name}: both into kept memory, int32", _rounded(lean_kept / widened_kept), "x")
    yield Row(f"{name}: native / as stored", _rounded(native / stored), "x", 50, "min")
    yield Row(f"{name}: native / int32", _rounded(native / widened), "x")
    yield Row(f"{name}: native, sample by sample / as stored", _rounded(lean / stored), "x")
    yield Row(f"{name}: native, sample by sample / int32", _rounded(lean / widened), "x")


def _memory_of_all(eight: Measured, arena_bytes: int) -> Iterator[Row]:
    """Of the arena as much as there is, whoever its pages are counted to."""
    name = _named(eight)
    together: dict[Way, float] = {}
    for way in WAYS:
        shared = 0 if way.startswith("native") else arena_bytes
        together[way] = eight.private[way] + shared
        what = "private and the arena" if shared else "private"
        yield Row(f"{name}: {what}, {NAMES[way]}", _mib(together[way]), "MiB")
        yield Row(f"{name}: PSS, {NAMES[way]}", _mib(eight.pss[way]), "MiB")
    native, lean = together["native"], together["native, one by one"]
    stored, widened = together["as stored"], together["int32"]
    yield Row(f"{name}: memory, as stored / native", _rounded(stored / native), "x", 1 / 8, "max")
    yield Row(f"{name}: memory, int32 / native", _rounded(widened / native), "x")
    yield Row(f"{name}: memory, as stored / sample by sample", _rounded(stored / lean), "x")
    yield Row(f"{name}: memory, int32 / sample by sample", _rounded(widened / lean), "x")


def _named(measured: Measured) -> str:
    return "one rank" if measured.count == 1 else f"{measured.count} ranks"


def _mib(size: float) -> float:
    return _rounded(size / (1 << 20))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# -- the command ---------------------------------------------------------------------------------


def measured(quick: bool, progress: Progress) -> list[Row]:
    size = QUICK if quick else FULL
    with both_ways(size.records, progress) as batch:
        check_equal(batch)
        one = measure(1, batch, size.one, progress)
        eight = measure(8, batch, size.eight, progress)
    return list(figures(one, eight, size.records * TOKENS * ROUTES.row_bytes))


if __name__ == "__main__":
    quick = "a quarter of the records, under a minute"
    sys.exit(main("trainer_read", __doc__, quick, measured, packages=("pybase64",)))
