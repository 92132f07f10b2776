"""Stands in for flashinfer: SGLang imports names from it even where it is told not to use it.

Every name exists; calling one says that it is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"flashinfer.{name}: this machine has only a stand-in of flashinfer")

    return missing
