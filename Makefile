VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: quickstart jax-example test lint format clean

quickstart: $(VENV)/.installed
	$(BIN)/olmo-optim pretrain configs/quickstart.yaml

jax-example: $(VENV)/.installed-jax
	$(BIN)/python examples/jax_gpt.py

test: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[compare]'
	touch $@

$(VENV)/.installed-jax: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[jax-example]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,oracles,compare,slurm]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-jax

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache
