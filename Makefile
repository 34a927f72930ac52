# Two commands on a fresh machine (Python 3.11 or newer and make): `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help demo test lint bench docs clean

help:
	@echo "make demo   set up a virtual environment and run the demonstration (under a minute after set-up)"
	@echo "make test   lint, types and the whole test suite"
	@echo "make lint   ruff and mypy only"
	@echo "make bench  Mohs beside foolbox, torchattacks, ART and adv-lib on the same nets and images"
	@echo "make docs   rebuild the generated pages of docs/"

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Mohs needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(BIN)/.installed-test: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-onnx.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pytest pytest-xdist hypothesis ruff mypy onnx onnxruntime
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/mohs demo

lint: $(BIN)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) .bench build dist *.egg-info
