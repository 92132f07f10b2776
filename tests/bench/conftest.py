"""Benchmarks run as a user runs them, shortly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import result_file
from benches import ShortRun


@pytest.fixture(scope="session")
def valid_rows() -> Callable[[ShortRun], list[dict[str, Any]]]:
    """The rows of a run, whose result is valid."""

    def of(run: ShortRun) -> list[dict[str, Any]]:
        result = run.result()
        result_file.validate(result)
        rows: list[dict[str, Any]] = result["rows"]
        return rows

    return of
