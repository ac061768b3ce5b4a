# `make run` and `make test` do all the set-up by themselves: they need make and a Python >= 3.11.
# Another Python:       make test PYTHON=python3.12
# Part of the tests:    make test PYTEST_ARGS="tests/e2e -k responder -x"
# Another SQLAlchemy:   make test SQLALCHEMY="SQLAlchemy<2.1" VENV=.venv-2.0

VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
SQLALCHEMY ?= SQLAlchemy
CANDIDATES := python3.13 python3.12 python3.11 python3.14 python3 python
bin := $(VENV)/bin

# A name on PATH may be a shim that starts nothing, so each candidate is run. A user's own
# PYTHON is the only candidate then.
probe := import sys; sys.exit(sys.version_info < (3, 11))
ifdef PYTHON
find_python = $(PYTHON) -c '$(probe)' 2>/dev/null && found=$(PYTHON)
else
find_python = for p in $(CANDIDATES); do \
	if $$p -c '$(probe)' >/dev/null 2>&1; then found=$$p; break; fi; done
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run run-flask run-fastapi test test-all coverage format check mariadb get-servers \
	compatibility docs bench bench-check soak package clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | sort | expand -t 14

run: $(VENV)/.run ## serve the Responder counter on 127.0.0.1:5042 (PORT, DATABASE_URL)
	@exec $(bin)/python examples/responder_app.py

run-flask: $(VENV)/.test ## serve the Flask counter on 127.0.0.1:5042 (PORT, DATABASE_URL)
	@exec $(bin)/python examples/flask_app.py

run-fastapi: $(VENV)/.test ## serve the FastAPI AsyncSession counter on 127.0.0.1:5042 (PORT, DATABASE_URL)
	@exec $(bin)/python examples/fastapi_async_app.py

# Seconds. Far more than the slowest test takes on a busy machine: one that hangs is stopped.
timeout = --timeout=300
test: $(VENV)/.test ## run all tests (PYTEST_ARGS)
	$(bin)/python -m pytest $(timeout) $(PYTEST_ARGS)

NOX_ARGS ?=
# nox in an environment of its own, which makes one more for each combination.
test-all: ## run all tests on each Python found and each SQLAlchemy (PYTEST_ARGS, NOX_ARGS="-p 3.12")
	@$(MAKE) --no-print-directory VENV=.venv-nox .venv-nox/.nox
	.venv-nox/bin/nox --noxfile .ci/noxfile.py $(NOX_ARGS) -- $(PYTEST_ARGS)

coverage: $(VENV)/.test ## run all tests and report branch coverage (PYTEST_ARGS)
	$(bin)/python -m pytest $(timeout) --cov --cov-report=term-missing $(PYTEST_ARGS)

format: $(VENV)/.check ## format the code and mend what the linter can mend
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

# mypy and pyright read the package and the tests of its types.
typed := rope_middleware $(wildcard tests/typing)
check: $(VENV)/.check ## formatter, linter, strict mypy and strict pyright, completeness of the types
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy $(typed)
	$(bin)/pyright --pythonpath $(bin)/python $(typed)
	@# It looks for the package where the first python on PATH would.
	PATH="$(abspath $(bin)):$$PATH" pyright --verifytypes rope_middleware --ignoreexternal

# The tests start a MariaDB of their own where its server is installed; this one is for all runs.
mariadb: $(VENV)/.test ## run a MariaDB on a loopback port until Ctrl-C, for DATABASE_URL_MARIADB
	@exec $(bin)/python -m tests.matrix.mariadb

get-servers: ## install what is no Python package, for the tests: MariaDB, PgBouncer (Debian, Ubuntu)
	@PATH="$$PATH:/usr/sbin"; { command -v mariadbd && command -v pgbouncer; } || { \
		as_root=; [ "$$(id -u)" -eq 0 ] || as_root=sudo; \
		$$as_root apt-get update -qq && \
		$$as_root env DEBIAN_FRONTEND=noninteractive \
			apt-get install -qq --yes --no-install-recommends mariadb-server-core pgbouncer; }

compatibility: $(VENV)/.test ## run every framework, server and database, write docs/compatibility.md
	$(bin)/python -m pytest $(timeout) tests/matrix --compatibility docs/compatibility.md $(PYTEST_ARGS)

docs: $(VENV)/.docs ## build the documentation into docs/_build/html
	$(bin)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.bench ## compare with other ways to have a session per request
	$(bin)/python -m benchmarks

REQUESTS ?= 1000000
soak: $(VENV)/.test ## send a million requests with random faults, look for leaks (REQUESTS, SEED)
	$(bin)/python -m benchmarks.soak --requests $(REQUESTS) $(if $(SEED),--seed $(SEED))

bench-check: $(VENV)/.bench ## check the promises on cost (BENCH_ARGS=--short: with wide margins)
	$(bin)/python -m benchmarks.check $(BENCH_ARGS)

package: $(VENV)/.test $(VENV)/.package ## build wheel and sdist into dist, check them, try them elsewhere
	rm -rf dist
	$(bin)/python -m build --sdist --wheel --outdir dist .
	$(bin)/python -m twine check --strict dist/*
	$(bin)/check-wheel-contents dist/*.whl
	DIST=dist $(bin)/python -m pytest $(timeout) tests/test_package.py

clean: ## remove everything that make has made, but no database
	rm -rf $(VENV) .venv-nox .mypy_cache .pytest_cache .ruff_cache .coverage dist docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of dependencies: made once, and again when pyproject.toml changes.
$(VENV)/.python:
	@found=; $(find_python); \
	if [ -z "$$found" ]; then \
		echo "rope_middleware needs Python 3.11 or newer, and none was found" \
			"(tried: $(or $(PYTHON),$(CANDIDATES)))." >&2; \
		for p in $(or $(PYTHON),$(CANDIDATES)); do \
			v=$$($$p --version 2>/dev/null) && echo "  $$p is $$v, too old." >&2; done; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "$$found: $$($$found --version)"; \
	$$found -m venv $(VENV) || { \
		echo "$$found cannot make a virtual environment" \
			"(on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	@touch $@

$(VENV)/.nox: $(VENV)/.python
	$(bin)/python -m pip install --quiet --disable-pip-version-check nox
	@touch $@

extra = $(patsubst .%,%,$(@F))

$(VENV)/.run: extra = responder
$(VENV)/.run $(VENV)/.test $(VENV)/.check $(VENV)/.package $(VENV)/.docs $(VENV)/.bench: \
		$(VENV)/.python pyproject.toml
	$(bin)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(extra)]" \
		"$(SQLALCHEMY)"
	@touch $@
