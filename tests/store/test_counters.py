"""Counters that several threads use lose nothing."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from shmroute.counters import ENGINE, NAMES, RESERVING, Counters, SharedCounters, read_counters


@pytest.fixture
def memory():
    return np.zeros((4, 256), dtype=np.uint64)


class SlowBank(list):
    """Lets other threads run between reading a count and storing it."""

    def __getitem__(self, index):
        value = super().__getitem__(index)
        time.sleep(1e-4)
        return value


def test_two_threads_that_share_counters_lose_no_count():
    bank = SlowBank([0] * 256)
    counters = SharedCounters({ENGINE: SimpleNamespace(data=bank)}, ENGINE)

    def count():
        for _ in range(50):
            counters.add("failed_after_ticket")
            counters.add("tags_checked", 3)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bank[NAMES.index("failed_after_ticket")] == 100
    assert bank[NAMES.index("tags_checked")] == 300


def test_a_reader_adds_the_sides_that_count(memory):
    Counters(memory, RESERVING).add("tickets", 5)
    SharedCounters(memory, ENGINE).add("failed_after_ticket", 2)
    counted = read_counters(memory)
    assert counted["tickets"] == 5
    assert counted["ticketed"] == 3
    assert counted["failed_requests"] == 2
