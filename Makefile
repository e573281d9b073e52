# Needs make, git, Python 3.11 and a C++ compiler; `make setup` brings the rest.
# Another Python for a stack: make demo PYTHON=/path/to/python3.11

STACK ?= newest
# More arguments for pytest: make test ARGS='-k resume'
ARGS ?=

# a stack of environments/stacks.txt is made in .venv-NAME
VENV := .venv-$(STACK)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
VERSION := $(shell awk '$$1 == "$(STACK)" {print $$2}' environments/stacks.txt)
PYTHON ?= $(shell for p in python$(VERSION) \
	$(HOME)/.pyenv/versions/$(VERSION).*/bin/python; do \
	$$p -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
LIST := environments/$(STACK)

# mmcv's operators are compiled for the CPU, so no GPU is used unless asked:
# make test CUDA_VISIBLE_DEVICES=0
CUDA_VISIBLE_DEVICES ?=
export CUDA_VISIBLE_DEVICES
# What is installed outside of an environment must not be seen in it.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-mmcv1 demo-trees study test test-stack test-gpu
.PHONY: test-deepspeed bench lint docs clean distclean

help:  ## say what each target does
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

setup: $(VENV)/.project  ## make .venv-newest, or that of STACK=name

$(VENV)/.packages: $(LIST).txt
	@test -n '$(VERSION)' || { echo 'setup: no stack $(STACK); there are:' \
		$$(awk '/^[a-z]/ {print $$1}' environments/stacks.txt); exit 1; }
	@test -n '$(PYTHON)' || { echo 'setup: no Python $(VERSION) was found:' \
		'install it, or name one with PYTHON=/path/to/python'; exit 1; }
	@echo 'setup: $(VENV), the packages of $< (minutes the first time)'
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@$(PIP) install -r $<
	@touch $@

# OpenMMLab's packages declare what they do not need: hence --no-deps.
$(VENV)/.openmmlab: $(LIST)-openmmlab.txt $(VENV)/.packages
	@compiled=$$(grep -E '^(onedl-)?mmcv(-full)?==' $<) || exit 0; \
		wheel=$$(environments/compile_mmcv.sh $(BIN)/python $$compiled) \
		&& $(PIP) install --no-deps --force-reinstall $$wheel
	@$(PIP) install --no-deps --no-build-isolation -r $<
	@touch $@

$(VENV)/.project: setup.py setup.cfg pyproject.toml $(VENV)/.openmmlab
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: setup  ## train and test a small detector with the EMA of its weights
	@$(BIN)/python demo/run.py

demo-mmcv1:  ## the same with mmdet 2
	@$(MAKE) --no-print-directory demo STACK=mmcv1

demo-trees: setup  ## pictures of trees found by raw and averaged weights
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m study.pictures

study: setup  ## which decay: runs, tables and picture of docs/en/study.md (half an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m study $(ARGS)

test: setup  ## run the tests; what a stack does not have is left out
	@$(BIN)/python -m pytest $(ARGS)

test-stack:  ## the same on another stack: STACK=name of environments/stacks.txt
	@$(MAKE) --no-print-directory test STACK=$(STACK)

test-gpu: setup  ## run the tests that need a GPU
	@CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest -m gpu $(ARGS)

# In a folder of its own: mmengine imports it wherever it finds it.
DEEPSPEED := tests/.deepspeed
test-deepspeed: setup $(DEEPSPEED)  ## run the tests that need DeepSpeed
	@PYTHONPATH=$(CURDIR)/$(DEEPSPEED) $(BIN)/python -m pytest \
		tests/for_mmengine/test_deepspeed.py tests/e2e/test_deepspeed.py $(ARGS)

$(DEEPSPEED): environments/deepspeed.txt | setup
	@rm -rf $(DEEPSPEED) $(DEEPSPEED).part
	@$(PIP) install --no-deps --no-build-isolation --target $(DEEPSPEED).part \
		-r $< && mv $(DEEPSPEED).part $(DEEPSPEED) && touch $(DEEPSPEED)

# peers that only the benchmark needs, in a folder that only it looks into;
# less of it: make bench ARGS='--only update,swap --threads 1'
PEERS := benchmarks/.peers
bench: setup $(PEERS)  ## measure the average beside its peers (10 minutes)
	@$(BIN)/python -m benchmarks $(ARGS)

$(PEERS): benchmarks/peers.txt | setup
	@rm -rf $(PEERS) $(PEERS).part
	@$(PIP) install --no-deps --target $(PEERS).part -r $< \
		&& mv $(PEERS).part $(PEERS) && touch $(PEERS) \
		|| echo 'bench: no peers: the tables will say "not installed"'

lint: setup  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict mmdet_ema

# a small environment of its own: the API pages need no torch
DOCS := .venv-docs
docs: $(DOCS)/.packages  ## build the site in docs/_build, English and Chinese
	@for language in en zh_cn; do \
		$(DOCS)/bin/sphinx-build -W --keep-going -q -b html \
		docs/$$language docs/_build/$$language || exit 1; done
	@echo 'docs: docs/_build/en/index.html, docs/_build/zh_cn/index.html'

$(DOCS)/.packages: environments/docs.txt
	@rm -rf $(DOCS) && $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check -qq install -r $<
	@touch $@

clean:  ## remove work_dirs and what builds and checks leave; keep .venv-*
	@rm -rf work_dirs build dist docs/_build *.egg-info .coverage htmlcov
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path './.venv*' -prune -o -path ./.git -prune -o \
		-name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv-* and data as well; compiled wheels stay cached
	@rm -rf .venv-* data $(PEERS) $(DEEPSPEED)
