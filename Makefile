# One command for each thing people do. `make` prints this list. Each target sets up what it needs on a fresh machine
# that has Python 3.11+, git and make; the only network used is the package registry.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VVENV  := .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help demo test check golden golden-record slow real study bench-trainer bench-score bench-generate bench-skips bench-grade bench-store docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(VENV)/ready  ## DYPO's whole job on the embedded policy, about two minutes; run folder runs/demo
	@if [ -e runs/demo ]; then mv runs/demo runs/demo-$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/dypo run recipes/tiny.toml

test: $(VENV)/ready check  ## checks, then every fast test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not vllm and not chromium" --ignore tests/schemas

check: $(VENV)/ready  ## lint, format, types, import layers, recipes, rendered docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python docs/render.py --check
	$(BIN)/python -m pytest tests/schemas tests/test_layers.py

golden: $(VENV)/ready  ## losses and gradient norms of the golden runs, compared (part of `make test`)
	$(BIN)/python -m pytest tests/golden

golden-record: $(VENV)/ready  ## the same, recorded anew; say in the commit why they moved
	$(BIN)/python -m tests.golden.record

docs: $(VENV)/ready  ## render docs/data.md and docs/recipe.md from schemas/
	$(BIN)/python docs/render.py

slow: $(VENV)/ready-real $(VVENV)/ready chromium  ## real components: the demo over 3 seeds, a real browser, llama.cpp, vLLM's CPU build
	$(BIN)/python -m pytest -m "slow or chromium" tests
	$(VVENV)/bin/python -m pytest -m vllm -W ignore::ResourceWarning tests/slow  # vLLM leaves zmq contexts to the collector

study: $(VENV)/ready  ## the study of docs/results/study-worlds.md; goes on where it was stopped (ARGS="--processes 2")
	for name in core beyond teachers alpha_beta ablation adjust others averaged; do \
		$(BIN)/dypo study recipes/study/$$name.toml $(ARGS) || failed=1; \
		cp runs/study/$$name.md docs/results/study-$$name.md; \
	done; test -z "$$failed"

real: $(VENV)/ready-real  ## a real language model, real problems, two real teachers (docs/results/smollm2.md says how long)
	$(BIN)/python data/real.py

bench-trainer: $(VENV)/ready-bench  ## our step against TRL's GRPOTrainer, on one core; docs/performance.md says what it shows
	$(BIN)/python -m tests.bench.trainer $(ARGS)

bench-score: $(VENV)/ready  ## math verdicts against plain math-verify, on the same rows and processes
	$(BIN)/python -m tests.bench.score $(ARGS)

bench-generate: $(VENV)/ready $(VVENV)/ready  ## the embedded engine against transformers.generate, vllm against LLM.generate
	$(BIN)/python -m tests.bench.generate $(ARGS)
	$(VVENV)/bin/python -m tests.bench.generate_vllm

bench-skips: $(VENV)/ready  ## tokens saved and routes changed by sequential groups and reuse, replaying whole groups of 16
	$(BIN)/python -m tests.bench.skips $(ARGS)

bench-grade: $(VENV)/ready-bench  ## grading 10 million rollouts: our stage, its bare SQL, polars, pandas, a loop
	$(BIN)/python -m tests.bench.grade $(ARGS)

bench-store: $(VENV)/ready-bench  ## what a stored rollout costs, and how fast one prompt reads
	$(BIN)/python -m tests.bench.store $(ARGS)

worlds: $(VENV)/ready  ## make the study's problems and base policies again (docs in data/worlds)
	$(BIN)/python data/make_worlds.py
	$(BIN)/python data/make_worlds.py --teacher

tiny-policy: $(VENV)/ready  ## make the embedded policy and its problems again (docs in data/tiny_policy)
	$(BIN)/python data/make_tiny_policy.py

venv-vllm: $(VVENV)/ready  ## a second environment with vLLM's CPU build, for the tests of the vllm engine

chromium:
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium >/dev/null)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/ready-real: $(VENV)/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,real]'
	touch $@

$(VENV)/ready-bench: $(VENV)/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

$(VVENV)/ready: constraints-vllm.txt
	$(PYTHON) -m venv $(VVENV)
	$(VVENV)/bin/python -m pip install -q --disable-pip-version-check -r constraints-vllm.txt
	$(VVENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VVENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

clean:  ## remove the environments and caches; run folders stay
	rm -rf $(VENV) $(VVENV) .pytest_cache .ruff_cache .hypothesis
