# Needs Python 3.11, a C++ compiler and git; `make setup` brings the rest.
# Another Python: make demo PYTHON=/path/to/python3.11

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
ENV := .venv/bin
# mmcv 1.x: Debian's own Python with Debian's torch 1.13, or PYTHON_MMCV1
ENV_MMCV1 := .venv-mmcv1/bin
# More arguments for pytest: make test ARGS='-k resume'
ARGS ?=

# mmcv's operators are compiled for the CPU, so no GPU is used unless asked:
# make test CUDA_VISIBLE_DEVICES=0
CUDA_VISIBLE_DEVICES ?=
export CUDA_VISIBLE_DEVICES
# What is installed outside of an environment must not be seen in it.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup setup-mmcv1 demo demo-mmcv1 test test-mmdet3d test-mmcv1
.PHONY: test-onedl bench lint docs clean distclean

help:  ## say what each target does
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

setup:  ## make .venv: pinned packages, mmcv's operators, this project
	@$(PYTHON) -m environments.prepare

setup-mmcv1:  ## make .venv-mmcv1: the same for mmcv 1.x and mmdet 2
	@$(PYTHON) -m environments.prepare mmcv1

demo: setup  ## train and test a small detector with the EMA of its weights
	@$(ENV)/python demo/run.py

demo-mmcv1: setup-mmcv1  ## the same with mmdet 2
	@$(ENV_MMCV1)/python demo/run.py

# Folders of tests called mmcv1... or mmengine... are for that generation.
test: setup  ## run the tests
	@$(ENV)/python -m pytest --ignore tests/mmdet3d \
		--ignore-glob '*/mmcv1*' $(ARGS)

test-mmdet3d:  ## add mmdet3d to .venv and run the tests that need it
	@$(PYTHON) -m environments.prepare mmdet3d
	@$(ENV)/python -m pytest tests/mmdet3d $(ARGS)

MMCV1_TESTS := $(addprefix tests/, core checkpoint optim mmcv1 mmcv1_tools)
test-mmcv1: setup-mmcv1  ## run the tests of mmcv 1.x and of the core
	@$(ENV_MMCV1)/python -m pytest $(MMCV1_TESTS) \
		--ignore-glob '*/mmengine*' $(ARGS)

# the fork has mmengine's import name, so it goes before it on the path
ONEDL := onedl-mmengine==0.10.12
test-onedl: setup  ## run the tests of the hook on the fork onedl-mmengine
	@test -d .onedl || { rm -rf .onedl.part; $(ENV)/pip install --quiet \
		--no-deps --target .onedl.part $(ONEDL) && mv .onedl.part .onedl; }
	@PYTHONPATH=$(CURDIR)/.onedl $(ENV)/python -m pytest tests/hooks $(ARGS)

# peers that only the benchmark needs, in a folder that only it looks into;
# less of it: make bench ARGS='--only update,swap --threads 1'
PEERS := benchmarks/.peers
bench: setup $(PEERS)  ## measure the average beside its peers (10 minutes)
	@$(ENV)/python -m benchmarks $(ARGS)

$(PEERS): benchmarks/peers.txt | setup
	@rm -rf $(PEERS) $(PEERS).part
	@$(ENV)/pip install --quiet --no-deps --target $(PEERS).part -r $< \
		&& mv $(PEERS).part $(PEERS) && touch $(PEERS) \
		|| echo 'bench: no peers: the tables will say "not installed"'

lint: setup  ## check style and types
	@$(ENV)/ruff check .
	@$(ENV)/ruff format --check .
	@$(ENV)/mypy --strict mmdet_ema

docs: setup  ## build the guide, where docs/ has a build
	@if [ -f docs/Makefile ]; then \
		$(MAKE) --no-print-directory -C docs PYTHON=$(CURDIR)/$(ENV)/python; \
	else echo 'docs/ needs no build: read docs/*.md'; fi

clean:  ## remove work_dirs and what builds and checks leave; keep .venv*
	@rm -rf work_dirs build dist *.egg-info .coverage htmlcov
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path './.venv*' -prune -o -path ./.git -prune -o \
		-name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv* and data as well; compiled wheels stay cached
	@rm -rf .venv .venv-old .venv.lock data $(PEERS) .onedl .onedl.part
	@rm -rf .venv-mmcv1 .venv-mmcv1-old .venv-mmcv1.lock
