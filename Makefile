# Everything a developer or CI runs. Each target installs into .venv first if that is needed.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c pass 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
# A quiet machine's worth for each of many processes at once; a run by itself (demo) takes what there is.
test soak docs bench: export OMP_NUM_THREADS ?= 1

.PHONY: demo test soak check format bench docs clean install

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt launch/install.sh
	@bash launch/install.sh "$(PYTHON)"
	@touch $@

demo: $(STAMP)
	$(BIN)/vitgraft demo --out runs/demo

# First what runs in one process, on all cores; then what starts ranks, which wait for each other half of the time: two at once.
test: $(STAMP)
	$(BIN)/pytest -m "not soak and not ranks" -n logical --maxprocesses 8 --dist worksteal --durations 15
	$(BIN)/pytest -m "not soak and ranks" -n 2 --dist loadgroup --durations 25

soak: $(STAMP)
	$(BIN)/pytest -m soak

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

docs: $(STAMP)
	$(BIN)/pytest tests/docs

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis runs
