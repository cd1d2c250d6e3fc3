# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
# Given on the command line; what the environment says under these names is meant for others.
DATA :=
NAME :=
RECIPE :=
LAYOUT :=
TRIALS :=
HOST := 127.0.0.1
KEYS :=

.PHONY: help setup demo run serve mlflow tracking docs lint test
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
	$(BIN)/sprue serve --host $(HOST) --port $(or $(PORT),8000) $(if $(KEYS),--keys "$(KEYS)")

mlflow: setup ## open the tracking UI on the same store [PORT=5000]
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --host 127.0.0.1 --port $(or $(PORT),5000) \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/store/mlflow/mlflow.db}"

tracking: setup ## keep a tracking server up: MLflow on Postgres, files in an S3 store [PORT=5000]
	$(BIN)/python infra/local/tracking.py --port $(or $(PORT),5000)

docs: setup ## build the documentation site in dist/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: setup ## check style, types and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup lint ## run all tests
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
