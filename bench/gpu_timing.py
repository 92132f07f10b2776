"""How `gpu` and `gpu_trainer` take times: of the calling thread, and between events on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from result_file import Row

Rows = list[Row]


def host_us(function: Callable[[], Any], rounds: int) -> np.ndarray:
    """Microseconds of the calling thread, the GPU idle before each."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        function()
        times.append((time.perf_counter_ns() - began) / 1e3)
    torch.cuda.synchronize()
    return np.array(times)


def gpu_us(function: Callable[[], Any], rounds: int, cycles: int = 200_000) -> float:
    """Median microseconds between two events around it, on the current stream; so many cycles of
    the GPU's clock are there to queue it.
    """
    times = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        first.record()
        function()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) * 1e3)
    return float(np.median(times))


def gbs(nbytes: int, microseconds: float) -> float:
    return round(nbytes / microseconds / 1e3, 2)


def figure(value: Any) -> float:
    return float(f"{value:.4g}")


def percentiles(
    name: str, times: Sequence[float] | np.ndarray, p50: float | None, p99: float | None
) -> Rows:
    shown = []
    for label, value, budget in (
        ("p50", np.percentile(times, 50), p50),
        ("p99", np.percentile(times, 99), p99),
    ):
        sense: Any = None if budget is None else "max"
        shown.append(Row(f"{name}, {label}", figure(value), "us", budget, sense))
    return shown
