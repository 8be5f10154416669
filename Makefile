# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
# Each makes .venv, or uses the one that is there.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(VENV)/bin/agft-ray demo configs/simulated.yaml $(DEMO_ARGS)

test: $(STAMP) lint
	$(VENV)/bin/python -m pytest $(TEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(VENV)/bin/agft-ray bench decision
	$(VENV)/bin/agft-ray bench overhead

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
