# `make help` lists the targets. All is installed into .venv, with the versions of constraints.txt.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
NB ?=
PROFILE ?= mini
GRID ?= workflow/grids/seeds.yml
PROCESSES ?= 1
WECLIP := $(BIN)/weclip
# Pictures of up to 100 MB can be uploaded into a notebook.
# Threads that wait do not spin (weclip_lib/machine.py); kernels of Lab import torch first.
export GOMP_SPINCOUNT ?= 1000
export KMP_BLOCKTIME ?= 1
UPLOADS := tornado_settings="{'websocket_max_message_size': 104857600}"

.PHONY: help setup run test rehearsal browser lint lab app site studies publish sweep bench reproduce data pretrain clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/installed  ## install into .venv; UV_TORCH_BACKEND=cpu saves 4 GB on Linux

.venv/installed: pyproject.toml constraints.txt
	@command -v uv >/dev/null || test -x .tools/bin/uv || \
	  { $(PYTHON) -m venv .tools && .tools/bin/pip install --quiet uv; }
	@PATH="$(CURDIR)/.tools/bin:$$PATH"; \
	  test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) .venv; \
	  uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[test]'
	@touch $@

run: PROCESSES = 2
run: setup  ## run every notebook, one seed, short budget, into runs/mini (or NB=02 PROFILE=smoke)
	$(WECLIP) run run --profile $(PROFILE) --notebook "$(NB)" --processes $(PROCESSES)

studies: PROCESSES = 2
studies: setup  ## run every notebook, three seeds, full budget, PROCESSES at a time, into runs/studies
	$(WECLIP) run studies --notebook "$(NB)" --processes $(PROCESSES)

publish: setup  ## copy a complete `make studies` into results/ and render the tables
	$(WECLIP) publish

sweep: setup  ## run a grid, PROCESSES at a time, into runs/sweeps (GRID=workflow/grids/seeds.yml)
	$(WECLIP) sweep run "$(GRID)" --processes $(PROCESSES)

lint: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

test: setup lint  ## run lint, unit tests, golden parity, every notebook in smoke
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

browser: setup  ## test explorers in a browser; needs chromium, saves pictures in runs/browser
	@PATH="$(CURDIR)/.tools/bin:$$PATH"; \
	  uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test,browser]'
	$(BIN)/python -m pytest -m browser -rs -s

rehearsal: setup  ## test for minutes: 09 with a random ViT-B/16, all notebooks on a second device
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m rehearsal -n 2

lab: setup  ## open JupyterLab at the index
	$(BIN)/jupyter lab notebooks/index.ipynb --ServerApp.$(UPLOADS)

app: setup  ## show the explorers without code
	$(BIN)/voila notebooks/10_explorers.ipynb --progressive_rendering=True --Voila.$(UPLOADS)

site: setup  ## build an offline site of executed notebooks in runs/site
	$(WECLIP) site

reproduce: setup  ## make the paper's table, from nothing: DATASET=voc or coco; resumes
	$(WECLIP) run studies --notebook 09 --profile $(DATASET) --out runs/reproduce-$(DATASET)

bench: setup  ## measure the cost of each part of a step, into results/bench
	$(WECLIP) bench --scaling

data: setup  ## fetch and check a data set: DATASET=voc, sbd (adds train_aug to voc) or coco
	$(WECLIP) download $(DATASET)

pretrain: setup  ## train MiniCLIP on MiniVOC 2 (hours on two cores); resumes
	$(WECLIP) pretrain

clean:  ## remove output of runs and tools; keep results/, data/, .venv
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache
