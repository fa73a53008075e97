# Two commands do everything on a fresh machine: `make demo` (the main job) and `make test` (the whole test suite).
#
#   make demo                      install, obtain Fashion-MNIST, train, write runs/demo/report.html
#   make demo TORCH_INDEX=URL      the same, with torch from an index of CPU wheels
#   make test                      lint, types, all tests, the wheel; CI runs this and `make flower`
#   make flower                    deployments: an environment of its own with Flower, which needs older packages than we do
#   make faults                    the same with killed nodes and servers; a quarter of an hour, not in CI
#   make lint | docs | fast | slow parts of it; `make docs` leaves the pages in site/
#   make format                    mend what the linter can mend
#   make experiments               repeat the experiments of docs/results.md (hours; resumable)
#   make clean                     remove what was made here

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test flower faults lint docs fast slow wheel format experiments clean

help:
	@sed -n '3,13s/^# *//p' Makefile

# A torch that $(PYTHON) already has is used as it is; otherwise the constrained version is installed.
$(VENV)/bin/python:
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    echo "using the installed torch"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	    grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	    $(PYTHON) -m venv $(VENV); cp constraints.txt $(VENV)/constraints.txt; \
	    if [ -n "$(TORCH_INDEX)" ]; then $(BIN)/pip install --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' constraints.txt)"; fi; \
	fi

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.run
	$(BIN)/fedtail demo --output $(DEMO)

test: lint docs fast slow wheel

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/codespell src docs examples experiments README.md CHANGELOG.md CONTRIBUTING.md

# A page that is not in the contents, or a link that leads nowhere, is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fast: $(VENV)/.dev
	$(BIN)/pytest -m 'not slow' -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=95

slow: $(VENV)/.dev
	$(BIN)/pytest -m slow -n 2 --dist loadfile --durations=5

# A real federation of processes on loopback: the simulator's bits, and the recipe of docs/deployment.md as it stands; some
# minutes. A torch that $(PYTHON) already has is used as it is.
FLOWER := .venv-flower/bin
$(FLOWER)/.done: pyproject.toml constraints-flower.txt
	$(PYTHON) -m venv --system-site-packages .venv-flower
	$(FLOWER)/pip install --quiet --disable-pip-version-check -c constraints-flower.txt -e '.[flower,privacy]' pytest hypothesis
	@touch $@

flower: $(FLOWER)/.done
	$(FLOWER)/python -m pytest tests/test_flower.py tests/test_flower_engine.py tests/test_flower_privacy.py --durations=5

# The same under faults: killed nodes and servers, nodes that hang, lie or are strangers; a quarter of an hour, not in CI.
faults: $(FLOWER)/.done
	$(FLOWER)/python -m pytest tests/test_flower_faults.py --durations=10

# The wheel is what users install: build it, and run it from a folder of its own.
wheel: $(VENV)/.dev
	rm -rf dist && $(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target dist/site dist/*.whl
	cd dist && PYTHONPATH=site ../$(BIN)/python -c "import fedtail; assert 'dist/site' in fedtail.__file__, fedtail.__file__"
	cd dist && PYTHONPATH=site ../$(BIN)/python -m fedtail run --rounds 1 --output from-wheel

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

experiments: $(VENV)/.run
	$(BIN)/fedtail data get fashion-mnist
	$(BIN)/fedtail run experiments/fashion_mnist_lt.toml --output runs/longtail_images
	$(BIN)/fedtail run experiments/fashion_mnist_lt_why.toml --output runs/longtail_images
	$(BIN)/fedtail data get cifar10
	$(BIN)/fedtail run experiments/cifar10_lt.toml --output runs/longtail_images
	$(BIN)/fedtail run experiments/cifar10_lt_resnet8.toml --output runs/longtail_images

clean:
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache .hypothesis .coverage
