# make generate: install, draw a grid of images    make check: lint, format, types
# make test:     install, run the tests            make bench: the documents' speed figures
# make results:  rewrite docs/results.md's tables and plot; TRAIN=1 trains first (hours), TIMES=1 times again,
#                SET=avatars-64 and ONLY="shortcut-8 flow" select
# make soak:     tests of many minutes: kills, damaged files, all heads in all formats, the demo under load
# make wheel:    build dist/, which `pip install` takes
# make matrix:   the tests under each installed Python from 3.10 to 3.13
# make test-avx2: make test without AVX-512 and AMX instructions
# make notebook: run notebooks/quickstart.ipynb in place    make lock: rewrite requirements.lock from PyPI
# make docs:     the documentation as a site, in site/
# make train-small: render images, train a small model of your own and draw from it, in under half an hour

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: generate test test-avx2 soak check wheel matrix notebook lock bench results train-small docs

generate: $(VENV)/installed
	$(BIN)/far generate --weights avatars-64 --count 64 --out samples.png

test: $(VENV)/installed-dev $(VENV)/browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# One variable each for torch, oneDNN and fbgemm.
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: export FBGEMM_ENABLE_INSTRUCTIONS = AVX2
# torch.compile would reuse code that it compiled for other instructions.
test-avx2: export TORCHINDUCTOR_CACHE_DIR = $(abspath $(VENV))/compiled-avx2
test-avx2: test

soak: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.13

wheel: $(VENV)/installed-dev
	rm -rf dist
	$(BIN)/python -m build

matrix: wheel
	.ci/matrix dist/*.whl

notebook: $(VENV)/installed-dev
	$(BIN)/jupyter-execute --inplace notebooks/quickstart.ipynb

lock: $(VENV)/installed
	$(PIP) uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
		--constraint constraints.txt --custom-compile-command "make lock" \
		--default-index https://pypi.org/simple --output-file requirements.lock pyproject.toml

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.training_step --batch-size 8
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.speed_report

results: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.results $(if $(TRAIN),--train) $(if $(SET),--set $(SET)) $(if $(ONLY),--only $(ONLY))
	$(if $(SET)$(ONLY),,$(BIN)/python -m benchmarks.causal_ablation $(if $(TRAIN),--train))
	$(if $(TIMES),$(BIN)/python -m benchmarks.results_times $(if $(SET),--set $(SET)) && $(BIN)/python -m benchmarks.results)

train-small: $(VENV)/installed-dev
	$(BIN)/far data avatars data/avatars-32 --size 32 --per-class 1500 --held-out-per-class 125
	$(BIN)/far train-autoencoder avatars-32 --resume
	$(BIN)/far cache avatars-32
	$(BIN)/far train avatars-32 --resume
	$(BIN)/far generate --weights runs/avatars-32/model --count 64 --out runs/avatars-32/samples.png

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/browser: $(VENV)/installed-dev
	.ci/install-browser $(BIN)/python
	touch $@
