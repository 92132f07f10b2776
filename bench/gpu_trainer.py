"""The trainer's part of ``gpu.py``: routes of another process's arena onto this one's GPU.

    python bench/gpu_trainer.py < QUESTION > ROWS        (``gpu.py`` runs it)

QUESTION is a JSON object: ``batch``, 64 tickets in base64 of 8,192 tokens each, ``long``, one of
32,768 tokens, and ``rounds``. ROWS is a JSON list of `result_file.Row` fields.

It is a process of its own since CUDA may refuse one process a second lock of the same memory,
and the writer has locked its mapping. First it has its own mapping page-locked and waits for
that, then it checks that what arrives on the GPU are the arena's rows, then it measures: from
the call of ``read_batch``, opening of every record included, until the device is done with
nothing else to do, on the host's clock. The ceiling is one copy of as many bytes out of torch's
own page-locked memory, between events, here and now; of int32 and int64 rows, too, only the
stored bytes cross.

Only the whole batch as stored has a budget. A fourth of the layers is a fourth of the bytes,
which PCIe carries in less time than 64 records take to be opened.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_timing import Rows, figure, gbs, gpu_us
from result_file import Row

import shmroute
from shmroute import RouteBatch, ShmRouteReader
from shmroute.attached import AttachedArena, attach
from shmroute.cuda_runtime import copy_to_device
from shmroute.ticket import decode

DEVICE = torch.device("cuda:0")
STAGE = slice(0, 12)
DTYPES = {"as stored": None, "as int32": torch.int32, "as int64": torch.int64}
LOCK_SECONDS = 120.0


def page_lock(ticket: bytes) -> Rows:
    """Have this process's mapping of the arena page-locked, and wait for it."""
    segment = decode(ticket).segment  # type: ignore[union-attr]
    attached = attach(segment)
    heap = attached.memory.description.heap_bytes
    began = time.perf_counter()
    locked = _wait_for_lock(attached)
    seconds = time.perf_counter() - began
    verdict = Row("trainer: its mapping is page-locked", int(locked), "of 1", 1, "min")
    if not locked:
        refused = attached.page_lock_refused or f"still under way after {LOCK_SECONDS:.0f} s"
        print(f"the trainer's mapping is not page-locked: {refused}", file=sys.stderr)
        return [verdict]
    return [
        verdict,
        Row(f"trainer: page-locking its {heap / 2**30:.2f} GiB", figure(seconds), "s"),
        Row("trainer: page-locking, a GiB", figure(seconds / (heap / 2**30)), "s"),
    ]


def _wait_for_lock(attached: AttachedArena) -> bool:
    deadline = time.perf_counter() + LOCK_SECONDS
    while not attached.page_locked(0):
        if attached.page_lock_refused is not None or time.perf_counter() > deadline:
            return False
        time.sleep(0.001)
    return True


def check(tickets: list[bytes]) -> None:
    """A figure for wrong rows is worth nothing."""
    for layers in (None, STAGE):
        expected = shmroute.read_batch(tickets, layers=layers).rows
        for dtype in DTYPES.values():
            there = shmroute.read_batch(tickets, layers=layers, device=DEVICE, dtype=dtype).rows
            if not torch.equal(there, expected.to(DEVICE).to(there.dtype)):
                raise AssertionError(f"wrong rows on the GPU: layers {layers}, dtype {dtype}")


def ceiling(nbytes: int, rounds: int) -> float:
    """GB/s of one copy out of torch's page-locked memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    return gbs(nbytes, gpu_us(functools.partial(target.copy_, source, non_blocking=True), rounds))


def until_there(read: Callable[[], Any], rounds: int) -> np.ndarray:
    """Microseconds from the call until the device is done."""
    times = []
    for _ in range(rounds + 3):
        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        result = read()
        torch.cuda.synchronize()
        times.append((time.perf_counter_ns() - began) / 1e3)
        del result  # its memory is the next round's
    return np.array(times[3:])


def in_pieces(nbytes: int, pieces: int, rounds: int) -> float:
    """GB/s of as many bytes in so many copies, one after the other: nothing but the calls that
    queue them, by the same clock as a batch.
    """
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    part = nbytes // pieces
    places = [
        (target.data_ptr() + part * piece, source.data_ptr() + part * piece)
        for piece in range(pieces)
    ]
    stream = torch.cuda.current_stream().cuda_stream

    def queue() -> None:
        for there, here in places:
            copy_to_device(there, here, part, stream)

    return gbs(nbytes, float(np.median(until_there(queue, rounds))))


def batches(tickets: list[bytes], rounds: int) -> Rows:
    """The packed batch, all layers and a pipeline stage's, in each dtype."""
    whole: RouteBatch = shmroute.read_batch(tickets)
    stored = whole.rows.nbytes
    del whole
    speed = ceiling(stored, rounds)
    pieces = in_pieces(stored, len(tickets), rounds)
    moved = f"trainer: page-locked memory to the device, {stored / 1e6:.0f} MB"
    rows = [
        Row(moved, speed, "GB/s"),
        Row(f"{moved} in {len(tickets)} copies, of that", figure(100 * pieces / speed), "%"),
    ]
    for layers, share, label in ((None, 1.0, "48 layers"), (STAGE, 12 / 48, "12 of 48 layers")):
        for name, dtype in DTYPES.items():
            read = functools.partial(
                shmroute.read_batch, tickets, layers=layers, device=DEVICE, dtype=dtype
            )
            took = float(np.median(until_there(read, rounds)))
            of_ceiling = 100 * gbs(int(stored * share), took) / speed
            held = layers is None and dtype is None
            what = f"trainer: packed batch of 64 x 8192 tokens, {label}, {name}"
            rows += [
                Row(what, figure(took / 1e3), "ms"),
                Row(
                    f"{what}, of the ceiling",
                    figure(of_ceiling),
                    "%",
                    90 if held else None,
                    "min" if held else None,
                ),
            ]
    return rows


def one_record(ticket: bytes) -> Rows:
    """A long record by its ticket, onto the device."""

    def read() -> torch.Tensor:
        with ShmRouteReader(ticket) as routes:
            tensor: torch.Tensor = routes.torch(device=DEVICE)
        return tensor

    times = until_there(read, 50) / 1e3
    what = "trainer: one record of 32768 tokens by ticket to the device"
    return [
        Row(f"{what}, p50", figure(np.percentile(times, 50)), "ms"),
        Row(f"{what}, p99", figure(np.percentile(times, 99)), "ms"),
    ]


def main() -> None:
    asked = json.load(sys.stdin)
    tickets = [base64.b64decode(text) for text in asked["batch"]]
    long = base64.b64decode(asked["long"])
    torch.zeros(1, device=DEVICE)  # the context is there before anything is timed
    rows = page_lock(long)
    check(tickets)
    rows += batches(tickets, asked["rounds"]) + one_record(long)
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
