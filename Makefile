# `make demo` and `make test` work on a bare Debian 12: they install what is missing (as root), keep the Python
# environment in .venv, and build the guest bundle once. The work is done by scripts/install-deps and noxfile.py.

PYTHON ?= python3
PIP = 26.3
DEMO_IMAGE = images/debian-python

.PHONY: demo test lint docs bench setup deps test-deps bundle clean

demo: setup bundle $(DEMO_IMAGE)
	@echo "==> examples/quickstart.py"
	@.venv/bin/python examples/quickstart.py
	@echo "==> pykata run"
	.venv/bin/pykata run ./$(DEMO_IMAGE) -- python3 -c 'import platform; print("a kernel of its own:", platform.release())'

test: test-deps setup bundle $(DEMO_IMAGE)
	.venv/bin/nox

lint: setup
	.venv/bin/nox --sessions lint types

docs: setup
	.venv/bin/nox --sessions docs

bench: setup bundle
	.venv/bin/nox --sessions bench

setup: deps .venv/installed

deps:
	@scripts/install-deps

test-deps:
	@scripts/install-deps test

.venv/installed: pyproject.toml
	@echo "==> the Python environment: .venv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pykata needs Python 3.11 or newer: make PYTHON=...")'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check pip==$(PIP)
	@.venv/bin/python -m pip install --quiet --editable . --group dev
	@touch $@

# Cached by the content of its sources: the second time is instant.
bundle: setup
	@echo "==> the guest bundle (the first build compiles a kernel: some minutes)"
	@.venv/bin/pykata guest build

$(DEMO_IMAGE): | setup
	@echo "==> the demo image: $@"
	@.venv/bin/python scripts/make_demo_image.py $@

clean:
	rm -rf .venv .nox images docs/_build dist build
