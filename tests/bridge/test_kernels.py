"""The kernels' cases, and those of captures that they read, under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from children import ON_CPU, Child
from processes import Processes

HERE = Path(__file__).parent


def start(folder: Path, *arguments: str, **environment: str) -> Child:
    """In a child, because Triton decides at its import whether it interprets."""
    options = ("-q", "-p", "no:cacheprovider", "--noconftest")
    environment["TRITON_INTERPRET"] = "1"
    return Child(folder, "-m", "pytest", *options, *arguments, **environment)


def start_kernels(folder: Path) -> Child:
    return start(folder, str(HERE / "kernel_cases.py"))


def start_captures(folder: Path) -> Child:
    # SGLang warns of much that a CPU lacks while it is imported. The same examples each time: by
    # hand, any seed finds others.
    options = ("-W", "ignore", "--hypothesis-seed=0")
    return start(folder, *options, str(HERE / "capture_cases.py"), **ON_CPU)


@pytest.fixture
def kernels_interpreted(processes: Processes) -> str:
    """What pytest said of the cases, which all passed."""
    pytest.importorskip("triton", reason="this torch came without Triton")
    return processes.done(start_kernels).output()


@pytest.fixture
def captures_interpreted(sglang: SimpleNamespace, processes: Processes) -> str:
    """The same."""
    pytest.importorskip("triton", reason="this torch came without Triton")
    return processes.done(start_captures).output()


def test_the_kernels_do_what_torch_does_in_every_case(kernels_interpreted: str) -> None:
    assert " passed" in kernels_interpreted


def test_no_row_is_wrong_whatever_forwards_do(captures_interpreted: str) -> None:
    assert " passed" in captures_interpreted
