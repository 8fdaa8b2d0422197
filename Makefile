# Everything a checkout offers. `make help` lists it; each target does its own set-up.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo lab test bench lint clean

help: ## this list
	@echo "Workbench: each notebook kernel in its own container"
	@echo
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  make test ARGS='tests/cli -k run'   a part of the tests, with pytest's options"
	@echo "  make PYTHON=/usr/bin/python3.12 ... another Python than python3"

setup: ## the Debian tools and .venv with the package; says what it installs before it does
	@$(PYTHON) scripts/bootstrap.py run

demo: setup ## build the image `python`, run the quickstart notebook in a container, prove what it sees
	@$(BIN)/python scripts/demo.py $(ARGS)

lab: setup ## JupyterLab with a launcher card for each image
	@$(BIN)/jupyter workbench build --refresh recipes/python
	@$(BIN)/jupyter lab --notebook-dir=notebooks $$(test "$$(id -u)" != 0 || echo --allow-root) $(ARGS)

test: ## all tests, as root and as an unprivileged user
	@$(PYTHON) scripts/bootstrap.py test
	@$(BIN)/python scripts/run_tests.py $(ARGS)

bench: ## figures side by side with what one would use instead
	@$(PYTHON) scripts/bootstrap.py bench
	@$(BIN)/python -m benchmarks $(ARGS)

lint: ## style, types and the import contract
	@$(PYTHON) scripts/bootstrap.py test
	@$(BIN)/python -m pytest -q tests/test_house.py $(ARGS)

clean: ## remove what the set-up made in this checkout; images and containers stay
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
