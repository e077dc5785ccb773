# `make demo` and `make test` set everything up on a machine with Python >= 3.11 and make;
# a second run uses what is there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint bench growth clean

help:
	@echo "make demo   a real merge in a few minutes: train, measure, merge, compare (needs no network after set-up)"
	@echo "make test   lint, type check and the test suite"
	@echo "make bench  every ratio beside its target, on models made on the spot: about 40 minutes on 2 cores (BENCH='--only start' for less)"
	@echo "make growth how time and memory grow: about 15 minutes on 2 cores"

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/mergekit-fisher demo

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

bench: $(BIN)/.installed
	$(BIN)/python benchmarks/speed.py $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(BENCH)

growth: $(BIN)/.installed
	$(BIN)/python benchmarks/growth.py --picture docs/growth.png $(GROWTH)

clean:
	rm -rf $(VENV) demo build dist
