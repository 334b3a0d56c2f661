# make demo: set up, and train a private model on real data. make test: set up, and pass every check and test.
# make check: style, layers and the fast tests, in two minutes. make test-all: also the slow tests and the seeded faults.
# make docs: the documentation site, in site/. make bench: speed, beside a bare PyTorch loop and beside other frameworks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
DEMO := sim_configs/quickstart.toml
# Three for two cores: tests of real processes wait most of their time.
UNIT := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadgroup -m "not slow"
FAST := tests/core tests/aggregation tests/mechanisms tests/methods tests/secure tests/tasks tests/data

# Bytecode is kept: without it, every process that a test starts would compile PyTorch anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check test-all lint style unit docs bench mutants setup browser clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/fedpriv run $(DEMO) --out runs/quickstart-$(firstword $(shell cksum < $(DEMO))) --resume

# Types are checked beside the tests, on the core that a checker of types alone would leave idle. In a new checkout, one
# process first compiles the tests and their imports, which all three of them would do otherwise.
test: style
	@said=$$(mktemp); $(BIN)/pyright >$$said 2>&1 & types=$$!; trap 'kill $$types' INT TERM; \
	[ -d tests/__pycache__ ] || $(BIN)/pytest --collect-only -q >/dev/null 2>&1; \
	$(UNIT); tests=$$?; \
	wait $$types; types=$$?; cat $$said; rm $$said; exit $$((tests || types))

check: style
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not slow" $(FAST)

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadgroup
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py --jobs 2 --tested

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

lint: style
	$(BIN)/pyright

unit: setup
	$(UNIT)

# Warnings are errors; tests/docs does the same and looks at the result.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup
	$(BIN)/python results/benchmarks/make.py

mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py --jobs 2

setup:
	@$(MAKE) --no-print-directory -j2 $(STAMP) browser

browser:
	@tests/browser.sh

# Most installed modules are never imported, so none is compiled before its first import.
# torch goes first and alone: a later step then finds it there and does not fetch another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs site
