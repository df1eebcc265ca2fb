PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types imports protos protos-check install install-dev model bench clean help

help: ## What can be asked of make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tandem needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,plot]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,plot,peer,dev]'
	touch $@

install: $(VENV)/.installed ## What is needed to serve
install-dev: $(VENV)/.installed-dev ## What is needed to develop and test

model: install ## The newcomer's model, fetched and checked
	$(BIN)/tandem models fetch

demo: install ## The whole system: a real model, prefill and decode apart, a streamed answer
	$(BIN)/tandem demo $(ARGS)

test: install-dev model ## All tests
	$(BIN)/python -m pytest $(ARGS)

lint: install-dev ## ruff, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

types: install-dev ## mypy --strict
	$(BIN)/mypy

imports: install-dev ## Who may import whom
	$(BIN)/lint-imports

protos: install-dev ## Regenerate protos/gen
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py

protos-check: install-dev ## What is checked in is what would be generated
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py --check

clean: ## Remove what make made
	rm -rf $(VENV) out build dist
