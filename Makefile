# `make demo` and `make test` set everything up on a machine with Python >= 3.11 and make;
# a second run uses what is there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   a real merge in a few minutes: train, measure, merge, compare (needs no network after set-up)"
	@echo "make test   lint, type check and the test suite"
	@echo "make bench  the benchmarks, on a small checkpoint made on the spot (CHECKPOINT=folder for another)"

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
	$(BIN)/python benchmarks/speed.py $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

clean:
	rm -rf $(VENV) demo build dist
