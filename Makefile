# Every target does its own set-up. `make demo` and `make test` are the two to know.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo up test faults soak lint audit schemathesis bench fuzz openapi migration compose-check clean

help:
	@echo "make demo           run the main job on the sample pictures (about 5 minutes after installing)"
	@echo "make up             start everything on this machine until Ctrl-C"
	@echo "make test           run every test against embedded servers"
	@echo "make faults         1,000 seeded schedules of faults, going on where the last run stopped (goal=200 for fewer)"
	@echo "make soak           half an hour of load with a fault now and then: what grows? (make soak minutes=300)"
	@echo "make lint           ruff, mypy, import-linter"
	@echo "make audit          bandit over the sources, known weaknesses of the dependencies (asks the package index)"
	@echo "make schemathesis   schemathesis over the whole API, 10 minutes (make schemathesis minutes=60 examples=500)"
	@echo "make bench          benchmarks: a table each, one JSON line last"
	@echo "make fuzz           fuzz the intake of archives and pictures, 10 minutes (make fuzz minutes=60)"
	@echo "make openapi        write docs/openapi/*.json"
	@echo "make migration m=…  a new Alembic revision from the models"
	@echo "make compose-check  build the images and run docker-compose.yml under podman (root)"
	@echo "make clean          remove .venv and caches"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Captune needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
		{ echo "Python's venv module is missing (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "installing into .venv (about 6 GB, mostly torch) …"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: install
	@$(BIN)/captune demo

up: install
	@$(BIN)/captune up

# Two files at a time: each of the two processes starts servers of its own, and a stack, of about 4 GB.
test: install
	@$(BIN)/python -m pytest -n 2 --dist loadfile

faults: goal := 1000
faults: install
	@$(BIN)/python -m tests.faults --goal $(goal) --worlds 2 --results build/faults.jsonl

soak: minutes := 30
soak: install
	@$(BIN)/python -m tests.faults.soak --minutes $(minutes)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# --strict: what could not be looked up fails it, too.
audit: install
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive captune shared services
	$(BIN)/pip-audit --strict --skip-editable

schemathesis: minutes := 10
schemathesis: examples := 100
schemathesis: install
	@$(BIN)/python -m tests.attacks.schemathesis_api --minutes $(minutes) --examples $(examples)

bench: install
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

fuzz: minutes := 10
fuzz: install
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	@for target in archives pictures; do \
		$(BIN)/python -m fuzz $$target --seconds $$(($(minutes) * 30)) || exit 1; done

openapi: install
	@$(BIN)/python docs/openapi/generate.py

migration: install
	@$(BIN)/python migrations/new.py "$(m)"

compose-check: install
	@$(BIN)/python docker/compose_check.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
