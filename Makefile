PYTHON ?= python3

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
SOURCES := agentsd notebooks scripts tests
# Test files side by side, each with one thread.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

DEMO_OUTPUT ?= outputs
DEMO_PROMPT ?= a large red circle on the left, a small blue star on the right, on a striped green background

.PHONY: help setup demo test check lint format test-oldest docs clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make setup        create $(VENV)/ with the package (editable) and the development tools"
	@echo "make demo         install the package and draw one prompt, stock beside accelerated"
	@echo "make test         lint and run every test"
	@echo "make check        lint and run the fast tests"
	@echo "make lint         ruff, mypy and the contracts of imports"
	@echo "make format       let ruff rewrite what it can"
	@echo "make test-oldest  run every test on the lowest versions that setup.cfg declares ($(OLDEST)/)"
	@echo "make docs         build the documentation into site/"
	@echo "make clean        remove caches and build output; make distclean removes the environments too"
	@echo "PYTHON=python3.12 chooses the interpreter of an environment that does not exist yet."

# Each stamp stands for an installation; it is repeated only when the metadata changed.
$(VENV)/.package: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

setup: $(VENV)/.dev
	@echo "Ready: '. $(BIN)/activate' enters the environment. Next: make check, make test or make demo."

demo: $(VENV)/.package
	$(BIN)/agentsd-generate --prompt "$(DEMO_PROMPT)" --compare --output $(DEMO_OUTPUT)
	@echo "Stock and accelerated side by side: the pictures named above, in $(DEMO_OUTPUT)/. Next: $(BIN)/agentsd-generate --help."

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)
	@echo "All tests passed. Next: make test-oldest, make demo."

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"
	@echo "Fast tests passed. Next: make test runs the slow ones too."

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@echo "Lint is clean. Next: make check or make test."

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	@echo "Formatted. Next: make lint."

# "name>=version" of install_requires becomes the constraint "name==version".
$(OLDEST)/.dev: setup.cfg pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed -n '/^install_requires/,/^$$/s/>=/==/p' setup.cfg > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --constraint $(OLDEST)/constraints.txt --editable ".[dev]"
	touch $@

test-oldest: $(OLDEST)/.dev
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST)
	@echo "All tests passed on the versions in $(OLDEST)/constraints.txt."

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "Built: open site/index.html."

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
	@echo "Removed caches and build output. Next: make distclean removes the environments too."

distclean: clean
	rm -rf $(VENV) $(OLDEST)
	@echo "Removed the environments. Next: make setup."
