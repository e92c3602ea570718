# The commands a fresh machine needs. `make help` lists them.
# EXTRAS and PYTHON of the last set-up are kept until others are given.

CONFIG ?= configs/tiny_moe.py
EXTRAS ?= $(or $(shell sed -n 1p .venv/made-for 2>/dev/null),dev)
PYTHON ?= $(or $(shell sed -n 2p .venv/made-for 2>/dev/null),python3)
ARGS ?=

# The run's name: the configuration's file name without .py, and its argument if it has one (x.py:wide -> x_wide).
RUN = $(subst :,_,$(subst .py,,$(notdir $(CONFIG))))

# A process takes a file at a time; together they fill the cores.
PARALLEL = -n logical --maxprocesses=8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-all soak lint bench notebooks setup clean FORCE

help:
	@echo 'make train   set up .venv and train $(CONFIG) in runs/$(RUN), or continue that run'
	@echo 'make test    set up .venv, lint, and run the tests: 15 minutes on two cores, less the next time'
	@echo 'make test-slow  run the tests that take minutes, and none of the others'
	@echo 'make test-all  both: 20 minutes more'
	@echo 'make soak    try it out for an hour: kills, flipped bits, two writers, mistakes; prints what was wrong'
	@echo 'make lint    check format, style and types, changing nothing'
	@echo 'make bench   measure import, compilation and a training step'
	@echo 'make notebooks  run the notebooks in place, on runs/$(RUN) if it exists'
	@echo 'make setup   install moejax and the tested versions of all it needs in .venv; the others do it when needed'
	@echo 'make clean   remove caches and build leftovers; .venv, data and runs stay'
	@echo
	@echo 'CONFIG=configs/NAME.py[:ARG]   what to train'
	@echo 'ARGS="--config.KEY=VALUE ..."  more flags for train, bench, or pytest'
	@echo 'EXTRAS=dev,cuda12              what to install: dev, and cuda12, cuda13 or tpu for an accelerator'
	@echo 'PYTHON=python3.13              the interpreter to set up with, 3.11 or newer'

# A tiny training step takes 111,000 page faults with malloc's default pages and 600 with huge ones: 10 to 15 % of
# its time. Needs glibc 2.35; older ones and other C libraries ignore it.
train bench: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

train: .venv/made-for
	@echo 'Training $(CONFIG) in runs/$(RUN)'
	@.venv/bin/moejax train --config='$(CONFIG)' --workdir='runs/$(RUN)' $(ARGS)

test: lint
	@echo 'Testing'
	@.venv/bin/python -m pytest $(PARALLEL) $(ARGS)

test-slow: .venv/made-for
	@echo 'Testing what takes minutes'
	@.venv/bin/python -m pytest -m slow $(PARALLEL) $(ARGS)

test-all:
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-slow

soak: .venv/made-for
	@echo 'Trying out, for an hour at most'
	@.venv/bin/python tests/soak/run.py $(ARGS)

lint: .venv/made-for
	@echo 'Checking format, style and types'
	@.venv/bin/ruff format --quiet --check .
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy

bench: .venv/made-for
	@for what in import compile step; do \
	  echo "Measuring: moejax bench $$what"; .venv/bin/moejax bench $$what $(ARGS) || exit; \
	done

# The first two notebooks look at that run; without it they train a tiny one of their own, as the others do.
notebooks: export MOEJAX_RUN = $(wildcard runs/$(RUN))
notebooks: .venv/made-for
	@echo 'Running the notebooks on $(or $(wildcard runs/$(RUN)),tiny runs of their own)'
	@.venv/bin/python notebooks/execute.py

setup: .venv/made-for

clean:
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@echo 'Removed caches and build leftovers; kept .venv, data and runs'

# The stamp is the last thing a set-up writes and the first it removes: an interrupted one is redone. It names what the
# set-up was made for, this folder too: a copied checkout must not run the code of the original.
ifneq "$(shell cat .venv/made-for 2>/dev/null)" "$(EXTRAS) $(PYTHON) $(CURDIR)"
.venv/made-for: FORCE
endif
.venv/made-for: setup.py constraints.txt constraints-py312.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "moejax needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$("$(PYTHON)" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing);" \
	    "name another: make $(or $(firstword $(MAKECMDGOALS)),setup) PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo 'Setting up .venv: a minute or more'
	@rm -f .venv/made-for
	@"$(PYTHON)" -m venv --clear .venv
	@constraints=$$(.venv/bin/python -c \
	    'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-py312.txt")') && \
	  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
	    --editable '.[$(EXTRAS)]' --constraint "$$constraints"
	@printf '%s\n' '$(EXTRAS)' '$(PYTHON)' '$(CURDIR)' >.venv/made-for
