# Two commands for users: `make demo` and `make test`. `make check` is the linters; CI runs `make check test`.
# `make test-all` runs every case of the tests of which `make test` draws some.

PYTHON ?= python3.11
# Name PyTorch's CPU index here to avoid the CUDA build: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The suite runs in so many processes at once, each of which takes whole files; 0 runs it in one, in the order of folders.
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

STARTED := $(shell date +%s)
PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=20

.PHONY: demo test test-all check format clean

demo: $(STAMP)
	$(BIN)/qlora-export demo --out out/demo

test: $(STAMP)
	$(PYTEST)
	@echo "make test: $$(($$(date +%s) - $(STARTED))) seconds since make began, set-up included; make test-all runs every case"

test-all: $(STAMP)
	$(PYTEST) --all-cases
	@echo "make test-all: $$(($$(date +%s) - $(STARTED))) seconds since make began, set-up included"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache out build dist *.egg-info

# Compiled afterwards, by all cores at once; some files of packages are no Python that compiles.
$(STAMP): constraints.txt constraints-oldest-hub.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,onnx,data,sign,ray,report,gguf]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target $(VENV)/oldest-hub --requirement constraints-oldest-hub.txt
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib $(VENV)/oldest-hub || true
	touch $(STAMP)
