# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
# Each makes .venv by itself and is quick when called again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint types docs bench clean venv

demo: $(READY)
	$(BIN)/psacpo demo --out demo-run

# Two processes of one thread each; tests that share the demo's run go to one of them.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy names modules by their path, and a checkout may be called anything: the link gives it the package's name.
types: $(READY)
	mkdir -p .mypy && ln -sfn .. .mypy/psacpo
	$(BIN)/mypy

# The pages that are made from the code: docs/cli.md from each command's --help.
docs: $(READY)
	$(BIN)/python docs/make_cli.py

bench: $(READY)
	for script in benchmarks/*.py; do $(BIN)/python $$script --quick || exit 1; done

venv: $(READY)

# torch first and by its exact version, so that no other package's looser wish decides which build comes.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy build dist demo-run *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
