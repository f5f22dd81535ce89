# make demo   speech -> shards -> mapper, pretrained and tuned -> the LLM's answers -> report, on two cores
# make test   every test but those marked gpu and chaos
# make chaos  thousands of random faults: corrupted shards, killed runs, crash points of saves, a drill (an hour or more)
# make bench  every figure of docs/benchmarks.md, beside other systems (an hour)
# make check  format, lint, types
# make reproduce   every row of the paper's tables with three seeds, what it cost, what holds (WORLD=miniature: the easy one)
# make wheelhouse                    all packages as wheels, into wheelhouse/, for sites without internet
# make install WHEELHOUSE=wheelhouse everything from there, with no index at all; the other targets take it too
# Each installs what it needs into .venv first.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The index torch comes from, if not the default one: a V100 needs a CUDA 12.6 build, a machine without a GPU a CPU build.
TORCH_INDEX ?=
# A folder of wheels to install from, with no index; it is made where there is one, by the same Python and architecture.
WHEELHOUSE ?=
# What make reproduce compares: a file in configs/reproduce.
WORLD ?= miniature-hard

FROM_INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
FROM_WHEELS := $(if $(WHEELHOUSE),--no-index --find-links $(WHEELHOUSE))
WHEELS := $(or $(WHEELHOUSE),wheelhouse)

BIN := .venv/bin
INSTALLED := .venv/.installed

export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install wheelhouse demo reproduce test chaos bench check format clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sm_train needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(or $(FROM_WHEELS),$(FROM_INDEX)) $(TORCH)
	$(BIN)/pip install -q $(FROM_WHEELS) --no-deps -r requirements.lock
	$(BIN)/pip install -q --no-index --no-deps --no-build-isolation -e .
	touch $@

# What comes as source alone is built here, so that nothing is compiled later; setuptools, which builds us, is in the lock.
wheelhouse:
	mkdir -p $(WHEELS)
	$(PYTHON) -m venv $(WHEELS)/.pip
	$(WHEELS)/.pip/bin/pip wheel -q $(FROM_INDEX) -w $(WHEELS) $(TORCH)
	$(WHEELS)/.pip/bin/pip wheel -q --no-deps -w $(WHEELS) -r requirements.lock
	rm -rf $(WHEELS)/.pip

demo: install
	python -m tools.miniature.corpus configs/miniature/easy.yaml out=runs/demo/corpus
	python -m cluster.precompute configs/precompute/miniature.yaml
	torchrun --standalone --nproc-per-node 2 -m sm_train.pretrain configs/pretrain/miniature.yaml
	python -m cluster.retarget runs/demo/shards --instructions runs/demo/corpus/instructions.parquet
	torchrun --standalone --nproc-per-node 2 -m sm_train.tune configs/tune/miniature.yaml
	python -m sm_train.evaluate configs/evaluate/miniature.yaml

reproduce: install
	python -m tools.reproduce --world $(WORLD)

test: install
	python -m pytest -m "not gpu and not chaos"

chaos: install
	python -m pytest -m chaos tests/chaos -s

# What the others are compared with goes into a folder of its own.
bench: install
	$(BIN)/pip install -q --no-deps --target .venv/peers -r requirements-bench.lock
	PYTHONPATH=.venv/peers python -m tools.bench.padding
	PYTHONPATH=.venv/peers python -m tools.bench.loader
	PYTHONPATH=.venv/peers python -m tools.bench.precompute
	python -m tools.bench.resume
	python -m tools.bench.placements

check: install
	ruff format --check .
	ruff check .
	mypy

format: install
	ruff format .
	ruff check --fix .

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
