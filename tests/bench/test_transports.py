"""The comparison of transports runs, finds the rows it sent, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import transport_mooncake
from benches import ShortRun
from engine_process import shared_memory_files
from memory_watch import MemoryWatch

MOONCAKE = pytest.mark.skipif(
    os.geteuid() != 0 or transport_mooncake.why_not() is not None,
    reason="Mooncake runs for root only, and where libibverbs is installed",
)
WAYS = (
    "arena",
    "multiprocessing.shared_memory",
    "torch.multiprocessing",
    "safetensors",
    "pyarrow IPC file",
    "LMDB",
    "Ray object store",
    "NIXL",
    "vLLM native",
    "SGLang native",
    pytest.param("Mooncake Store", marks=MOONCAKE),
    pytest.param("Mooncake Store, cached", marks=MOONCAKE),
)


def start_short(folder):
    return ShortRun(folder, "transports.py", "bench-store")


@pytest.fixture(scope="module")
def short(processes, valid_rows):
    """By name, the figures of a short run, whose result file is complete."""
    return {row["name"]: row["value"] for row in valid_rows(processes.done(start_short))}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_measured_with_each_number_of_readers(short, way):
    for readers in ("1 reader", "2 readers"):
        named = f"1 MB, {readers}: {way}"
        assert 0 < short[f"{named}: producer, p50"] < short[f"{named}: until it is read, p50"]
        assert short[f"{named}: bytes copied, of the record's"] >= 1
        assert short[f"{named}: own memory at most"] >= 0


@pytest.mark.parametrize("way", WAYS)
def test_records_reach_the_other_reader_after_one_was_killed(short, way):
    assert short[f"a reader of two killed: {way}: later records read"] > 0


def test_a_killed_reader_costs_the_arena_nothing(short):
    killed = "a reader of two killed: arena"
    assert short[f"{killed}: the other can open the record once more"] == 1
    assert short[f"{killed}: left in shared memory"] == 0


def test_interrupted_it_leaves_neither_processes_nor_files(start_bench):
    before = set(shared_memory_files())
    process = start_bench("transports.py", "bench-store", "--quick")
    while not any("bench-transports-" in name for name in set(shared_memory_files()) - before):
        assert process.poll() is None
    children = process.children()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    left = set(shared_memory_files()) - before
    assert not {name for name in left if "bench-transports-" in name or "bench-store-" in name}
    assert children
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def test_the_memory_watch_sees_what_is_taken_and_given_back():
    with MemoryWatch([os.getpid()]) as watch:
        taken = bytearray(os.urandom(1 << 16)) * (64 << 4)
        del taken
    assert watch.most == pytest.approx(64 << 20, rel=0.1)
