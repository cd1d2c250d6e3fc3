# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
# Given on the command line; what the environment says under these names is meant for others.
DATA :=
NAME :=
RECIPE :=
LAYOUT :=
TRIALS :=
DATASET := textures
HOST :=
PORT :=
BASE :=
KEYS :=
STACK := $(CURDIR)/store/stack

.PHONY: help setup demo run serve mlflow up down status jobs docs lint test
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/installed: requirements.txt pyproject.toml infra/kubernetes/helm.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sprue needs Python 3.11 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python infra/kubernetes/install_helm.py
	@touch $@

setup: .venv/installed ## make the virtual environment from the pinned versions

demo: setup ## run the pipeline on an embedded dataset and score images over HTTP (minutes)
	$(BIN)/sprue demo

run: setup ## run the pipeline on your own folder: make run DATA=/path/to/folder [NAME=...] [RECIPE=...] [LAYOUT=...] [TRIALS=...]
	@test -n "$(DATA)" || { echo 'name a folder: make run DATA=/path/to/folder'; exit 2; }
	$(BIN)/sprue run "$(DATA)" $(if $(NAME),--name "$(NAME)") $(if $(RECIPE),--recipe "$(RECIPE)") \
		$(if $(LAYOUT),--layout "$(LAYOUT)") $(if $(TRIALS),--trials "$(TRIALS)")

serve: setup ## serve the champions over HTTP until interrupted [PORT=8000 HOST=127.0.0.1 KEYS=keys.json]
	$(BIN)/sprue serve --host $(or $(HOST),127.0.0.1) --port $(or $(PORT),8000) $(if $(KEYS),--keys "$(KEYS)")

mlflow: setup ## open the tracking UI on the same store [PORT=5000]
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --host 127.0.0.1 --port $(or $(PORT),5000) \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/store/mlflow/mlflow.db}"

up: setup ## bring the local stack up: Ray, S3, Postgres, MLflow, scoring, Prometheus [HOST=127.0.0.1 PORT=8443 BASE=21000]
	@$(BIN)/python infra/local/stack.py up --folder "$(STACK)" $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) \
		$(if $(BASE),--base $(BASE))

down: setup ## end the local stack; what it keeps stays
	@$(BIN)/python infra/local/stack.py down --folder "$(STACK)"

status: setup ## say how the local stack is; exit status 1 unless all is well
	@$(BIN)/python infra/local/stack.py status --folder "$(STACK)"

jobs: setup ## run the pipeline on the stack, each stage a Ray job [DATASET=textures, the demo's]
	@infra/local/jobs.sh "$(STACK)" "$(DATASET)" "$(CURDIR)/$(BIN)"

docs: setup ## build the documentation site in dist/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: setup ## check style, types and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup lint ## run all tests; what fails beside others is run once more, alone
	$(BIN)/python -m pytest --numprocesses 3 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder || \
		{ [ $$? -eq 1 ] && echo "once more, alone:" && $(BIN)/python -m pytest --last-failed --last-failed-no-failures none --exitfirst; }
