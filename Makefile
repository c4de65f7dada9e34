# Learning to Optimize: `make help` lists the targets.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
NB ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
PIP := $(BIN)/python -m pip install --quiet

# The name of a stamp ends in the checksum of what it was made from: what has not changed is not made again.
checksum = $(shell cat $(1) 2>/dev/null | cksum | cut -d ' ' -f 1)
SOURCES := find _config.yml _toc.yml book metalearn_utils -type f -not -path '*/.*' -not -path '*/__pycache__/*' \
	-not -path 'book/api/*' -not -path 'book/_tools/*' -not -path 'metalearn_utils/weights/*' -print0
FOR_BOOK := $(VENV)/.book-$(call checksum,requirements-book.txt)
FOR_TESTS := $(VENV)/.tests-$(call checksum,requirements-book.txt requirements.txt pyproject.toml)
LEARN2LEARN := $(VENV)/.learn2learn-$(call checksum,requirements.txt requirements-learn2learn.txt)
ASSETS := _build/vendor/.assets-$(call checksum,book/_vendor/package-lock.json book/_tools/vendor.py)
SITE := _build/.site-$(call checksum,requirements-book.txt)-$(shell $(SOURCES) | LC_ALL=C sort -z | xargs -0 cksum | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book serve test learn2learn lab outputs recreate bench matrix colab repository clean

help: ## list the targets
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

book: $(SITE) ## build the site into _build/html
	@echo "The site is in _build/html. To look at it: make serve"

serve: $(SITE) ## show the site at http://localhost:8000 (another port: PORT=8001)
	@echo "http://localhost:$(PORT) (Ctrl-C stops)"
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

test: $(FOR_TESTS) $(SITE) ## run every test; ends with one summary
	@$(MAKE) --silent --no-print-directory learn2learn 2>/dev/null || true
	@$(BIN)/python book/_tools/run_tests.py $(TESTFLAGS)

learn2learn: $(LEARN2LEARN) ## install learn2learn, which needs a C compiler

lab: $(FOR_TESTS) ## open JupyterLab on the notebooks
	@$(BIN)/python -m jupyterlab --notebook-dir=book

outputs: $(FOR_TESTS) ## execute notebooks and store their outputs (one: NB=book/...ipynb)
	@OMP_NUM_THREADS=1 $(BIN)/python book/_tools/outputs.py $(NB)

recreate: $(FOR_TESTS) ## train shipped weights again: NAME=fonts-maml-1shot
	@$(BIN)/python -m metalearn_utils.recreate $(NAME)

bench: $(FOR_TESTS) learn2learn ## compare speed and memory with learn2learn and a plain loop
	@$(BIN)/python tests/bench.py

matrix: $(FOR_TESTS) ## verify stored outputs under other thread counts and instruction sets
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
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(FOR_BOOK): | $(VENV)/.python
	@echo "Installing what the site needs (about a minute) ..."
	@$(PIP) -r requirements-book.txt
	@rm -f $(VENV)/.book-* && touch $@

$(FOR_TESTS): | $(FOR_BOOK)
	@echo "Installing torch and the test tools (several minutes the first time, about 6 GB) ..."
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.tests-* && touch $@

$(LEARN2LEARN): | $(FOR_TESTS)
	@echo "Building learn2learn (about a minute) ..."
	@{ $(PIP) -r requirements-learn2learn.txt && $(PIP) --no-deps --no-build-isolation --use-pep517 \
		--config-settings="--global-option=build_ext" learn2learn==0.2.0; } >$(VENV)/learn2learn.log 2>&1 || { \
		echo "learn2learn could not be built: sudo apt-get install gcc python3-dev (the log: $(VENV)/learn2learn.log)"; exit 1; }
	@rm -f $(VENV)/.learn2learn-* && touch $@

$(ASSETS): | $(FOR_BOOK)
	@$(BIN)/python book/_tools/vendor.py
	@rm -f _build/vendor/.assets-* && touch $@

$(SITE): $(ASSETS) | $(FOR_BOOK)
	@echo "Building the site (about half a minute) ..."
	@rm -rf _build/html _build/.site-*
	@$(BIN)/jupyter-book build . -W -n --keep-going --quiet >_build/book.log 2>&1 || { cat _build/book.log; exit 1; }
	@touch $@
