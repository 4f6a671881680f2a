# Everything runs in .venv; the first target that needs it creates it, with the releases named in .ci/constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
EXAMPLE := mmtok_cli/demo/example.png
QUESTION ?= What color is the star?

.PHONY: help demo test test-families test-floor test-newest test-engines test-vllm test-lmms check lock bench bench-gpu
.PHONY: train-demo clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

# pip does not apply constraints to the packages that build a project, so those are installed like any other.
.venv/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

demo: .venv/installed ## answer, draw and compare with the model that comes with mmtok
	@mkdir -p runs
	$(BIN)/mmtok infer $(EXAMPLE) "$(QUESTION)" --budget 16 --baseline
	$(BIN)/mmtok prune $(EXAMPLE) "$(QUESTION)" --budget 16 --output runs/kept.png
	$(BIN)/mmtok compare --methods mmtok,visionzip,fastv,random,resize,none

test: .venv/installed-test ## run the test suite
	$(BIN)/pytest -n auto --maxprocesses 8 -m 'not extended'

test-families: .venv/installed-test ## run all methods on the families of which `make test` runs a part
	$(BIN)/pytest -n auto --maxprocesses 8 -m extended

test-floor: .venv/installed-test ## run the tests marked compat with the lowest transformers that pyproject.toml admits
	$(BIN)/python .ci/compat.py floor

test-newest: .venv/installed-test ## run the tests marked compat with the newest transformers on the package index
	$(BIN)/python .ci/compat.py newest

# vLLM and lmms-eval bound their dependencies tightly, so that each has an environment of its own.
.venv-vllm/installed .venv-lmms/installed: .venv-%/installed: .venv/installed pyproject.toml .ci/engines/%.txt
	$(PIP) uv
	PYTHON=$(PYTHON) .ci/engines/install $*

test-engines: test-vllm test-lmms ## run the tests with vLLM and lmms-eval, in .venv-vllm and .venv-lmms

test-vllm test-lmms: test-%: .venv-%/installed
	.venv-$*/bin/pytest --confcutdir tests/engines tests/engines/$* $(SELECT)

check: .venv/installed-test ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: ## renew .ci/constraints.txt: the newest releases that pyproject.toml admits, torch excepted
	PYTHON=$(PYTHON) .ci/lock

bench: .venv/installed-test ## time the selection against the paper's plain loop
	$(BIN)/python tests/bench_selection.py

bench-gpu: .venv/installed-test ## time the greedy on a GPU: torch, Triton kernel, CUDA graphs
	$(BIN)/python tests/bench_gpu.py

train-demo: .venv/installed ## train the demo model again (see mmtok_cli/demo/README.md)
	$(BIN)/python -m mmtok_cli.demo.train --output runs/demo-weights

clean: ## remove the virtual environment and what runs have left
	rm -rf .venv .venv-vllm .venv-lmms runs traces .pytest_cache .mypy_cache .ruff_cache .hypothesis
