# Two commands do all the set-up on a machine that has nothing but Python >= 3.10:
#   make demo     the quickstart, executed in a real Jupyter kernel
#   make test     everything that is checked before a change lands
PYTHON ?= python3
VENV   ?= .venv
XLA_VENV ?= .venv-xla
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check

# Notebooks run in this environment's kernel, not in one of the same name in the home folder.
export JUPYTER_PREFER_ENV_PATH := 1

# JupyterLab refuses to run as root (containers) unless told.
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/notebooks/sanitize.cfg
# Two workers: much of the suite waits for processes. A file's tests stay together, with what they share.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# On all cores; a third less without what hardly anybody imports.
COMPILED := -qq -j 0 -x '/(tests?|databricks|plotly|transformers/models)/'

.DEFAULT_GOAL := help
.PHONY: help demo lab test test-browser test-ipykernel6 test-xla chromium test-fast test-long test-gpu lint bench bench-quick docs binder-check outputs clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.nbaccel-demo  ## execute the quickstart on 2 ranks; leaves it under build/
	$(PY) notebooks/execute.py notebooks/quickstart.ipynb --out build

# JupyterLab's question about news would cover the first cells: it is answered no, in this environment only.
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings
lab: $(VENV)/.nbaccel-demo  ## open JupyterLab on the quickstart
	@mkdir -p $(LAB_SETTINGS)
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' >$(LAB_SETTINGS)/overrides.json
	$(PY) -m jupyter lab $(ALLOW_ROOT) --ServerApp.root_dir=. $(LAB_OPTIONS) notebooks/quickstart.ipynb

test: lint chromium  ## lint, types, unit, integration, a browser, notebooks with their stored outputs
	$(PY) -m pytest tests notebooks $(NBVAL) $(PARALLEL) -m "not alone and not long"
	$(PY) -m pytest tests -m alone

test-browser: $(VENV)/.nbaccel-test chromium  ## the panel in a real JupyterLab; screenshots under build/
	@mkdir -p build/screenshots
	NBACCEL_SHOTS=build/screenshots $(PY) -m pytest tests/browser

test-ipykernel6: $(VENV)/.nbaccel-test chromium  ## the same on the older kernel, by hand: three minutes
	$(PIP) install -q --no-deps --target build/ipykernel6 'ipykernel<7'
	NBACCEL_KERNEL=$(CURDIR)/build/ipykernel6 $(PY) -m pytest tests/browser/test_panel.py

# The browser tests are skipped, and say so, where it cannot be installed.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	  echo "no Chromium here: the browser tests will be skipped"

test-fast: $(VENV)/.nbaccel-test  ## the tests for the inner loop: nothing marked slow
	$(PY) -m pytest tests -m "not slow and not long and not gpu" -x -q

test-long: $(VENV)/.nbaccel-test  ## the acceptance counts (hundreds of faults, kills and stops), before a release
	$(PY) -m pytest tests $(PARALLEL) -m long

test-gpu: $(VENV)/.nbaccel-test  ## the tests that need a CUDA device (skipped with a reason without one)
	$(PY) -m pytest tests -m gpu || [ $$? -eq 5 ]

test-xla: $(XLA_VENV)/.nbaccel-xla  ## the TPU code on torch_xla's CPU device, in an environment of its own
	PJRT_DEVICE=CPU $(XLA_VENV)/bin/python -m pytest tests/xla

lint: $(VENV)/.nbaccel-test  ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy -n 2 || $(PY) -m mypy  # it crashes now and then when it works in parallel

bench: $(VENV)/.nbaccel-test  ## the figures of the README, beside the peers (half an hour)
	$(PY) benchmarks/launch.py --out build/bench
	$(PY) benchmarks/session.py --out build/bench

bench-quick: $(VENV)/.nbaccel-test  ## the same, a few minutes, rough
	$(PY) benchmarks/launch.py --quick --out build/bench

docs: $(VENV)/.nbaccel-docs  ## the documentation's site, into build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

binder-check:  ## build what mybinder.org builds in a fresh environment and execute the quickstart in it
	PYTHON=$(PYTHON) bash binder/check

outputs: $(VENV)/.nbaccel-demo  ## execute the notebooks and store their outputs in place
	$(PY) notebooks/execute.py notebooks/*.ipynb --in-place

clean:  ## remove what was built (not the environment)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find nbaccel tests benchmarks notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf $(VENV) $(XLA_VENV)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nbaccel needs Python 3.10 or newer; this is %s. Try: make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python could not make a virtual environment (Debian and Ubuntu: apt install python3-venv)"; exit 1; }

# The stamps make a second run quick; they are stale when what is asked for changes.
# Three minutes less: a new pip chooses versions sooner, and all is compiled at once, not file after file.
$(VENV)/.nbaccel-%: pyproject.toml constraints.txt | $(PY)
	@echo "Installing into $(VENV): torch and what the notebooks use; a few minutes the first time."
	$(PIP) install -q --upgrade pip
	$(PIP) install --no-compile -c constraints.txt -e '.[$*]'
	@$(PY) -m compileall $(COMPILED) $(VENV)/lib/python3.*/site-packages || true  # some hold files of other Pythons
	@touch $@

# torch_xla 2.9 has wheels for Linux on x86-64 and Python 3.10 to 3.13 only.
$(XLA_VENV)/.nbaccel-xla: $(wildcard tests/xla/environment/*)
	@echo "Installing torch 2.9 with torch_xla into $(XLA_VENV): 1 GB, a minute or two the first time."
	@command -v gcc >/dev/null && command -v nm >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq gcc libc6-dev binutils >/dev/null; } || \
	  { echo "test-xla needs gcc and nm (Debian and Ubuntu: apt install gcc binutils)"; exit 1; }
	@test -x $(XLA_VENV)/bin/python || $(PYTHON) -m venv $(XLA_VENV)
	$(XLA_VENV)/bin/python -m pip --disable-pip-version-check install -q --upgrade pip
	$(XLA_VENV)/bin/python -m pip install -q --no-compile --no-deps -r tests/xla/environment/wheels.txt -e .
	$(XLA_VENV)/bin/python -m pip install -q --no-compile -r tests/xla/environment/requirements.txt
	@$(XLA_VENV)/bin/python -m compileall $(COMPILED) $(XLA_VENV)/lib/python3.*/site-packages || true
	$(XLA_VENV)/bin/python tests/xla/environment/stand_ins.py
	@touch $@
