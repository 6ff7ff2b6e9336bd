# Two commands are all a newcomer types:
#   make report   set up, run the pocket profile, end with the page's path and the headline table
#   make test     set up, then every gate: export in sync, lint, types, imports, notebooks, tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Waiting threads must sleep, not spin; nothing is reported to anyone.
export OMP_WAIT_POLICY := PASSIVE
export KMP_BLOCKTIME := 0
# What make starts ends with make.
export TOOLPOST_LEASH := 1
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: report test setup serve-env export sync lint types imports notebooks pytest

report: setup
	@$(BIN)/toolpost run --profile pocket

test: setup sync lint types imports notebooks pytest

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "toolpost needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up .venv from constraints.txt: a few minutes, the first time only."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" 2>.venv/pip.log \
	  || { cat .venv/pip.log; exit 1; }
	@touch $@

# vLLM pins another torch and numpy than the rest, so it lives apart and is reached over HTTP. Needs a CUDA GPU.
serve-env: .venv-serve/.ready

.venv-serve/.ready: requirements-serve.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "vLLM's pins are for Python 3.11 or 3.12; this is $$($(PYTHON) --version). Try: make serve-env PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up .venv-serve from requirements-serve.txt: several gigabytes, the first time only."
	@$(PYTHON) -m venv .venv-serve
	@.venv-serve/bin/python -m pip install --quiet --requirement requirements-serve.txt 2>.venv-serve/pip.log \
	  || { cat .venv-serve/pip.log; exit 1; }
	@touch $@

# The library is written in nbs/ and exported to toolpost/. Run this after every edit of a notebook.
export: setup
	@$(BIN)/ruff format --quiet nbs
	@$(BIN)/ruff check --quiet --fix nbs
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export
	@$(BIN)/ruff format --quiet toolpost
	@$(BIN)/ruff check --quiet --fix --select RUF022,I001 toolpost

# Fails if exporting changes anything: then the library is not what the notebooks say.
sync: setup
	@rm -rf .venv/before && mkdir .venv/before && cp -r nbs toolpost .venv/before
	@$(MAKE) --no-print-directory export
	@diff -r -q -x __pycache__ -x .ipynb_checkpoints .venv/before/nbs nbs && diff -r -q -x __pycache__ .venv/before/toolpost toolpost \
	  || { echo "toolpost/ was not what nbs/ exports; it is now: look at the changes and commit them"; exit 1; }

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .

types: setup
	@$(BIN)/mypy
	@$(BIN)/nbqa "mypy --strict" nbs

imports: setup
	@$(BIN)/lint-imports

notebooks: setup
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2

pytest: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --durations 30
