# The only place that knows how the environment is made.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: help setup demo repro retrain ui bench test soak fuzz lint lock
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

setup: $(VENV)/.done  ## make .venv from requirements.lock

$(VENV)/.done: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V), but 3.11 to 3.13 is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Installing the locked packages into $(VENV): about 3 minutes, 3.5 GB"
	$(PYTHON) -m venv --clear $(VENV)
	pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# In a copy of the project (--temp), so that the tracked files stay as they are.  An earlier demo gives
# up its name first: --force would do that too, but runs every stage again.
demo: setup  ## the whole pipeline on the embedded sample
	@dvc exp remove --quiet demo 2>/dev/null || true
	dvc exp run --temp --name demo -S groups.experiment=demo
	@rm -rf .demo && dvc get --quiet . reports --rev demo --out .demo
	@echo; echo "A few of the generated reviews:"; echo; head -n 7 .demo/samples.txt
	@python -c 'import json; m = json.load(open(".demo/train.json")); \
	  print("\nHeld-out loss: %.3f nats a token (perplexity %.2f)" % (m["val_loss"], m["val_perplexity"]))'
	@echo "All reviews: .demo/samples.txt.  The run in MLflow: make ui, then http://127.0.0.1:5000"

repro: setup  ## dvc repro: the real thing, on IMDB
	dvc repro

retrain: setup  ## pull, reproduce, report and push, as CI does (RETRAIN_EXPERIMENT=, RETRAIN_OVERRIDES=)
	PYTHONPATH=src python -m minigpt.retraining.run

# The store's address comes in the environment: a command line, which may hold a password, is seen by all.
PORT ?= 5000
ui: setup  ## the MLflow UI on http://127.0.0.1:5000
	MLFLOW_BACKEND_STORE_URI="$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}" \
	  MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --host 127.0.0.1 --port $(PORT) --workers 1

bench: setup  ## measure against the published script (ARGS=--help)
	python -m benchmarks $(ARGS)

lint: setup  ## ruff, mypy, and the workflows' schema and security
	ruff check .
	ruff format --check .
	mypy
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	zizmor --offline --quiet .github/workflows

# Keras has one backend to a process: what depends on it runs again on each that is installed.
# On 2 cores: those of the pipeline often wait for a process of their own, so that a third has room.
test: lint  ## lint, types, and the tests on every installed Keras backend
	KERAS_BACKEND=tensorflow pytest -q -n 3 --dist worksteal
	KERAS_BACKEND=jax pytest -q -n 2 --dist worksteal -m backend
	@if python -c 'import torch' 2>/dev/null; then \
	  KERAS_BACKEND=torch pytest -q -n 2 --dist worksteal -m backend; fi

soak: setup  ## kill each stage at random moments and compare what comes of it (MINUTES=10)
	python tests/pipeline/soak.py --minutes $(or $(MINUTES),10)

fuzz: setup  ## hostile input at random (MINUTES=1)
	python tests/fuzz.py $(or $(MINUTES),1)

lock:  ## resolve requirements.lock again (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --no-header --extra dev --extra search pyproject.toml -o requirements.lock
