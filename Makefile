# Two commands: `make demo` shows what latentforge does, `make test` shows that it works.
# Each sets up .venv first. PYTHON=python3.12 picks another interpreter (3.10 or newer).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SUITE = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test thorough check docs rehearsal slow hostile optimum clean

demo: $(VENV)/ready  ## build the demo checkpoint, run it, time it, leave a page
	$(BIN)/latentforge demo demo-output

test: $(VENV)/ready check  ## lint, types and the test suite
	$(SUITE) --durations=25

thorough: $(VENV)/ready  ## what the test suite shows, for further families, targets and processes
	$(SUITE) -m thorough

check: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/ready  ## build the documentation as a site, in site/
	$(BIN)/mkdocs build --strict --quiet

rehearsal: $(VENV)/ready  ## the script for GPUs, on the CPU with tiny sizes: five minutes
	$(BIN)/python benchmarks/gpu.py --dry-run --output gpu-rehearsal

slow: $(VENV)/ready  ## full-size models: minutes and gigabytes each
	$(BIN)/python -m pytest -m slow

hostile: $(VENV)/ready  ## damaged and hostile inputs by the thousand, and kills: see docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load -m slow tests/hostile

optimum: $(VENV)/ready  ## beside optimum-onnx, in a second environment that this makes: minutes
	$(BIN)/python -m pytest -m optimum

$(VENV)/ready: pyproject.toml demo/pyproject.toml distributions/torch/pyproject.toml constraints.txt hatch_build.py $(wildcard runtime/kernels/*.cpp runtime/kernels/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' --editable ./distributions/torch --editable ./demo
	touch $@

clean:
	rm -rf $(VENV) .venv-optimum .venv-peers demo-output gpu-rehearsal dist site
