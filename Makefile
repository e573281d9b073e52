# Needs Python 3.11, a C++ compiler and git; `make setup` brings the rest.
# Another Python: make demo PYTHON=/path/to/python3.11

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
ENV := .venv/bin
# More arguments for pytest: make test ARGS='-k resume'
ARGS ?=

# mmcv's operators are compiled for the CPU, so no GPU is used unless asked:
# make test CUDA_VISIBLE_DEVICES=0
CUDA_VISIBLE_DEVICES ?=
export CUDA_VISIBLE_DEVICES
# What is installed outside of .venv must not be seen in it.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs clean distclean

help:  ## say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

setup:  ## make .venv: pinned packages, mmcv's operators, this project
	@$(PYTHON) -m environments.prepare

demo: setup  ## train and test a small detector with the EMA of its weights
	@$(ENV)/python demo/run.py

test: setup  ## run the tests
	@$(ENV)/python -m pytest $(ARGS)

lint: setup  ## check style and types
	@$(ENV)/ruff check .
	@$(ENV)/ruff format --check .
	@$(ENV)/mypy --strict mmdet_ema

docs: setup  ## build the guide, where docs/ has a build
	@if [ -f docs/Makefile ]; then \
		$(MAKE) --no-print-directory -C docs PYTHON=$(CURDIR)/$(ENV)/python; \
	else echo 'docs/ needs no build: read docs/*.md'; fi

clean:  ## remove work_dirs and what builds and checks leave; keep .venv
	@rm -rf work_dirs build dist *.egg-info .coverage htmlcov
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./.venv -prune -o -path ./.git -prune -o \
		-name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv and data as well; compiled wheels stay cached
	@rm -rf .venv .venv-old .venv.lock data
