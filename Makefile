# Every target does its own set-up: a fresh machine needs python3 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test matrix check format bench clean

demo: $(READY)          ## train on handwritten digits, evaluate before and after
	$(BIN)/rkdo train --out runs/demo --overwrite

test: $(READY)          ## the whole test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

matrix:                 ## the whole suite as on other machines: versions, instruction sets, threads
	$(PYTHON) tests/matrix.py

check: $(READY)         ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)         ## speed and memory against the materialised loss, on this machine
	$(BIN)/python -m bench

$(READY): pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
