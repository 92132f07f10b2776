"""A result file says what its figures were taken on, versions of what was measured included."""

from __future__ import annotations

import importlib.metadata
import json
import platform

import report_results
import result_file
from result_file import Row


def test_the_versions_of_named_packages_are_stated(tmp_path):
    path = tmp_path / "result.json"
    packages = ("msgpack", "a-package-that-nobody-has")
    result_file.write(path, "some", "python bench/some.py", [Row("time", 1.0, "s")], packages)
    machine = json.loads(path.read_text())["machine"]
    assert machine["python"] == platform.python_version()
    assert machine["msgpack"] == importlib.metadata.version("msgpack")
    assert machine["a-package-that-nobody-has"] is None


def test_the_page_shows_every_version_that_a_result_states(tmp_path):
    path = tmp_path / "some.json"
    result_file.write(path, "some", "python bench/some.py", [Row("time", 1.0, "s")], ["msgpack"])
    (result,) = report_results.Results(tmp_path).all
    assert f"msgpack {importlib.metadata.version('msgpack')}" in result.ran_on
    assert f"numpy {importlib.metadata.version('numpy')}" in result.ran_on
