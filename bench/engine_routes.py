"""What becomes of the routes that an engine's loads receive: checked, counted, released."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

CHECKED_RECORDS = 8  # of each load


class TakenRoutes:
    """What the loads hand over.

    Attributes
    ----------
    responses, rows, checked
        How many came, with how many rows, and how many of them were looked into.
    keep
        Hold the records that come, until `release`.
    """

    def __init__(self, configuration: str, experts: int, layers: int, top_k: int) -> None:
        self._arena, self._native = configuration == "arena", configuration == "native"
        self._experts, self._shape = experts, (-1, layers, top_k)
        self.responses = self.rows = self.checked = 0
        self.keep = False
        self._kept: list[str] = []

    def take(self, answers: Iterable[dict[str, Any]], start: int = 0) -> None:
        metas = [answer["meta_info"] for answer in answers]
        for meta in metas[:CHECKED_RECORDS]:
            self._check(meta, start)
        self.responses += len(metas)
        self.rows += sum(_expected_rows(meta, start) for meta in metas)
        if self._arena:
            self._kept += [meta["routed_experts"] for meta in metas]
            if not self.keep:
                self.release()

    def opened(self, answers: Iterable[dict[str, Any]]) -> float | None:
        """When each record that these speak of has been open, by `time.perf_counter`; None
        without an arena.
        """
        if not self._arena:
            return None
        from shmroute import ShmRouteReader

        for answer in answers:
            with ShmRouteReader(answer, timeout=60):
                pass
        return time.perf_counter()

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


def _expected_rows(meta: dict[str, Any], start: int) -> int:
    return int(meta["prompt_tokens"] + meta["completion_tokens"] - 1 - start)
