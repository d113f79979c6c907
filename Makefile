# SPDX-License-Identifier: Apache-2.0
# Every target installs what it needs into .venv first; a second run finds it there.
#   make PYTHON=/path/to/python3.12 demo    chooses the interpreter of a new .venv
#   make test WORKERS=4                     in so many processes, of 4 to 8 GiB each
#   make serve ARGS="--port 8001"           passes arguments on (serve, demo, test, vllm-tests)
SHELL := /bin/bash
PYTHON ?=
ARGS ?=
export PYTHON
INSTALL := bash scripts/install.sh
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo serve test fuzz vllm-tests lint format docs ci clean

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: ## Make .venv with vLLM and this package
	@$(INSTALL)

demo: ## Serve text from the small checkpoint of this repository
	@$(INSTALL)
	@$(BIN)/python -m tpu_inference.demo $(ARGS)

serve: ## Start vLLM's OpenAI-compatible server on the same checkpoint, port 8000
	@$(INSTALL)
	$(BIN)/vllm serve tpu_inference/demo/model --served-model-name demo $(ARGS)

# A file's tests share engines and servers: they stay in one process. pytest exits with 5 where no test of a tier is there to run.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
test: ## Run the tests: the quick ones, then those marked slow
	@$(INSTALL) --dev
	$(PYTEST) $(ARGS)
	$(PYTEST) -m slow $(ARGS) || [ $$? -eq 5 ]

N ?= 1000
SEED ?= 0
fuzz: ## Send a server hostile requests: make fuzz N=10000 SEED=1, or ONLY=17 for one of them
	@$(INSTALL) --dev
	PYTHONPATH=tests $(BIN)/python -m fuzz -n $(N) --seed $(SEED) $(if $(ONLY),--only $(ONLY)) $(ARGS)

vllm-tests: ## Run vLLM's own tests against this platform (docs/vllm_tests.md); hours
	@$(INSTALL) --dev
	PYTHONPATH=scripts $(BIN)/python -m vllm_tests $(ARGS)

lint: ## Check style, import ladder and types
	@$(INSTALL) --dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: ## Format the code and fix what can be fixed
	@$(INSTALL) --dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: ## Build the documentation into site/
	@$(INSTALL) --dev --docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

ci: ## What continuous integration runs
	@bash .ci/run

clean: ## Remove .venv and everything generated
	rm -rf .venv .vllm_tests site .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
