PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test test-slow smoke check format notebooks clean

demo: $(STAMP)  ## train, predict and evaluate on embedded data, in at most 8 minutes on two CPU cores
	rm -rf runs/demo
	$(BIN)/kanseg demo -o runs/demo

test: $(STAMP)  ## the whole suite but the slow tests, a process a core
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

smoke: $(STAMP)  ## a minute of everything
	rm -rf runs/smoke
	$(BIN)/kanseg demo -o runs/smoke --minutes 0.3

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMP)  ## run the notebooks and keep what they show, 10 minutes on two CPU cores
	rm -rf runs/notebooks && mkdir -p runs/notebooks && cp notebooks/*.ipynb runs/notebooks
	cd runs/notebooks && PYTHONWARNINGS=ignore ../../$(BIN)/jupyter execute --inplace *.ipynb
	cp runs/notebooks/*.ipynb notebooks

$(STAMP): setup.cfg setup.py pyproject.toml $(wildcard kanseg/layers/kernels/cpp/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
