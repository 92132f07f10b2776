"""Benchmarks run as a user runs them, shortly."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import result_file


@pytest.fixture(scope="module")
def short_run(
    start_bench: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Run a script with ``--quick`` and more, its arenas named so; returns its result, which is
    valid.
    """

    def run(script: str, arena: str, *more: str) -> dict[str, Any]:
        path = tmp_path_factory.mktemp("short") / "result.json"
        process = start_bench(script, arena, *more, "--quick", "--json", str(path))
        said, _ = process.communicate()
        assert process.returncode == 0, said
        written: dict[str, Any] = json.loads(path.read_text())
        result_file.validate(written)
        return written

    return run
