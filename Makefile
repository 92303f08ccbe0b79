.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

.venv/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,etl,cluster,fast,dev]'
	touch $@

setup: .venv/.done  ## make .venv (torch first, then the rest as pinned in constraints.txt)

format: setup  ## format and fix what can be fixed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

check: setup  ## lint and types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

test: setup  ## the tests (below 15 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup  ## the tests and the slow evidence
	$(BIN)/python -m pytest -m "not gpu" --hypothesis-profile=explore

demo: setup  ## data, pretraining, fine-tuning and a report, in one go (runs/demo/report.md)
	launchers/demo.sh

bench: setup  ## benchmarks; results in benchmarks/results
	$(BIN)/python benchmarks/fusion_encoder.py --out benchmarks/results/fusion_encoder-cpu.json
	$(BIN)/python benchmarks/pretrain_step.py --out benchmarks/results/pretrain_step-cpu.json
	$(BIN)/python benchmarks/engine.py --out benchmarks/results/engine-cpu.json
	$(BIN)/python benchmarks/loader.py --out benchmarks/results/loader-cpu.json
	$(BIN)/python benchmarks/etl.py --out benchmarks/results/etl-cpu.json
	$(BIN)/python benchmarks/finetune_cache.py --out benchmarks/results/finetune_cache-cpu.json

clean:  ## remove what demo and tests made (not .venv)
	rm -rf runs raw lake .pytest_cache .ruff_cache

.PHONY: help setup format check test test-all demo bench clean
