# The only place that knows how the environment is made.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: help setup ray demo repro retrain ui bench test test-slow soak fuzz lint format lock
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 11

setup: $(VENV)/.done  ## make .venv from requirements.lock

# tools/environment.py needs a Python of the right version to be read at all.
$(VENV)/.done: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing), but Python 3.11 to 3.13 is needed:" \
	    "make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) tools/environment.py
	@touch $@

ray: $(VENV)/.ray  ## add Ray, the engine for several machines, from requirements-ray.lock

$(VENV)/.ray: requirements-ray.lock $(VENV)/.done
	@python tools/environment.py requirements-ray.lock
	@touch $@

demo: setup  ## the whole pipeline on the embedded sample
	@python -m minigpt.retraining.demo

repro: setup  ## dvc repro: the real thing, on IMDB
	dvc repro

# PYTHONPATH: a copy of the project runs its own code, not the installed one.
retrain: setup  ## pull, reproduce, report and push, as CI does (RETRAIN_EXPERIMENT=, RETRAIN_OVERRIDES=)
	PYTHONPATH=src minigpt retrain

# The store's address may hold a password, so it comes in the environment: everyone can see a command line.
PORT ?= 5000
ui: setup  ## the MLflow UI on http://127.0.0.1:5000
	@echo "MLflow answers on http://127.0.0.1:$(PORT) in a few seconds; Ctrl-C stops it"
	@export MLFLOW_BACKEND_STORE_URI="$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}"; \
	MLFLOW_REGISTRY_STORE_URI="$$MLFLOW_BACKEND_STORE_URI" MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	MLFLOW_LOGGING_LEVEL=WARNING PYTHONWARNINGS=ignore \
	  mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 --uvicorn-opts "--log-level warning"

bench: setup  ## measure against the published script (ARGS=--help)
	python -m benchmarks $(ARGS)

lint: setup  ## ruff, mypy, and the workflows' schema and security
	ruff check .
	ruff format --check .
	mypy
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	zizmor --offline --quiet .github

format: setup  ## let ruff format the code and fix what it can
	ruff format .
	ruff check --fix .

NUMERICAL := $(addprefix tests/,evaluation generation model training)
# A process has one Keras backend, so the tests of numerical code run once for each installed backend.
# The pipeline's tests mostly wait for processes of their own: 2 cores take 3 workers.
test: lint  ## lint, types, and the fast tests on every installed Keras backend
	KERAS_BACKEND=tensorflow pytest -q -n 3 --dist worksteal -m "not slow"
	KERAS_BACKEND=jax pytest -q -n 2 --dist worksteal -m "backend and not slow" $(NUMERICAL)
	@if python -c 'import torch' 2>/dev/null; then \
	  KERAS_BACKEND=torch pytest -q -n 2 --dist worksteal -m "backend and not slow" $(NUMERICAL); fi

test-slow: setup  ## the tests that are slow by nature: kill -9, servers, a browser
	KERAS_BACKEND=tensorflow pytest -q -n 3 --dist worksteal -m slow

soak: setup  ## kill each stage at random moments and compare what comes of it (MINUTES=10)
	python tests/pipeline/soak.py --minutes $(or $(MINUTES),10)

fuzz: setup  ## hostile input at random (MINUTES=1)
	python tests/fuzz.py $(or $(MINUTES),1)

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
  --no-emit-index-url --no-emit-find-links
lock: setup  ## resolve the lock files again, with uv (ARGS=--upgrade for newer versions of everything)
	$(COMPILE) $(ARGS) --extra dev --extra search pyproject.toml -o requirements.lock
	$(COMPILE) $(ARGS) --extra ray --constraints requirements.lock pyproject.toml -o requirements-ray.lock
	echo uv | $(COMPILE) $(ARGS) - -o requirements-uv.lock
