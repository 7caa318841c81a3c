# The two commands: `make book` and `make test`. Each makes its own environment in .venv first, from requirements.txt,
# at the exact versions of requirements.lock. `make LOCK= test` takes the newest versions instead.

PYTHON ?= python3
LOCK ?= requirements.lock
COLAB ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
WORKFLOWS := .github/workflows

.PHONY: help book test check lab notebooks reexecute colab links address findings lock clean
.DEFAULT_GOAL := book

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

book: $(READY)  ## execute every notebook, then build the HTML book at _build/html/index.html (some minutes)
	$(BIN)/python book/build.py

# One notebook after the other: two kernels that start at the same moment may pick the same port, and one dies.
test: $(READY)  ## run the unit tests (papermill runs included), then hold the notebooks against their stored outputs
	$(BIN)/python -m pytest -n 2 --dist loadscope --cov metaadamw_lite tests
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 notebooks

check: $(READY)  ## check style, types and workflows
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m check_jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)/*.yml
	$(BIN)/zizmor --offline --quiet $(WORKFLOWS)

lab: $(READY)  ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab notebooks

notebooks: $(READY)  ## store the outputs that nbval compares, after a change to a notebook
	$(BIN)/python book/build.py --in-place

reexecute: $(READY)  ## run every chapter with each choice of its parameters (hours), and write _build/execution/index.html
	$(BIN)/python book/reexecute.py

colab: $(READY)  ## run every chapter as Colab does, with a new Python 3.12 and Colab's packages (6 GB for a while)
	METAADAMW_COLAB=$(COLAB) $(BIN)/python -m pytest tests/test_colab.py

links: $(READY)  ## visit the external links of the book that `make book` has built
	$(BIN)/python -m jupyter_book build _build/source --path-output _build/links --builder linkcheck

address: $(READY)  ## carry the repository's address from pyproject.toml to wherever it is needed
	$(BIN)/python book/address.py

findings: $(READY)  ## write the README's findings, and draw their picture, from the records
	$(BIN)/python book/findings.py

lock: $(READY)  ## write down the versions that are installed
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock

clean:  ## remove what the commands made, but not the environment
	rm -rf _build build dist .pytest_cache .mypy_cache .ruff_cache .coverage*

$(READY): requirements.txt requirements.lock pyproject.toml
	@echo 'environment: installs about 6 GB, most of it PyTorch, into .venv (once; some minutes, by your connection)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(if $(LOCK),-c $(LOCK))
	touch $(READY)
