"""The kernels' cases, under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from beside import Beside
from children import Child

CASES = Path(__file__).with_name("kernel_cases.py")


def start_cases(folder: Path) -> Child:
    """In a child, because Triton decides at its import whether it interprets."""
    options = ("-q", "-p", "no:cacheprovider", "--noconftest")
    return Child(folder, "-m", "pytest", *options, str(CASES), TRITON_INTERPRET="1")


BESIDE = {"interpreted": start_cases}


@pytest.fixture
def interpreted(beside: Beside) -> str:
    """What pytest said of the cases, which all passed."""
    pytest.importorskip("triton", reason="this torch came without Triton")
    return beside.done(start_cases).output()


def test_the_kernels_do_what_torch_does_in_every_case(interpreted: str) -> None:
    assert " passed" in interpreted
