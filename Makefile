# What to run. `make` lists it; nothing but Python and make needs to be installed before.
#
#   EXTRA=cuda | tpu       install JAX for that accelerator too
#   PYTHON=3.11 | <path>   use this Python; by default the newest suitable one is found
#   ARGS="..."             handed on to the command that a target runs

EXTRA ?= cpu
PYTHON ?=
ARGS ?=
VERSIONS := 3.13 3.12 3.11
GOALS := $(or $(MAKECMDGOALS),help)

EXTRAS := cpu cuda tpu peer
ifeq ($(filter $(EXTRA),$(EXTRAS)),)
  $(error EXTRA is one of: $(EXTRAS); got EXTRA=$(EXTRA))
endif

# The first Python that runs, has the wanted version and can make environments: on PATH, then
# pyenv's (its shims exist for inactive versions too and fail, hence the trial run).
define FIND_PYTHON
for version in $(or $(filter 3.%,$(PYTHON)),$(if $(PYTHON),any,$(VERSIONS))); do \
  for python in $(if $(filter-out 3.%,$(PYTHON)),"$(PYTHON)",python$$version \
      "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python$$version python3 python); do \
    found=`"$$python" -c 'import importlib.util, sys, venv; \
assert any(map(importlib.util.find_spec, ("ensurepip", "pip"))); \
version = "%d.%d" % sys.version_info[:2]; \
print(sys.executable, version) if version in sys.argv[2].split() and sys.argv[1] in (version, "any") \
else sys.exit(1)' "$$version" "$(VERSIONS)" 2>/dev/null` && { echo $$found; exit; }; \
  done; \
done
endef

ifneq ($(filter-out help clean,$(GOALS)),)
  FOUND := $(shell $(FIND_PYTHON))
  ifeq ($(FOUND),)
    $(error No suitable Python: kvjax needs one of $(VERSIONS) with the venv module, \
      got $(or $(PYTHON),none of them on PATH or under pyenv). Install one, or name it: make PYTHON=/path/to/python3.13)
  endif
  PY := $(word 1,$(FOUND))
  VENV := .venv/$(word 2,$(FOUND))$(if $(filter-out cpu,$(EXTRA)),-$(EXTRA))
endif

BIN := $(VENV)/bin
LOCKS := $(if $(filter peer,$(EXTRA)),requirements/peer.txt,requirements/cpu.txt \
  $(if $(filter cuda tpu,$(EXTRA)),requirements/$(EXTRA).txt))
# Each lock is complete, so pip need not resolve; the peers' leaves CUDA to torch's own exact pins.
NO_DEPS := $(if $(filter-out peer,$(EXTRA)),--no-deps)

.PHONY: help setup test compare kernels lint format peers lock python clean

help:  ## list the targets
	@echo "make TARGET [EXTRA=cuda|tpu] [PYTHON=3.11|path] [ARGS=...]"
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-10s %s\n", $$1, $$2 }'

setup: $(VENV)/.installed  ## make .venv/<python>[-EXTRA] from the locked dependencies
	@echo "Ready: $(VENV)"

test: $(VENV)/.installed $(VENV)/compilers/.installed  ## run the tests (ARGS="-m large" for those that fetch the big models)
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

compare: $(VENV)/.installed  ## run every method on a real model: a table, a plot and a JSON
	@$(BIN)/python -m experiments.compare $(ARGS)

kernels: $(VENV)/.installed  ## run every kernel on this machine's accelerator: a table of ratios and a JSON
	@$(BIN)/python -m experiments.kernels $(ARGS)

lint: $(VENV)/.installed  ## check style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.installed  ## mend style and formatting
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

peers:  ## run experiments/peers.py beside torch, transformers and kvpress (Python 3.11)
	@$(MAKE) --no-print-directory run-peers EXTRA=peer PYTHON=$(or $(PYTHON),3.11)

.PHONY: run-peers
run-peers: $(VENV)/.installed
	@$(BIN)/python -m experiments.peers $(ARGS)

python:  ## print the Python that would be used
	@echo $(PY)

clean:  ## remove the environments and the caches of the tools
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

# Debian (and so Colab) may lack ensurepip; then the outer pip puts one into the environment.
MAKE_VENV = $(PY) -m venv --clear $(VENV) >/dev/null 2>&1 || { $(PY) -m venv --clear --without-pip $(VENV) \
  && $(PY) -m pip --python $(BIN)/python install -qq --disable-pip-version-check pip; }

# The stamp comes last, so an interrupted or failed set-up is done again.
$(VENV)/.installed: $(LOCKS) pyproject.toml
	@echo "Setting up $(VENV) with $(PY): a minute or two, 1 GB (more with EXTRA)"
	@$(BIN)/python -c "import pip" 2>/dev/null || $(MAKE_VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(NO_DEPS) $(LOCKS:%=-r %)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Compilers for TPUs and GPUs that are not here; only the tests' child processes see them.
$(VENV)/compilers/.installed: requirements/compilers.txt | $(VENV)/.installed
	@echo "Adding compilers for TPU and GPU to $(VENV): 400 MB to fetch"
	@rm -rf $(@D) && $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# One universal lock: environment markers choose by Python and platform. The accelerators' locks
# hold only what they add. CUDA wheels of the peers are left to torch, which pins them.
COMPILE := .venv/lock/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
  --extra test --no-header --no-annotate --no-emit-index-url --no-emit-find-links $(ARGS)

lock:  ## resolve the dependencies anew into requirements/ (ARGS=--upgrade for newer ones)
	@[ -x .venv/lock/bin/uv ] || { $(PY) -m venv --clear .venv/lock && .venv/lock/bin/python -m pip install -qq uv; }
	@mkdir -p requirements
	@$(COMPILE) --output-file requirements/cpu.txt
	@for extra in cuda tpu; do \
	  cat requirements/cpu.txt requirements/$$extra.txt > .venv/lock/$$extra.txt 2>/dev/null; \
	  $(COMPILE) --extra $$extra --output-file .venv/lock/$$extra.txt; \
	  grep -vxFf requirements/cpu.txt .venv/lock/$$extra.txt > requirements/$$extra.txt; \
	done
	@cp requirements/peer.txt .venv/lock/peer.txt 2>/dev/null || true
	@$(COMPILE) --extra peer --output-file .venv/lock/peer.txt
	@grep -vE '^(nvidia-|cuda-|triton)' .venv/lock/peer.txt > requirements/peer.txt
	@cp requirements/cpu.txt .venv/lock/compilers.txt && cat requirements/compilers.txt >> .venv/lock/compilers.txt
	@$(COMPILE) --extra compilers --output-file .venv/lock/compilers.txt
	@grep -E '^(libtpu|jax-cuda13-p)' .venv/lock/compilers.txt > requirements/compilers.txt
	@wc -l requirements/*.txt
