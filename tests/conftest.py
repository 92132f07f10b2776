"""Order of the whole suite, and what is left out where there is no GPU."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What fails in seconds runs before the engines start."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)
