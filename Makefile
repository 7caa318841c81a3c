# The two commands: `make book` and `make test`. Each makes its own environment in .venv first, from requirements.txt,
# at the exact versions of requirements.lock. `make LOCK= test` takes the newest versions instead.

PYTHON ?= python3
LOCK ?= requirements.lock
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: book test check notebooks address findings lock clean
.DEFAULT_GOAL := book

book: $(READY)  ## every notebook executed, then the HTML book at _build/html/index.html
	$(BIN)/python book/build.py

# One notebook after the other: two kernels that start at the same moment may pick the same port, and one dies.
test: $(READY)  ## unit tests (papermill runs included), then the notebooks against their stored outputs
	$(BIN)/python -m pytest -n 2 --dist loadscope --cov metaadamw_lite tests
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 notebooks

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(READY)  ## store the outputs that nbval compares, after a change to a notebook
	$(BIN)/python book/build.py --in-place

address: $(READY)  ## carry the repository's address from pyproject.toml to wherever it is needed
	$(BIN)/python book/address.py

findings: $(READY)  ## write the README's findings, and draw their picture, from the records
	$(BIN)/python book/findings.py

lock: $(READY)  ## write down the versions that are installed
	$(BIN)/pip freeze --exclude-editable > requirements.lock

clean:  ## remove what the commands made, but not the environment
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .coverage*

$(READY): requirements.txt requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt $(if $(LOCK),-c $(LOCK))
	touch $(READY)
