# One command surface, the same here and in CI. Needs python3.11 or newer with venv and pip, and make.
PYTHON ?= python3
BIN := .venv/bin
QUIET_LIBRARIES := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false FLWR_TELEMETRY_ENABLED=0

.PHONY: help demo check test test-slow test-federation fuzz docs bench bench-tables clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       train sixteen tiny models, fuse them into one MoE, write a report: a few minutes of CPU"
	@echo "make check      lint, format, types"
	@echo "make test       every fast test"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-federation  Flower processes on this machine: a few minutes"
	@echo "make fuzz       look for uploads and messages that the intake does not withstand: SECONDS=900 of the processor each"
	@echo "make docs       the documentation site, into site/"
	@echo "make bench      the benchmarks, into benchmarks/"
	@echo "make bench-tables  the paper's tables, small, into runs/tables-*: some fifty minutes on two cores"
	@echo "make clean      remove what the above made, runs/ excepted"

# What running needs. torch goes first: the rest then finds it in place instead of resolving it along.
.venv/runtime.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

# What working on it needs besides.
.venv/dev.stamp: .venv/runtime.stamp
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/runtime.stamp
	$(QUIET_LIBRARIES) $(BIN)/deepfusion demo

check: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Two workers: each test is single-threaded, and CI machines have two cores.
test: .venv/dev.stamp
	$(QUIET_LIBRARIES) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: .venv/dev.stamp
	$(QUIET_LIBRARIES) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

test-federation: .venv/dev.stamp
	$(QUIET_LIBRARIES) OMP_NUM_THREADS=1 $(BIN)/pytest tests/federation -m federation

# Guided by coverage (atheris, Linux). What fails is runs/fuzz/TARGET/crash-…, and `tests/fuzz/run.py TARGET 0 FILE` runs it again.
SECONDS ?= 900
FUZZED ?= upload pieces manifest message
fuzz: .venv/dev.stamp
	$(BIN)/pip install -q -c constraints.txt -e '.[fuzz]'
	for target in $(FUZZED); do $(QUIET_LIBRARIES) OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py $$target $(SECONDS) || exit 1; done

docs: .venv/dev.stamp
	$(BIN)/python -m deepfusion.reference > docs/recipes.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/runtime.stamp
	$(QUIET_LIBRARIES) $(BIN)/python benchmarks/seeds.py demo --seeds 3 4 5 --report benchmarks/demo.md
	$(QUIET_LIBRARIES) $(BIN)/python benchmarks/seeds.py capacity --report benchmarks/capacity.md
	$(QUIET_LIBRARIES) $(BIN)/python benchmarks/seeds.py paper_mode --seeds 3 4 5 --report benchmarks/paper_mode.md

bench-tables: .venv/runtime.stamp
	$(QUIET_LIBRARIES) $(BIN)/deepfusion compare tables_medical --jobs 3 --workers 1 --out runs/tables-medical
	$(QUIET_LIBRARIES) $(BIN)/deepfusion compare tables_finance --jobs 3 --workers 1 --out runs/tables-finance

clean:
	rm -rf .venv site build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
