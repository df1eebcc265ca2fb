# Two variables may be given: PYTHON (3.11 or newer) and PIP_ARGS.
#
# On Linux the torch of PyPI brings about 3 GB of CUDA packages. On a machine without a GPU spare
# them with PyTorch's index of CPU builds, whose address its install page gives:
#   make install PIP_ARGS="--extra-index-url ADDRESS"
PYTHON ?= python3
PIP_ARGS ?=
MODEL ?=
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.DELETE_ON_ERROR:
.PHONY: help demo up test fuzz-rest simulate bench lint types imports protos protos-check docs \
        install install-dev model gateway gateway-protos clean

help: ## What can be asked of make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16
	@echo
	@echo 'Arguments are passed on: make demo ARGS="--decode 2", make test ARGS="-k cluster -x"'

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit("Tandem needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(PIP) -e '.[torch,plot]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[torch,plot,peer,nixl,ucx,gateway,dev]'
	@touch $@

install: $(VENV)/.installed ## What is needed to serve
install-dev: $(VENV)/.installed-dev ## What is needed to develop and test

model: install ## The newcomer's model, fetched and checked
	$(BIN)/tandem models fetch

demo: install ## The whole system, once: prefill and decode apart (MODEL=tiny-deepseek: experts apart, too)
	$(BIN)/tandem demo $(if $(MODEL),--model $(MODEL)) $(ARGS)

up: install model ## A cluster on this machine, until Ctrl-C
	$(BIN)/tandem up $(ARGS)

test: install-dev model ## All tests (ARGS="-n 2": in two processes)
	$(BIN)/python -m pytest $(ARGS)

fuzz-rest: install-dev ## 5,000 requests made of the OpenAPI document, for a whole cluster (ARGS="--seed 2")
	$(BIN)/python -m tests.conformance.fuzz $(ARGS)

simulate: install-dev ## Seeded histories: the tests that play them, or SEEDS=N whole clusters on JOBS=2 cores
	$(BIN)/python -m $(if $(SEEDS),tests.simulation.cluster_world --seeds $(SEEDS) --jobs $(JOBS),pytest tests/simulation) $(ARGS)

bench: install model ## What disaggregation costs here (ARGS=memory: whether memory stays flat)
	$(BIN)/tandem bench $(or $(ARGS),disagg)

lint: install-dev ## ruff, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python protos/generate.py --describe out/protos.binpb
	$(BIN)/buf lint out/protos.binpb
	$(BIN)/buf format --diff --exit-code protos

types: install-dev ## mypy --strict
	$(BIN)/mypy

imports: install-dev ## Who may import whom
	$(BIN)/lint-imports

gateway: install ## The HTTP gateway, out/gateway/tandem-gateway (ARGS=--modules: by go.mod)
	$(PIP) -e '.[gateway]'
	$(BIN)/python deploy/gateway/build.py $(ARGS)

gateway-protos: install-dev ## Regenerate what the gateway has from the protos
	$(BIN)/python deploy/gateway/build.py --generate

protos: install-dev ## Regenerate protos/gen
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py

protos-check: install-dev ## What is checked in is what would be generated
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py --check
	@# Status 3: no generators for Go can be had on this machine. CI has them.
	$(BIN)/python deploy/gateway/build.py --check || [ $$? -eq 3 -a -z "$$CI" ]

docs: install ## Rewrite docs/settings.md and docs/errors.md from the code
	$(BIN)/python -m cli.docs

clean: ## Remove what make made
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
