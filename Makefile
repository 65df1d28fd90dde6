PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test soak lint docs bench bench-gpu clean

demo: $(VENV)/.demo  ## watermarks removed from real photographs, in demo/
	$(BIN)/python -m tests.demo --folder demo

test: $(VENV)/.test  ## the whole suite, on its own Redis, PostgreSQL and S3 server
	$(BIN)/python -m pytest -q -n 3 --dist worksteal

MINUTES ?= 10
SEED ?= $(shell date +%s)

soak: $(VENV)/.test  ## faults for MINUTES, forty killed workers, hostile files, jobs at random; prints its SEED
	FAULTS_SECONDS=$$((60 * $(MINUTES))) FAULTS_SEED=$(SEED) FAULTS_KILLS=40 \
	  $(BIN)/python -m pytest -q -s --timeout 0 tests/faults/test_mixture.py tests/faults/test_workers.py
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)
	$(BIN)/python -m pytest -q --hypothesis-profile=soak tests/shared/test_job_machine.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## the documentation as a site, in site/; needs no network once installed
	$(BIN)/python -m mkdocs build -q --strict

bench: $(VENV)/.test  ## every figure in docs/benchmarks.md that needs no GPU
	$(BIN)/python -m tests.benchmarks

bench-gpu: $(VENV)/.test  ## the engine beside plain diffusers on the GPU at hand, in eight minutes
	$(BIN)/python -m tests.benchmarks.gpu

clean:
	rm -rf $(VENV) demo site .inpaint build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.demo $(VENV)/.docs
