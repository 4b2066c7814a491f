# Every target sets up its own environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder
STAMP := $(VENV)/.installed

.PHONY: install lint check test demo bench peers lock clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

lint: install  ## lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint  ## the same, and the fast tests
	$(PYTEST) -m "not ray and not slow and not gpu and not s3"

test: install  ## every test that this machine can run
	$(PYTEST)

demo: install  ## the whole story on images that the project draws itself
	$(BIN)/iab-vision demo

bench: install  ## the benchmarks that need no data and finish within minutes; each prints its own table
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/classify_throughput.py

peers: install  ## an environment for the peers that benchmarks/peers.py compares with
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet 'daft>=0.7,<0.8' onnxruntime pillow numpy

lock: install  ## requirements.lock: what the image installs on Linux, x86-64, by hash; torch comes from its own index
	$(BIN)/python -m pip install --quiet uv
	echo "torch; python_version < '3'" | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --constraints constraints.txt --overrides - \
	  --index-url https://pypi.org/simple --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .venv-peers demo-output
