# Each command sets up what it needs from Python and pip alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKENDS := jax torch tensorflow
READY := $(VENV)/.ready
export TF_CPP_MIN_LOG_LEVEL = 3
export TF_ENABLE_ONEDNN_OPTS = 0
# Huge pages for all objects, and freed memory kept: on a virtual machine whose host was slow to map small pages, a test
# took a third of the time.
export PYTHONMALLOC = malloc
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1:glibc.malloc.top_pad=67108864:glibc.malloc.trim_threshold=4294967296:glibc.malloc.mmap_threshold=4294967296

.PHONY: demo docs notebooks test test-all lint clean

demo: $(READY)
	@$(BIN)/python tools/demo.py $(BACKENDS)

# What a change needs (CONTRIBUTING.md explains the markers). `make test ROOM=privacy BACKEND=torch` runs one folder of tests/ on one backend.
test: lint
	@$(call run_tests,not long,not long and (not first_backend or every_backend) and ,)

# Also what takes long (marker `long`), compiled as users do, with the coverage of all backends together.
test-all: export FULL_OPTIMIZATION = 1
test-all: lint
	@rm -f .coverage
	@$(call run_tests,,,--cov=keras_vaultgemma --cov-append --cov-report=)
	@$(BIN)/coverage report --skip-covered

ROOM ?=
BACKEND ?=
# PyTorch first, because the first backend also runs the tests that no backend changes, and it starts fastest.
TESTED := $(or $(BACKEND),torch jax tensorflow)
# $(1) and $(2): marker expressions of the first backend and, ending in "and" unless empty, of the others; $(3): more
# options of pytest. Its exit status 5 says that no test of the room is left.
run_tests = chosen="$(1)"; for backend in $(TESTED); do echo "== $$backend"; \
	KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		-m "$$chosen" $(3) tests/$(ROOM) $(PYTEST) || [ $$? = 5 ] || exit 1; \
	chosen="$(2)not any_backend"; done

# The site, in .cache/site. Without a network, and a warning is an error.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY)
	$(BIN)/mkdocs build -q

# A notebook next to each script of examples/.
notebooks: $(READY)
	$(BIN)/jupytext -q --to notebook examples/*.py

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
	rm -rf $(VENV) .cache
