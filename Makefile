# Parley. `make` alone lists the targets. Those that need something install it first, and are instant if nothing lacks.

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON := .venv/bin/python
STACK := $(PYTHON) -m infra.local.stack
# How many of each service: make up API=2 STORE=2 WORKER=3. Empty = as many as now, at first one.
REPLICAS = --api="$(API)" --store="$(STORE)" --worker="$(WORKER)"
UP_STEPS := 7
# All tests are shared by several processes; chosen ones run in one, so that what they print is seen as it comes.
CHOSEN = $(or $(ARGS),-n auto)

SPEED := 1

.PHONY: help up down status logs parley demo test check test-clients retrieval chaos compose-up compose-down

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: ## start everything without containers (API=2 STORE=2 WORKER=3 to choose how many)
	@STEPS=$(UP_STEPS) infra/local/bootstrap.sh up
	@$(STACK) up --first-step=3 $(REPLICAS)

demo: ## make up, then a real conversation, streamed to the terminal (MESSAGE="..." to choose what is said)
	@STEPS=$(UP_STEPS) infra/local/bootstrap.sh up
	@$(STACK) demo --first-step=3 $(REPLICAS) $(if $(MESSAGE),--message="$(MESSAGE)")

down: ## stop everything that make up has started; the data stays in .parley
	@[ ! -d .parley ] || [ ! -x $(PYTHON) ] || $(STACK) down

status: ## what runs, and whether it is ready
	@[ -x $(PYTHON) ] || { echo "nothing is installed yet: make up"; exit 1; }
	@$(STACK) status

logs: ## the ends of all logs; on a terminal, what comes next too
	@[ -x $(PYTHON) ] || { echo "nothing is installed yet: make up"; exit 1; }
	@$(STACK) logs

parley: ## the operator's command line, on what make up has started (ARGS="dead-letters list")
	@if [ -z "$$PARLEY_AMQP_URL$$PARLEY_AMQP_URL_FILE" ]; then \
	  export PARLEY_AMQP_URL_FILE=.parley/secrets/amqp-url-cli; \
	  [ -f "$$PARLEY_AMQP_URL_FILE" ] || { echo "nothing is up: make up"; exit 1; }; \
	fi; $(PYTHON) -m services.cli $(ARGS)

test: ## the tests, on real RabbitMQ and MongoDB (ARGS="tests/broker -k name" to choose some)
	@infra/local/bootstrap.sh test
	@$(PYTHON) -m pytest $(CHOSEN)

check: ## what CI runs: lint, format, types, import contracts, tests
	@infra/local/bootstrap.sh test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports
	$(PYTHON) -m pytest $(CHOSEN)

test-clients: ## other people's clients, unmodified, against the whole stack (ARGS="-k openai" chooses)
	@STEPS=4 infra/local/bootstrap.sh clients
	$(PYTHON) -m pytest tests/clients -m clients $(CHOSEN)

retrieval: ## how well and how fast passages are found, with a small sentence model (SPEED= leaves out the time)
	@infra/local/bootstrap.sh retrieval
	$(PYTHON) -m pytest -s tests/retrieval -m "$(if $(SPEED),measured or not measured,not measured)"

chaos: ## the fault suite, with figures (SEED=1 repeats its draws, ARGS="-k workers" chooses)
	@PARLEY_TEST_BACKEND=local infra/local/bootstrap.sh test
	@PARLEY_TEST_BACKEND=local SEED="$(SEED)" $(PYTHON) -m pytest tests/faults -m chaos $(ARGS)

compose-up: ## the whole stack in containers: two api replicas, RabbitMQ 4, MongoDB 8
	@python3 -m infra.images.compose up

compose-down: ## stop the containers (ARGS=-v to delete the data too)
	@python3 -m infra.images.compose down $(ARGS)
