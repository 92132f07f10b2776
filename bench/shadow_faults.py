"""Faults that are put into a scheduler process, to see what they do and that they are seen.

``engine(names)`` is the bridge's engine class whose scheduler applies them before it starts.
It also gives weights that spread to models that are loaded with ``load_format="dummy"``.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "SHMROUTE_BENCH_FAULTS"
MEASURED_FILE = "SHMROUTE_BENCH_MEASURED"  # lines of a word and a number
_DELAY_CYCLES = 120_000_000  # 60 ms or so of the GPU's clock: longer than a forward
_COPIES_BEFORE_ERROR = 20


def engine(names: tuple[str, ...]) -> Any:
    """``sglang_bridge.Engine`` with faults; ``names`` are those of ``_FAULTS``."""
    import sglang_bridge

    os.environ[VARIABLE] = ",".join(names)
    how = {"run_scheduler_process_func": staticmethod(run_scheduler)}
    return type("Faulty", (sglang_bridge.Engine,), how)


def run_scheduler(*arguments: Any, **options: Any) -> Any:
    """Entry point of the scheduler process."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    _spread_dummy_weights()
    for name in filter(None, os.environ[VARIABLE].split(",")):
        _FAULTS[name]()
    return run_scheduler_process(*arguments, **options)


def _spread_dummy_weights() -> None:
    """Draw every matrix so that its output has the variance of its input, as ``small_models``."""
    import torch
    from sglang.srt.model_loader import loader

    @torch.no_grad()
    def initialise(model: torch.nn.Module, *_: Any, **__: Any) -> None:
        generator = torch.Generator(device=next(model.parameters()).device).manual_seed(7)
        for name, weight in model.named_parameters():
            if not weight.is_floating_point():
                continue
            if weight.dim() < 2:
                weight.fill_(1.0 if "norm" in name else 0.0)
            else:
                scale = 1.0 if "embed" in name else weight.shape[-1] ** -0.5
                weight.normal_(std=scale, generator=generator)

    loader.initialize_dummy_weights = initialise


def _late_gather() -> None:
    """Gathers begin milliseconds late, as if the GPU were busy with another process."""
    import torch

    from sglang_bridge.gather_device import DeviceGatherer

    launch = DeviceGatherer._launch

    def late(self: Any, work: Any) -> None:
        with torch.cuda.stream(self._gather_stream):
            torch.cuda._sleep(_DELAY_CYCLES)
        launch(self, work)

    DeviceGatherer._launch = late  # type: ignore[method-assign]


def _no_fence() -> None:
    """The scatter does not wait for the gather."""
    from sglang_bridge.gather_device import DeviceGatherer

    DeviceGatherer._hold_back_scatters = lambda self, stream: None  # type: ignore[method-assign]


def _copy_error() -> None:
    """One copy is asked for from address 0, which the driver refuses."""
    from sglang_bridge import gather_device

    copy, seen = gather_device.DeviceGatherer.copy_rows, [0]

    def failing(self: Any, run: Any, lane: Any) -> None:
        seen[0] += 1
        if seen[0] == _COPIES_BEFORE_ERROR:
            gather_device.copy(self._heap_address + run.offset, 0, run.nbytes, self._copy)
        copy(self, run, lane)

    gather_device.DeviceGatherer.copy_rows = failing  # type: ignore[method-assign]


def _timed_snapshots() -> None:
    """Take snapshots in turn by step on the side stream and on the schedule stream; time both.

    Milliseconds from the request's end to its finished snapshot go to ``MEASURED_FILE``. Of a step
    with many requests the later ones' locations are copied all at once: those that copy nothing
    of their own are left out. So are those that should have gone aside while nothing was in flight.
    """
    import torch

    from sglang_bridge.gather_device import DeviceGatherer

    ours, take, idle = DeviceGatherer.snapshot, DeviceGatherer._take, DeviceGatherer.idle
    clock = torch.cuda.Stream()
    open_ones: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    path, copies = os.environ[MEASURED_FILE], [0]

    def counted(self: Any, target: int, source: int, nbytes: int) -> None:
        copies[0] += 1
        take(self, target, source, nbytes)

    def timed(self: Any, pool: Any, slot: int, start: int, end: int) -> Any:
        way = ("side", "schedule")[self._processed % 2]
        DeviceGatherer.idle = property(  # type: ignore[assignment,method-assign]
            lambda self: way == "schedule" or idle.__get__(self)
        )
        asked, taken = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before = copies[0]
        asked.record(clock)
        locations = ours(self, pool, slot, start, end)
        taken.record(self._gather_stream if self._aside else None)
        if copies[0] > before and self._aside == (way == "side"):
            open_ones.append((way, asked, taken))
        _write_finished(path, open_ones)
        return locations

    DeviceGatherer.snapshot = timed  # type: ignore[method-assign,assignment]
    DeviceGatherer._take = counted  # type: ignore[method-assign]


def _write_finished(path: str, open_ones: list[tuple[str, Any, Any]]) -> None:
    with open(path, "a") as file:
        while open_ones and open_ones[0][1].query() and open_ones[0][2].query():
            way, asked, taken = open_ones.pop(0)
            file.write(f"{way} {asked.elapsed_time(taken):.4f}\n")


def _counted_memory() -> None:
    """Write how many bytes of GPU memory each giving back of the table and the staging returns."""
    import torch

    from sglang_bridge.gather_device import DeviceGatherer

    give_back = DeviceGatherer.give_back

    def counted(self: Any) -> None:
        torch.cuda.empty_cache()  # what others left is not counted
        before = torch.cuda.memory_reserved()
        give_back(self)
        with open(os.environ[MEASURED_FILE], "a") as file:
            file.write(f"returned {before - torch.cuda.memory_reserved()}\n")

    DeviceGatherer.give_back = counted  # type: ignore[method-assign]


_FAULTS = {
    "timed-snapshots": _timed_snapshots,
    "counted-memory": _counted_memory,
    "late-gather": _late_gather,
    "no-fence": _no_fence,
    "copy-error": _copy_error,
}
