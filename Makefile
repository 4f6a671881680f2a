# Everything runs in .venv; the first target that needs it creates it.
PYTHON ?= python3
BIN := .venv/bin
EXAMPLE := mmtok_cli/demo/example.png
QUESTION ?= What color is the star?

.PHONY: help demo test check bench train-demo clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

# torch goes first and at a fixed version, so that nothing else chooses a build of it.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: .venv/installed ## answer, draw and compare with the model that comes with mmtok
	@mkdir -p runs
	$(BIN)/mmtok infer $(EXAMPLE) "$(QUESTION)" --budget 16 --baseline
	$(BIN)/mmtok prune $(EXAMPLE) "$(QUESTION)" --budget 16 --output runs/kept.png
	$(BIN)/mmtok compare

test: .venv/installed-test ## run the test suite
	$(BIN)/pytest

check: .venv/installed-test ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-test ## time the selection against the paper's plain loop
	$(BIN)/python tests/bench_selection.py

train-demo: .venv/installed ## train the demo model anew (see mmtok_cli/demo/README.md)
	$(BIN)/python -m mmtok_cli.demo.train --output runs/demo-weights

clean: ## remove the virtual environment and what runs have left
	rm -rf .venv runs traces .pytest_cache .mypy_cache .ruff_cache .hypothesis
