# Each command sets up what it needs from Python and pip alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKENDS := jax torch tensorflow
READY := $(VENV)/.ready
export TF_CPP_MIN_LOG_LEVEL = 3
export TF_ENABLE_ONEDNN_OPTS = 0

.PHONY: demo test lint clean

demo: $(READY)
	@$(BIN)/python tools/demo.py $(BACKENDS)

test: lint
	@for backend in $(BACKENDS); do echo "== $$backend"; KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST) || exit 1; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# PyTorch first and alone: its version decides whether a small CPU build or a CUDA build is taken.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[jax,torch,tensorflow,dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV)
