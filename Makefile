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
.PHONY: help setup demo test test-mmdet3d test-onedl lint docs clean distclean

help:  ## say what each target does
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

setup:  ## make .venv: pinned packages, mmcv's operators, this project
	@$(PYTHON) -m environments.prepare

demo: setup  ## train and test a small detector with the EMA of its weights
	@$(ENV)/python demo/run.py

test: setup  ## run the tests
	@$(ENV)/python -m pytest --ignore tests/mmdet3d $(ARGS)

test-mmdet3d:  ## add mmdet3d to .venv and run the tests that need it
	@$(PYTHON) -m environments.prepare mmdet3d
	@$(ENV)/python -m pytest tests/mmdet3d $(ARGS)

# the fork has mmengine's import name, so it goes before it on the path
ONEDL := onedl-mmengine==0.10.12
test-onedl: setup  ## run the tests of the hook on the fork onedl-mmengine
	@test -d .onedl || { rm -rf .onedl.part; $(ENV)/pip install --quiet \
		--no-deps --target .onedl.part $(ONEDL) && mv .onedl.part .onedl; }
	@PYTHONPATH=$(CURDIR)/.onedl $(ENV)/python -m pytest tests/hooks $(ARGS)

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
