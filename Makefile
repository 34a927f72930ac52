# Two commands on a fresh machine (Python 3.11 or newer and make): `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := -m pip --disable-pip-version-check --quiet install

.PHONY: help demo test lint bench docs clean

help:
	@echo "make demo   set up a virtual environment and run the demonstration (under a minute after set-up)"
	@echo "make test   lint, types and the whole test suite"
	@echo "make lint   ruff and mypy only"
	@echo "make bench  Mohs beside foolbox, torchattacks, ART and adv-lib on the same nets and images"
	@echo "make docs   rebuild the generated pages of docs/"
	@echo "make clean  remove the virtual environments, builds and caches"

# paths are relative and programs are started through their interpreter, so that a checkout may lie below any name
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Mohs needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" $(PIP) -c constraints.txt -e .
	@touch "$@"

# onnx2pytorch goes in without its declared torchvision, which Mohs does not need
$(BIN)/.installed-test: $(BIN)/.installed requirements-onnx.txt
	"$(BIN)/python" $(PIP) -c constraints.txt -e ".[test]"
	"$(BIN)/python" $(PIP) --no-deps -r requirements-onnx.txt
	@touch "$@"

.bench/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .bench
	.bench/bin/python $(PIP) -c constraints.txt -r benchmarks/requirements.txt -e .
	.bench/bin/python $(PIP) --no-deps -r benchmarks/requirements-peers.txt
	@touch "$@"

demo: $(BIN)/.installed
	"$(BIN)/python" -m mohs demo

lint: $(BIN)/.installed-test
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy

# one thread per worker: two workers that each take every core are slower than one
test: lint
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n 2 --dist worksteal

bench: .bench/.installed
	.bench/bin/python -m benchmarks

docs: $(BIN)/.installed
	"$(BIN)/python" docs/generate.py

clean:
	rm -rf "$(VENV)" .bench build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
