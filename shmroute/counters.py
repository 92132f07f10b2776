"""Counters of an arena, readable by everybody while the engine runs.

Three sides of the writer count: who reserves (an engine's scheduler thread), who seals, and
who reclaims. Each has a bank of its own, so that the scheduler thread counts without a
lock and nothing is lost; a reader adds the banks. What an engine counts on several threads
has a fourth bank and a lock (``SharedCounters``).

Sums that always hold, once nothing is in flight::

    reserved = sealed + failed
    finished = ticketed + inline + failed_requests + no_routes    (an engine's requests)

where ``ticketed = tickets - failed_after_ticket`` and ``failed`` of a request is
``failed_requests = failed_before_ticket + failed_after_ticket``.
"""

from __future__ import annotations

import threading

from .memory import Words

RESERVING, SEALING, RECLAIMING, ENGINE = 0, 1, 2, 3

# The order is part of the layout: append only.
NAMES = (
    # of the store
    "reserved",
    "sealed",
    "failed",
    "released",
    "evicted",
    "incomplete",
    "rows_sealed",
    "rows_missing",
    "heap_bytes_in_use",
    "slots_in_use",
    # of an engine that uses it
    "finished",
    "tickets",
    "inline",
    "inline_full",
    "inline_empty",
    "inline_after_failure",
    "failed_before_ticket",
    "failed_after_ticket",
    "no_routes",
    "hook_errors",
    "publish_calls",
    "shadow_records",
    "shadow_rows",
    "shadow_mismatches",
    "tags_checked",
    "tags_wrong",
    "table_bytes",
    "shadow_rows_incomparable",
    "pageable_copies",
    "host_buffers_added",
    "page_locked_bytes",
    "table_device_bytes",
    "inline_unlocked",
    # of the store again: times that a lease kept what was released or expired
    "kept_by_leases",
)
_INDEX = {name: index for index, name in enumerate(NAMES)}


class Counters:
    """One counting side's bank."""

    def __init__(self, memory: Words, bank: int) -> None:
        # Reads give plain numbers, at half of what an element of an array costs; a store is
        # one aligned 64-bit access, too.
        self._bank = memory[bank].data

    def add(self, name: str, amount: int = 1) -> None:
        self._bank[_INDEX[name]] += amount

    def set(self, name: str, value: int) -> None:
        """For gauges; a gauge belongs to one bank only."""
        self._bank[_INDEX[name]] = value


class SharedCounters(Counters):
    """A bank that several threads count in."""

    def __init__(self, memory: Words, bank: int) -> None:
        super().__init__(memory, bank)
        self._counting = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        with self._counting:
            super().add(name, amount)


def read_counters(memory: Words) -> dict[str, int]:
    """Every counter by name, all banks together, and what follows from them."""
    totals = memory.sum(axis=0, dtype="uint64")
    values = {name: int(totals[index]) for name, index in _INDEX.items()}
    late = values["failed_after_ticket"]
    values["failed_requests"] = values["failed_before_ticket"] + late
    values["ticketed"] = values["tickets"] - late
    return values
