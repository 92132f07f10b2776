# Every target sets its environment up first; where nothing changed that takes 1-2 s.

PYTHON ?= $(firstword $(foreach name,python3.11 python3,\
            $(shell $(name) -c 'import sys; print(sys.executable)' 2>/dev/null)))
VENV := .venv/bin/python
TOOLS := .venv/environment/bin

# By two processes, each of which has whole files: see tests/conftest.py.
PYTEST := $(VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Else each of the hundreds of processes that the tests start compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo demo-r3 test test-fast lint bench-store bench-engine bench-transports bench-scaling bench-memory report clean

setup:
	@test -n "$(PYTHON)" || { echo "make: no Python found; install python3.11" >&2; exit 1; }
	@$(PYTHON) .ci/environment.py

demo: setup
	@$(VENV) bench/demo.py

demo-r3: setup
	@$(VENV) bench/r3.py

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not engine and not gate"

lint: setup
	$(TOOLS)/ruff check .
	$(TOOLS)/ruff format --check .
	$(VENV) -m mypy

bench-store: setup
	$(VENV) bench/store.py

bench-engine: setup
	$(VENV) bench/engine.py throughput itl latency memory turns --trace --json engine-report.json

bench-transports: setup
	$(VENV) bench/transports.py

bench-scaling: setup
	$(VENV) bench/scaling.py

bench-memory: setup
	$(VENV) bench/memory_overhead.py

report: setup
	$(VENV) bench/report.py

clean:
	rm -rf .venv build dist *.egg-info sglang_bridge/cpu_platform/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f demo-report.json demo-report.png r3-report.json r3-report.png
	find . -name __pycache__ -prune -exec rm -rf {} +
