# Every habit of the project, by name; CI runs lint, types, test and browser. Needs make and Python 3.11+ with venv and pip.
#   make demo                       segment the sample cases into demo/
#   make PYTHON=python3.12 test     with another Python
#   make clean                      remove all that these made, .venv included

PYTHON ?= python3
VENV   := .venv
LOWEST := .venv-lowest
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -qq --disable-pip-version-check

# Those that need no data from outside the clone; docs/benchmarks.md has all.
BENCHMARKS := preprocessing inference evaluation large_volume
# Folder of the rival's environment, made there if need be: make bench RIVAL_ENV=/opt/nnunetv2
RIVAL_ENV  := benchmarks/.rival-env

.PHONY: help demo test browser cluster gpu lint types lowest fuzz image bench clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/.demo-installed ## segment the sample cases, with pictures, into demo/ (minutes, no GPU needed)
	@$(PY) process.py --input test/sample/input --output demo --preset fast --report

# A file of tests to each process, with a thread each: threads beside processes would wait for each other.
test: $(VENV)/.dev-installed ## pytest, all but what needs a GPU or a browser, on up to four cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not gpu and not browser"

browser: $(VENV)/.dev-installed ## the report's pages in Chromium (apt-get install chromium)
	$(PY) -m pytest -q -m browser

cluster: $(VENV)/.dev-installed ## scans and trainings on real nodes of a Ray cluster of this machine
	$(PIP) -r requirements-cluster.txt
	OMP_NUM_THREADS=1 $(PY) -m pytest -q test/app/test_ray.py test/jobs/test_cluster.py

gpu: $(VENV)/.dev-installed ## what needs a GPU: its tests, then training and inference against plain torch
	PYTHON=$(PY) benchmarks/gpu.sh --out benchmarks/.gpu

lint: $(VENV)/.dev-installed ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev-installed ## mypy: strict on what ships, default on training
	$(VENV)/bin/mypy ichseg process.py training phantom

# torch is the pinned one: an older one has to be chosen by Python's version and the GPU's driver.
lowest: ## tests of inference with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv $(LOWEST)
	grep -oE '"[A-Za-z0-9]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | grep -vE '^(torch|hatchling|ray)==' > $(LOWEST)/lowest.txt
	grep -E '^(pytest|hypothesis|nibabel)==' requirements-dev.txt >> $(LOWEST)/lowest.txt
	grep '^torch==' requirements.txt >> $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pytest -q -m "not gpu and not browser" test/scan test/model test/engine test/predict \
		--ignore test/predict/test_resample.py --ignore test/predict/test_prepare.py  # their references are other packages

fuzz: $(VENV)/.dev-installed ## thousands of damaged and hostile input files, then coverage-guided ones
	PYTHONPATH=.:test $(PY) test/robustness/fuzz.py --each 2000 --seed 2
	$(PIP) atheris==3.0.0
	PYTHONPATH=.:test $(PY) test/robustness/fuzz_coverage.py -max_total_time=60 -rss_limit_mb=2000

image: ## build the container image (./build.sh --help)
	./build.sh

bench: $(VENV)/.dev-installed ## measure against nnunetv2 (the first time installs it: gigabytes)
	@failed=0; for name in $(BENCHMARKS); do \
		echo "== $$name"; PYTHONPATH=. $(PY) benchmarks/$$name.py --rival-env $(RIVAL_ENV) || failed=1; \
	done; exit $$failed

clean: ## remove .venv, demo/, export/, caches
	rm -rf $(VENV) $(LOWEST) demo export dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# pip is looked for too: a Python without ensurepip leaves half an environment behind.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch goes first and alone: by far the largest, and with it in place nothing that follows picks another build of it.
$(VENV)/.demo-installed: requirements.txt | $(PY)
	@echo "Installing requirements.txt (the first time takes minutes: torch is large)"
	@$(PIP) "$$(grep '^torch==' requirements.txt)"
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev-installed: requirements-dev.txt requirements-dicom.txt training/requirements.txt $(VENV)/.demo-installed
	@echo "Installing requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt
	@touch $@
