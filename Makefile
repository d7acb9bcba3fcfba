# Two commands from a fresh clone do all the set-up:
#   make demo   builds a reference collection from the embedded miniature, segments with it, shows it
#   make test   runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.PHONY: demo test test-all lint docs install clean

demo: install
	@echo "Building a collection from 400 captions: nouns, images, references, index"
	$(BIN)/ovref build --config configs/miniature_fast.yaml output=$(DEMO)
	$(BIN)/ovref status $(DEMO) --pictures $(DEMO)/samples.png
	@echo "Segmenting 200 scenes with it, and with what it is compared with"
	$(BIN)/ovref evaluate --config configs/miniature_evaluate.yaml \
	    collection=$(DEMO)/collection output=$(DEMO)/evaluation

# Whole files are shared out over the cores, at most four: each process holds PyTorch and its
# companions.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check ovref inference pipelines tests docs
	$(BIN)/mypy

# The site, into runs/site: in an environment of its own, without PyTorch.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

$(VENV)-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing ovref and its libraries into $(VENV): some minutes, 9 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[cpu,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs runs
