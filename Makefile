# Learning to Optimize: `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NB ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
PIP := $(BIN)/pip install --quiet
PAGES := $(shell find book metalearn_utils _config.yml _toc.yml -type f -not -path '*/__pycache__/*' -not -path '*/.ipynb_checkpoints/*' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help book serve test learn2learn lab outputs recreate bench matrix colab repository clean

help: ## list the targets
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

book: _build/html/.built ## build the site into _build/html
	@echo "The site is in _build/html. To look at it: make serve"

serve: book ## show the site at http://localhost:8000
	@echo "http://localhost:8000 (Ctrl-C stops)"
	@$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _build/html

test: $(VENV)/.all _build/html/.built ## run every test
	@$(MAKE) --no-print-directory learn2learn || echo "skipped: learn2learn could not be built (is a C compiler installed? sudo apt-get install gcc python3-dev); its tests are skipped"
	@$(BIN)/python book/_tools/run_tests.py $(TESTFLAGS)

learn2learn: $(VENV)/.learn2learn ## install learn2learn, which needs a C compiler

lab: $(VENV)/.all ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=book

outputs: $(VENV)/.all ## execute notebooks and store their outputs (one: NB=book/...ipynb)
	@OMP_NUM_THREADS=1 $(BIN)/python book/_tools/outputs.py $(NB)

recreate: $(VENV)/.all ## train shipped weights again: NAME=fonts-maml-1shot
	@$(BIN)/python -m metalearn_utils.recreate $(NAME)

bench: $(VENV)/.all learn2learn ## compare speed and memory with learn2learn and a plain loop
	@$(BIN)/python tests/bench.py

matrix: $(VENV)/.all ## verify stored outputs under other threads and instruction sets
	@$(BIN)/python tests/matrix.py

colab: ## run the notebooks in a fresh Python 3.12 as Colab does (about 3 GB of downloads)
	@bash tests/colab.sh

repository: ## set the repository's address everywhere: URL=https://github.com/NAME/REPOSITORY
	@$(PYTHON) book/_tools/repository.py "$(URL)"

clean: ## remove the site, but keep the environment
	@rm -rf _build

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "Python is missing: sudo apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) book/_tools/check_python.py
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.book: requirements-book.txt | $(VENV)/.python
	@echo "Installing what the site needs (about a minute) ..."
	@$(PIP) -r requirements-book.txt
	@touch $@

$(VENV)/.all: requirements.txt pyproject.toml $(VENV)/.book
	@echo "Installing torch and the test tools (several minutes the first time, about 6 GB) ..."
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.learn2learn: requirements-learn2learn.txt $(VENV)/.all
	@echo "Building learn2learn ..."
	@$(PIP) -r requirements-learn2learn.txt
	@$(PIP) --no-deps --no-build-isolation --use-pep517 --config-settings="--global-option=build_ext" learn2learn==0.2.0
	@touch $@

_build/vendor/.fetched: book/_vendor/package-lock.json book/_tools/vendor.py | $(VENV)/.book
	@$(BIN)/python book/_tools/vendor.py
	@touch $@

_build/html/.built: $(VENV)/.book _build/vendor/.fetched $(PAGES)
	@$(BIN)/jupyter-book build . -W --keep-going --quiet
	@touch $@
