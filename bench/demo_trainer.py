"""The demo's second process: a trainer that is told an arena's name and rids, nothing else.

    python bench/demo_trainer.py ARENA

It shares no memory, no parent's objects and no torch with the engine. One JSON object a
line comes in on stdin, one goes out on stdout for each::

    {"read": rid}                       open the record by rid, check it, keep a copy of its
                                        rows, release it
    {"native": rid, "bytes": n}         n bytes follow: the same request's rows as SGLang's
                                        native path delivered them (a pickled int32 array);
                                        compare them, row by row, with those kept
    {"experts": true}                   how many (layer, expert) pairs the kept rows use

Every answer carries ``at``, the CLOCK_MONOTONIC time (one clock for all processes) at which
the rows were in this process as an array. A record that cannot be read is an answer with
``error``; the process goes on. It ends when stdin does.

What a trainer does with the rows of a request goes where ``Trainer.read`` has them mapped,
between the checks and the release.
"""

from __future__ import annotations

import json
import pickle
import signal
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

import shmroute
from shmroute import RouteLayout, ShmRouteReader

READ_TIMEOUT = 10.0


class Trainer:
    """Rows by rid, read from one arena."""

    def __init__(self, arena: str) -> None:
        self._arena = arena
        self._rows: dict[str, npt.NDArray[Any]] = {}
        self._layout: RouteLayout | None = None

    def read(self, rid: str) -> dict[str, Any]:
        """Map one record by its rid, check it, keep a copy, release it."""
        began = time.monotonic()
        with ShmRouteReader(rid, arena=self._arena, timeout=READ_TIMEOUT) as routes:
            rows = routes.numpy()
            at = time.monotonic()
            faults = faults_of(rows, routes.layout)
            # For the comparison with the native path; a trainer uses the mapped rows.
            self._rows[rid], self._layout = rows.copy(), routes.layout
            routes.release()
            return {
                "at": at,
                "seconds": at - began,
                "rows": routes.tokens,
                "start": routes.start,
                "prompt_tokens": routes.prompt_tokens,
                "complete": routes.complete,
                "faults": faults,
            }

    def compare(self, rid: str, payload: bytes) -> dict[str, Any]:
        """Unpickle the native rows of a request and count how many equal the kept ones."""
        began = time.monotonic()
        native = pickle.loads(payload)
        at = time.monotonic()
        return {
            "at": at,
            "seconds": at - began,
            "rows": len(native),
            "equal": equal_rows(self._rows[rid], self._layout, native),
        }

    def experts(self) -> dict[str, Any]:
        """How many of the (layer, expert) pairs the kept rows use."""
        assert self._layout is not None, "no record was read"
        layers = range(len(self._layout.layer_ids))
        kept = np.concatenate(list(self._rows.values()))
        return {
            "used": sum(len(np.unique(kept[:, layer])) for layer in layers),
            "pairs": len(layers) * self._layout.num_experts,
        }


def faults_of(rows: npt.NDArray[Any], layout: RouteLayout) -> int:
    """Number of rows with an id that is no expert, or with one expert twice in a layer."""
    ordered = np.sort(rows, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    return int((twice | (ordered[..., -1] >= layout.num_experts)).any(axis=-1).sum())


def equal_rows(
    rows: npt.NDArray[Any], layout: RouteLayout | None, native: npt.NDArray[np.int32]
) -> int:
    """Rows that equal the native ones in every layer and every one of the k places."""
    assert layout is not None, "no record was read"
    if native.shape[0] != rows.shape[0] or native.shape[1] != layout.num_layers:
        return 0
    reference = native[:, list(layout.layer_ids)]
    return int((rows.astype(np.int32) == reference).all(axis=(1, 2)).sum())


def answer(trainer: Trainer, message: Mapping[str, Any], stream: IO[bytes]) -> dict[str, Any]:
    if "native" in message:
        return trainer.compare(message["native"], stream.read(message["bytes"]))
    if "experts" in message:
        return trainer.experts()
    try:
        return trainer.read(message["read"])
    except shmroute.ShmRouteError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    # Ctrl-C in a terminal reaches this process, too; its parent ends it by closing stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = Trainer(sys.argv[1])
    for line in iter(sys.stdin.buffer.readline, b""):
        print(json.dumps(answer(trainer, json.loads(line), sys.stdin.buffer)), flush=True)


if __name__ == "__main__":
    main()
