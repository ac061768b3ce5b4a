# `make run` and `make test` do all the set-up by themselves: they need make and a Python >= 3.11.
# Another Python:       make test PYTHON=python3.12
# Part of the tests:    make test PYTEST_ARGS="tests/e2e -k responder -x"
# Another SQLAlchemy:   make test SQLALCHEMY="SQLAlchemy<2.1" VENV=.venv-2.0

VENV ?= .venv
# Where an environment forbids it, every process that a test starts compiles everything again.
export PYTHONDONTWRITEBYTECODE =
SQLALCHEMY ?= SQLAlchemy
PYTEST_ARGS ?=
BENCH_ARGS ?=
NOX_ARGS ?=
REQUESTS ?= 1000000
bin := $(VENV)/bin
# Seconds. Far more than the slowest test takes on a busy machine: one that hangs is stopped.
pytest = $(bin)/python -m pytest --timeout=300
# Two at a time, a file each: much of an end-to-end test is waiting.
all_tests = -n 2 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDEXPANSION:
.PHONY: FORCE help run test quick run-flask run-fastapi test-all coverage soak mariadb get-servers \
	compatibility check format docs peers bench bench-check package upgrade clean

help:
	@awk '/^#: / { print (seen++ ? "\n" : "") substr($$0, 4) } \
		/^[a-z-]+:.*## / { name = $$1; sub(":.*", "", name); sub(".*## ", ""); \
			printf "  make %-14s %s\n", name, $$0 }' $(firstword $(MAKEFILE_LIST))

#: Begin here. Both set everything up by themselves, in .venv.
run: $(VENV)/.run ## serve a counter on http://127.0.0.1:5042/ (PORT, DATABASE_URL)
	@exec $(bin)/python examples responder_app

test: $(VENV)/.test ## run all tests (PYTEST_ARGS="tests/test_wsgi.py -x" for some)
	$(if $(PYTEST_ARGS),,@echo "All tests: about 8 minutes on two cores. For a first answer: make quick")
	$(pytest) $(or $(PYTEST_ARGS),$(all_tests))

#: More examples
run-flask: $(VENV)/.run-flask ## the same counter on Flask
	@exec $(bin)/python examples flask_app

run-fastapi: $(VENV)/.run-fastapi ## the same counter on FastAPI, with an AsyncSession
	@exec $(bin)/python examples fastapi_async_app

#: While you work
quick: $(VENV)/.test ## run the quick part of the tests, in under a minute
	$(pytest) -m quick -n 2 $(PYTEST_ARGS)

check: $(VENV)/.check ## formatter, linter, strict mypy and pyright, no backup file committed
	.ci/no-backups
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy $(typed)
	$(bin)/pyright --pythonpath $(bin)/python $(typed)
	@# It looks for the package where the first python on PATH would.
	PATH="$(abspath $(bin)):$$PATH" pyright --verifytypes rope_middleware --ignoreexternal

format: $(VENV)/.check ## format the code and correct what the linter can correct
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

coverage: $(VENV)/.test ## run all tests and report branch coverage (PYTEST_ARGS)
	$(pytest) --cov --cov-report=term-missing $(or $(PYTEST_ARGS),$(all_tests))

docs: $(VENV)/.docs ## build the documentation into docs/_build/html
	$(bin)/sphinx-build -W --keep-going -b html docs docs/_build/html

#: Before a release
test-all: .venv-nox/.test-all ## run all tests on each Python found, with SQLAlchemy 2.0 and 2.1 (NOX_ARGS="-p 3.12")
	.venv-nox/bin/nox --noxfile .ci/noxfile.py $(NOX_ARGS) -- $(or $(PYTEST_ARGS),$(all_tests))

soak: $(VENV)/.test ## send a million requests with random faults, look for leaks (REQUESTS, SEED)
	$(bin)/python -m tests.soak --requests $(REQUESTS) $(if $(SEED),--seed $(SEED))
	@# A fiftieth of them over lines to PostgreSQL that are cut.
	$(bin)/python -m tests.soak.truth --requests $$(( $(REQUESTS) / 50 )) \
		$(if $(SEED),--seed $(SEED))
	@# A hundredth of them through a stack of frameworks, by clients of which a third hangs up.
	$(bin)/python -m tests.soak.stack --requests $$(( $(REQUESTS) / 100 )) \
		$(if $(SEED),--seed $(SEED))

compatibility: $(VENV)/.test ## run every framework, server and database, write docs/compatibility.md
	$(pytest) tests/matrix --compatibility docs/compatibility.md $(PYTEST_ARGS)

peers: $(VENV)/.test ## try what other ways do when the commit fails, a client leaves, 100 come
	$(bin)/python -m tests.peers

bench: $(VENV)/.bench ## compare with other ways to have a session per request
	$(bin)/python -m benchmarks

bench-check: $(VENV)/.bench ## check the promises on cost (BENCH_ARGS=--short: with wide margins)
	$(bin)/python -m benchmarks.check $(BENCH_ARGS)

package: $(VENV)/.package ## build wheel and sdist into dist, check them, try them elsewhere
	rm -rf dist
	$(bin)/python -m build --sdist --wheel --outdir dist .
	$(bin)/python -m twine check --strict dist/*
	$(bin)/check-wheel-contents dist/*.whl
	DIST=dist $(pytest) tests/test_package.py

#: Now and then
get-servers: $(VENV)/.python ## install the servers that are no Python packages (Debian, Ubuntu; asks for root)
	@.ci/get-servers $(bin)/python

mariadb: $(VENV)/.test ## run a MariaDB on a loopback port until Ctrl-C, for DATABASE_URL_MARIADB
	@exec $(bin)/python -m tests.servers.mariadb

upgrade: $(VENV)/.upgrade ## take the newest version of each package that make installs
	.ci/upgrade $(bin)

clean: ## remove everything that make has made, but no database
	rm -rf $(VENV) .venv-nox .mypy_cache .pytest_cache .ruff_cache .coverage dist docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# mypy and pyright read the package and the tests of its types.
typed := rope_middleware $(wildcard tests/typing)

# -- environments ------------------------------------------------------------------------------

# A stamp for each set of packages, named after its group in pyproject.toml. It is made again if
# the Python, the wanted SQLAlchemy, pyproject.toml or the pins have changed.
stamps := $(addprefix $(VENV)/.,run run-flask run-fastapi test check docs bench package upgrade) \
	.venv-nox/.test-all
group = $(patsubst .%,%,$(@F))
# A SQLAlchemy of one's own choice is not held to the pinned one.
drop = $(if $(filter SQLAlchemy,$(SQLALCHEMY)),^$$,^sqlalchemy==)
pip = $(@D)/bin/python -m pip --disable-pip-version-check

$(stamps): $$(@D)/.python $$(@D)/.sqlalchemy pyproject.toml .ci/constraints.txt
	@echo "Fetching the packages of the group '$(group)' into $(@D). Once, and when they change."
	@grep -v '$(drop)' .ci/constraints.txt >$(@D)/constraints.txt
	@# The pip that came with Python may be too old to know groups.
	@$(pip) install --quiet --constraint $(@D)/constraints.txt pip
	@$(pip) install --constraint $(@D)/constraints.txt --build-constraint $(@D)/constraints.txt \
		--editable . --group $(group) '$(SQLALCHEMY)'
	@touch $@

%/.python: FORCE
	@PYTHON='$(PYTHON)' .ci/venv '$(@D)'

%/.sqlalchemy: %/.python FORCE
	@echo '$(SQLALCHEMY)' | cmp -s - $@ || echo '$(SQLALCHEMY)' >$@
