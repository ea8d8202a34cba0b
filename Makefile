# The named commands of this project. `make setup` is a prerequisite of all that needs Python.
# Everything is done through .venv; nothing is installed outside it.

VENV   ?= .venv
PY     := $(VENV)/bin/python
EXTRAS ?= dev
SUITE  ?=
# A suite is a folder or a file of tests/acceptance.
SUITE_PATH = $(if $(SUITE),$(firstword $(wildcard tests/acceptance/$(SUITE) tests/acceptance/test_$(SUITE).py)))
STAMP  := $(VENV)/.sps2-setup-$(EXTRAS)
ROOTS  := service layout kernels engine router prefill_worker decode_worker kv_directory client cli $(wildcard bench gateway) scripts examples tests

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint fmt types imports proto proto-check chart helm acceptance audit clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(STAMP)  ## build .venv with everything (idempotent, quick when done)

$(STAMP): pyproject.toml constraints.txt scripts/setup_venv.sh
	@bash scripts/setup_venv.sh "$(VENV)" "$(EXTRAS)"
	@touch $@

demo: setup  ## serve the demo model and answer one long real prompt
	$(VENV)/bin/sps2 demo

test: setup  ## run the tests (at most 12 minutes on two cores)
	$(VENV)/bin/pytest -n 2 $(PYTEST_ARGS)

lint: setup imports  ## ruff, formatting, import contracts, buf lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/buf lint

fmt: setup  ## format the code and fix what ruff can fix
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

imports: setup  ## check that imports run downward only
	$(VENV)/bin/lint-imports

types: setup  ## mypy --strict
	$(VENV)/bin/mypy $(ROOTS)

proto: setup  ## regenerate the stubs under protos/python, and docs/api.md
	$(PY) scripts/generate_protos.py
	$(PY) scripts/generate_api_docs.py

proto-check: setup  ## fail when the committed stubs differ from the protos
	$(PY) scripts/generate_protos.py --check
	$(PY) scripts/generate_api_docs.py --check

chart: setup  ## regenerate the chart's README, its dashboard, and what its schema takes from the services
	$(PY) -m scripts.generate_chart

helm: setup  ## lint the chart, render it over a matrix of values and check all that comes out; check the images
	$(PY) -m scripts.generate_chart --check
	$(PY) scripts/check_images.py
	$(VENV)/bin/pytest -q tests/unit/helm tests/unit/images

acceptance: setup  ## run an issue's "Must show" at full size: make acceptance SUITE=name
	@test -n "$(SUITE_PATH)" || { echo "usage: make acceptance SUITE=name; there are:"; ls tests/acceptance; exit 2; }
	$(VENV)/bin/pytest -m acceptance -o timeout=3600 -o faulthandler_timeout=0 -q $(SUITE_PATH)

audit: setup  ## look the installed dependencies up in the vulnerability database
	$(VENV)/bin/pip-audit --local --skip-editable

clean:  ## remove caches and build outputs, keep .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .out
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
