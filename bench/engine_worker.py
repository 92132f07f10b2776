"""One engine of ``engine.py``, from its start to its end, in a process of its own.

    python bench/engine_worker.py SPEC.json

The specification is a `Specification` as JSON. Figures are written to its ``result`` after every
load, so a run that is cut off keeps those that it has; ``done`` in them says that it was not.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import engine_memory
import engine_trace
import numpy as np
from engine_setup import dimensions, engine_arguments, scale_for
from engine_trainer import TrainerProcess
from engine_workloads import Load, inter_token, latency, several_turns, steady, throughput, warm_up

CHECKED_RECORDS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Specification:
    """What one worker does.

    Attributes
    ----------
    blocks
        Loads, as `engine.BLOCKS` names them.
    arena
        Name of the arena, of every configuration.
    ready
        File to make once the engine has started.
    """

    configuration: str
    blocks: tuple[str, ...]
    arena: str
    model: str
    gpu: bool
    quick: bool
    trace: bool
    prefill_graph: bool
    result: str
    ready: str


class TakenRoutes:
    """What the loads hand over: checked, released, counted."""

    def __init__(self, configuration: str, experts: int, layers: int, top_k: int) -> None:
        self._arena, self._native = configuration == "arena", configuration == "native"
        self._experts, self._shape = experts, (-1, layers, top_k)
        self.responses = self.rows = self.checked = 0
        self.keep = False
        self._kept: list[str] = []

    def take(self, outputs: Iterable[dict[str, Any]], start: int = 0) -> None:
        metas = [output["meta_info"] for output in outputs]
        for meta in metas[:CHECKED_RECORDS]:
            self._check(meta, start)
        self.responses += len(metas)
        self.rows += sum(_expected_rows(meta, start) for meta in metas)
        if self._arena:
            self._kept += [meta["routed_experts"] for meta in metas]
            if not self.keep:
                self.release()

    def release(self) -> None:
        if self._kept:
            import shmroute

            shmroute.release(self._kept)
            self._kept.clear()

    def _check(self, meta: dict[str, Any], start: int) -> None:
        if self._arena:
            from shmroute import ShmRouteReader

            with ShmRouteReader(meta) as routes:
                if not routes.complete:
                    raise AssertionError(f"rows {routes.missing} are missing")
                self._check_rows(routes.numpy(), _expected_rows(meta, start))
        elif self._native:
            import pybase64

            ids = np.frombuffer(pybase64.b64decode(meta["routed_experts"]), dtype=np.int32)
            self._check_rows(ids.reshape(self._shape), _expected_rows(meta, start))
        self.checked += 1

    def _check_rows(self, rows: Any, expected: int) -> None:
        if rows.shape != (expected, *self._shape[1:]):
            raise AssertionError(f"rows of shape {rows.shape}, not {expected} of {self._shape[1:]}")
        ordered = np.sort(rows, axis=-1)
        if ordered.min() < 0 or ordered.max() >= self._experts:
            raise AssertionError(f"expert ids from {ordered.min()} to {ordered.max()}")
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise AssertionError("an expert is named twice in one row")


def _engine_class(*, bridge: bool) -> Any:
    if bridge:
        import sglang_bridge

        return sglang_bridge.Engine
    from sglang.srt.entrypoints.engine import Engine

    return Engine


def _expected_rows(meta: dict[str, Any], start: int) -> int:
    return int(meta["prompt_tokens"] + meta["completion_tokens"] - 1 - start)


class Worker:
    """The engine, its trace, and the figures taken."""

    def __init__(self, specification: Specification) -> None:
        self._spec = specification
        self._scale = scale_for(specification.gpu, specification.quick)
        self._asks = specification.configuration != "off"
        self._arena = specification.arena if specification.configuration == "arena" else None
        self._trace: engine_trace.Events | None = None
        self._trace_read = 0
        self.figures: dict[str, Any] = {
            "configuration": specification.configuration,
            "blocks": list(specification.blocks),
            "gpu": specification.gpu,
            "quick": specification.quick,
            "failed": [],
            "done": False,
        }
        self.engine: Any = None

    def run(self) -> None:
        began = time.perf_counter()
        self.engine = self._start()
        self.figures["start_seconds"] = time.perf_counter() - began
        Path(self._spec.ready).touch()
        model = dimensions(self._spec.gpu)
        routes = TakenRoutes(
            self._spec.configuration,
            model["num_experts"],
            model["num_hidden_layers"],
            model["num_experts_per_tok"],
        )
        seed = np.random.default_rng(7)
        load = Load(self.engine, self._scale, self._asks, model["vocab_size"], seed, routes)
        if "memory" in self._spec.blocks:
            self.figures["memory_idle"] = engine_memory.of_engine(self._arena)
        warm_up(load)
        self._read_trace()
        for block in self._spec.blocks:
            began = time.perf_counter()
            try:
                getattr(self, f"_{block}")(load, routes)
            except Exception:
                # A start is dear: the other blocks may still go through.
                traceback.print_exc()
                self.figures["failed"].append(block)
            self.figures[f"{block}_seconds"] = time.perf_counter() - began
            self._save(routes)
        self.figures["done"] = True
        self._save(routes)

    def _start(self) -> Any:
        spec = self._spec
        arguments = engine_arguments(
            spec.configuration,
            Path(spec.model),
            self._scale,
            gpu=spec.gpu,
            prefill_graph=spec.prefill_graph,
        )
        kind = _engine_class(bridge=self._arena is not None)
        if self._arena:
            arguments |= {"shmroute_arena": self._arena, "shmroute_capacity": self._scale.capacity}
        if spec.trace:
            path = Path(spec.result).with_suffix(".trace")
            self._trace = engine_trace.create(path)
            kind = engine_trace.traced(kind, path)
        return kind(**arguments)

    # -- blocks ------------------------------------------------------------------------------

    def _throughput(self, load: Load, routes: TakenRoutes) -> None:
        for _ in range(self._scale.throughput_runs):
            self._add("throughput", throughput(load, asks=self._asks), routes)

    def _unasked(self, load: Load, routes: TakenRoutes) -> None:
        self._add("unasked", throughput(load, asks=False), routes)

    def _itl(self, load: Load, routes: TakenRoutes) -> None:
        for finishes, runs in self._scale.finishes:
            for _ in range(runs):
                self._add("itl", inter_token(load, finishes), routes)

    def _steady(self, load: Load, routes: TakenRoutes) -> None:
        self._add("steady", steady(load), routes)

    def _turns(self, load: Load, routes: TakenRoutes) -> None:
        for _ in range(self._scale.throughput_runs):
            for deltas in (False, True) if self._asks else (False,):
                self._add("turns", several_turns(load, deltas=deltas), routes)

    def _latency(self, load: Load, routes: TakenRoutes) -> None:
        places = ("host", "cuda") if self._spec.gpu else ("host",)
        shape = dimensions(self._spec.gpu)
        trainer = None
        if self._asks:
            trainer = TrainerProcess(
                self._spec.configuration,
                shape["num_hidden_layers"],
                shape["num_experts_per_tok"],
                places,
            )
        try:
            for beside in (False, True):
                deliveries = latency(
                    load, trainer, places if trainer else places[:1], beside=beside
                )
                self.figures.setdefault("latency", []).extend(deliveries)
                self._add_trace("latency_beside" if beside else "latency", routes)
        finally:
            if trainer is not None:
                trainer.stop()

    def _memory(self, load: Load, routes: TakenRoutes) -> None:
        """Records of a full batch are held while memory is read."""
        routes.keep = True
        before = routes.rows
        throughput(load, asks=self._asks)
        time.sleep(0.5)  # the last records are sealed
        reading = engine_memory.of_engine(self._arena)
        self.figures["memory"] = {**reading, "rows_held": routes.rows - before}
        routes.keep = False
        routes.release()
        self._add_trace("memory", routes)

    # -- figures -----------------------------------------------------------------------------

    def _add(self, name: str, figures: dict[str, Any], routes: TakenRoutes) -> None:
        self.figures.setdefault(name, []).append(figures)
        self._add_trace(name, routes)

    def _add_trace(self, name: str, routes: TakenRoutes) -> None:
        if self._trace is not None:
            time.sleep(0.2)  # the scheduler is behind the answer it has sent
            summary = engine_trace.summary(self._read_trace())
            self.figures.setdefault("trace", []).append({"block": name, **summary})
        self._save(routes)

    def _read_trace(self) -> Any:
        if self._trace is None:
            return None
        events = engine_trace.rows_of(self._trace, self._trace_read)
        self._trace_read += len(events)
        return events

    def _save(self, routes: TakenRoutes) -> None:
        if self._arena:
            self.figures["counters"] = engine_memory.counters(self._arena)
        self.figures["responses"], self.figures["rows"] = routes.responses, routes.rows
        self.figures["checked"] = routes.checked
        path = Path(self._spec.result)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures))
        partial.replace(path)  # whoever is cut off here leaves the former figures


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    worker = Worker(Specification(**{**given, "blocks": tuple(given["blocks"])}))
    try:
        worker.run()
    finally:
        if worker.engine is not None:
            worker.engine.shutdown()
    if worker.figures["failed"]:
        sys.exit(f"failed: {', '.join(worker.figures['failed'])}")


if __name__ == "__main__":
    main()
