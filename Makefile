# Any Python >= 3.11 will do: make test PYTHON=python3.12
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PYTEST = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help venv demo docs check check-only test test-only slow lint format build clean

help:
	@echo "make venv    create .venv and install o2o for development (once)"
	@echo "make demo    pre-train on recorded data, fine-tune in MuJoCo, show the difference"
	@echo "make docs    the documentation, in build/docs/index.html"
	@echo "make check   lint, types, import contracts and the quick tests (tests/unit)"
	@echo "make test    make check and all other tests"
	@echo "make slow    what takes long: damaged files, kills, clusters (tests/slow)"
	@echo "make lint    ruff, pyright and import contracts only"
	@echo "make format  let ruff mend imports and layout"
	@echo "make build   wheel and sdist in dist/"
	@echo "make clean   remove .venv, builds and caches (runs/ stays)"

venv: .venv/stamp

.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "o2o needs Python >= 3.11; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv --clear .venv >/dev/null 2>&1 || \
		$(PYTHON) -m venv --clear --without-pip .venv
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then pip="$(BIN)/python -m pip"; \
		else pip="$(PYTHON) -m pip --python $(BIN)/python"; fi; \
		echo "Installing o2o and its dependencies into .venv (about 1 GB, once) ..."; \
		$$pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv
	$(BIN)/o2o demo

# Warnings are errors; so are links within the documentation that lead nowhere. Needs no network once it is installed.
docs: venv
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "built build/docs/index.html"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache

# One thread a worker: two workers fill two cores. Lint, on one core for most of its time, runs beside them.
check test: venv
	@$(MAKE) --no-print-directory -j2 lint $@-only

check-only:
	$(PYTEST) tests/unit

test-only:
	$(PYTEST)

slow: venv
	$(PYTEST) tests/slow

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: venv
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv build dist docs/generated *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
