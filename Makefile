# The commands of this project. `make demo` and `make test` are all a newcomer needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SEED   ?= 1
NODES  ?= 100
BENCH  ?= collatz-vm collatz-cluster boot idle noop placement overlay python-kernel map-noop

.PHONY: demo test check sim bench picture clean setup
.DEFAULT_GOAL := demo

demo: setup                    ## boot 16 nodes, compute, kill two on the way, explain, clean up
	$(BIN)/python -m manifold.tools.demo

test: setup                    ## the whole test suite
	$(BIN)/python -m pytest -n auto

check: setup                   ## ruff, mypy --strict, the rules of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m manifold.tools.tidy

sim: setup                     ## simulate a cluster: make sim SEED=7 NODES=1000
	$(BIN)/manifold sim --seed $(SEED) --nodes $(NODES)

bench: setup                   ## every figure, as a ratio measured in one run
	$(BIN)/manifold bench $(BENCH)

picture: setup                 ## the pictures of the docs, from the running product
	$(BIN)/python -m manifold.tools.picture
	$(BIN)/python -m manifold.tools.web_picture
	$(BIN)/python examples/mandelbrot.py docs/mandelbrot.png

setup: $(VENV)/.ready

# Refuse early and clearly where this cannot work; then one virtual environment for everything.
$(VENV)/.ready: pyproject.toml
	@test "$$(uname -s)" = Linux || { \
	  echo "Manifold runs on Linux (x86-64 or arm64); this is $$(uname -s)."; \
	  echo "Use a Linux machine, a virtual machine or WSL 2."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Manifold needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "Python's venv module is missing: sudo apt-get install python3-venv"; exit 2; }
	@echo "setting up $(VENV): about 70 packages, 60 MB to download, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e '.[dev]'
	@touch $@

clean:                         ## remove what the targets above made
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
