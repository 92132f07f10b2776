"""The measuring process of one engine of ``engine.py``: every block, over HTTP.

    python bench/engine_worker.py SPEC.json

The specification is a `Specification` as JSON. Figures are written to its ``result`` after every
load, so a run that is cut off keeps those that it has; ``done`` in them says that it was not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
import traceback
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import Any

import engine_memory
import engine_trace
import numpy as np
from engine_http import Client
from engine_routes import TakenRoutes
from engine_setup import dimensions, scale_for
from engine_streams import SteadyStreams
from engine_trainer import TrainerProcess
from engine_workloads import (
    Load,
    inter_token,
    latency,
    several_turns,
    steady,
    throughput,
    together,
    warm_up,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Specification:
    """What one worker does.

    Attributes
    ----------
    blocks
        Loads, as `engine.BLOCKS` names them.
    arena
        Name of the arena, of every configuration.
    url, server, start_seconds
        The engine's address, its process id, and how long it took to serve.
    rounds
        Other engines are up beside it, and this is one turn of several.
    runs
        How often ``throughput``, ``together`` and ``turns`` are run; None: as the scale says.
    trace
        File that its scheduler writes a trace into; empty without one.
    command
        What the result file says, since an engine's figures may be taken into another command's.
    """

    configuration: str
    blocks: tuple[str, ...]
    arena: str
    url: str
    server: int
    start_seconds: float
    gpu: bool
    quick: bool
    rounds: bool
    runs: int | None
    trace: str
    result: str
    command: str


class Worker:
    """The loads on an engine, its trace, and the figures taken."""

    def __init__(self, specification: Specification, at_end: ExitStack) -> None:
        self._spec = specification
        self._at_end = at_end
        self._scale = scale_for(specification.gpu, specification.quick, specification.rounds)
        self._asks = specification.configuration != "off"
        self._arena = specification.arena if specification.configuration == "arena" else None
        trace = specification.trace
        self._trace = engine_trace.opened(Path(trace)) if trace else None
        self._trace_read = 0
        model = dimensions(specification.gpu)
        self._layers, self._top_k = model["num_hidden_layers"], model["num_experts_per_tok"]
        self._vocabulary = model["vocab_size"]
        self._routes = TakenRoutes(
            specification.configuration, model["num_experts"], self._layers, self._top_k
        )
        self.figures: dict[str, Any] = {
            "configuration": specification.configuration,
            "blocks": list(specification.blocks),
            "gpu": specification.gpu,
            "quick": specification.quick,
            "rounds": specification.rounds,
            "start_seconds": specification.start_seconds,
            "command": specification.command,
            "failed": [],
            "done": False,
        }

    async def run(self) -> None:
        async with Client(self._spec.url) as client:
            seed = np.random.default_rng(7)
            load = Load(client, self._scale, self._asks, self._vocabulary, seed, self._routes)
            if "memory" in self._spec.blocks:
                self.figures["memory_idle"] = self._memory_reading()
            await warm_up(load)
            self._read_trace()
            for block in self._spec.blocks:
                began = time.perf_counter()
                try:
                    await getattr(self, f"_{block}")(load)
                except Exception:
                    # A start is dear: the other blocks may still go through.
                    traceback.print_exc()
                    self.figures["failed"].append(block)
                self.figures[f"{block}_seconds"] = time.perf_counter() - began
                self._save()
        self.figures["done"] = True
        self._save()

    @cached_property
    def _streams(self) -> SteadyStreams:
        return self._at_end.enter_context(closing(SteadyStreams(self._spec.url)))

    # -- blocks ------------------------------------------------------------------------------

    async def _throughput(self, load: Load) -> None:
        for _ in range(self._spec.runs or self._scale.throughput_runs):
            self._add("throughput", await throughput(load, asks=self._asks))

    async def _together(self, load: Load) -> None:
        for _ in range(self._spec.runs or self._scale.throughput_runs):
            self._add("together", await together(load))

    async def _unasked(self, load: Load) -> None:
        self._add("unasked", await throughput(load, asks=False))

    async def _itl(self, load: Load) -> None:
        for finishes, runs in self._scale.finishes:
            for _ in range(runs):
                self._add("itl", await inter_token(load, self._streams, finishes))

    async def _steady(self, load: Load) -> None:
        self._add("steady", await steady(load))

    async def _turns(self, load: Load) -> None:
        for _ in range(self._spec.runs or self._scale.turns_runs):
            for deltas in (False, True) if self._asks else (False,):
                self._add("turns", await several_turns(load, deltas=deltas))

    async def _latency(self, load: Load) -> None:
        places = ("host", "cuda") if self._spec.gpu else ("host",)
        trainer = None
        if self._asks:
            trainer = TrainerProcess(self._spec.configuration, self._layers, self._top_k, places)
        try:
            for beside in (None, self._streams):
                deliveries = await latency(load, trainer, places if trainer else places[:1], beside)
                self.figures.setdefault("latency", []).extend(deliveries)
                self._add_trace("latency_beside" if beside else "latency")
        finally:
            if trainer is not None:
                trainer.stop()

    async def _memory(self, load: Load) -> None:
        """Records of a full batch are held while memory is read."""
        self._routes.keep = True
        before = self._routes.rows
        await throughput(load, asks=self._asks)
        held = self._routes.rows - before
        self.figures["memory"] = {**self._memory_reading(), "rows_held": held}
        self._routes.keep = False
        self._routes.release()
        self._add_trace("memory")

    # -- figures -----------------------------------------------------------------------------

    def _memory_reading(self) -> dict[str, Any]:
        return engine_memory.of_engine(self._spec.server, self._arena)

    def _add(self, name: str, figures: dict[str, Any]) -> None:
        self.figures.setdefault(name, []).append(figures)
        self._add_trace(name)

    def _add_trace(self, name: str) -> None:
        if self._trace is not None:
            time.sleep(0.2)  # the scheduler is behind the answer it has sent
            summary = engine_trace.summary(self._read_trace())
            self.figures.setdefault("trace", []).append({"block": name, **summary})
        self._save()

    def _read_trace(self) -> Any:
        if self._trace is None:
            return None
        events = engine_trace.rows_of(self._trace, self._trace_read)
        self._trace_read += len(events)
        return events

    def _save(self) -> None:
        if self._arena:
            self.figures["counters"] = engine_memory.counters(self._arena)
        routes = self._routes
        self.figures["responses"], self.figures["rows"] = routes.responses, routes.rows
        self.figures["checked"] = routes.checked
        path = Path(self._spec.result)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures))
        partial.replace(path)  # whoever is cut off here leaves the former figures


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    with ExitStack() as at_end:
        worker = Worker(Specification(**{**given, "blocks": tuple(given["blocks"])}), at_end)
        asyncio.run(worker.run())
    if worker.figures["failed"]:
        sys.exit(f"failed: {', '.join(worker.figures['failed'])}")


if __name__ == "__main__":
    main()
