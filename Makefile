# Two commands do all the set-up: `make demo` runs the main job on a real model, `make test` passes the tests.
# Needed: Python 3.11 or newer with venv and pip, make, about 3 GB of disk. Nothing is installed outside .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-triton interop check benchmark benchmark-convert clean

demo: .venv/ready
	$(BIN)/python scripts/demo.py

# Compiled first: hundreds of processes start, and some machines do not let them keep what they compile. Three at a time
# on two cores: tests wait, too, for a disk, a server or the end of another process.
test: .venv/ready
	scripts/check
	$(BIN)/python -m compileall -q quantkit
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Minutes and gigabytes: the real 135M model against its peers, large files, many kills, the page of commands.
test-slow: .venv/ready
	$(BIN)/python scripts/demo.py --model-only
	$(BIN)/python -m pytest -m slow

# The kernels for GPUs, on one, or in Triton's interpreter (200 MB under .interop).
test-triton: .venv/ready .interop/triton/ready
	PYTHONPATH=.interop/triton/lib $(BIN)/python -m pytest tests/kernels/test_columns_triton.py

.interop/triton/ready:
	$(BIN)/python -m pip install --quiet --no-deps --target .interop/triton/lib triton==3.9.0
	touch $@

# Real loaders of GPTQ folders, each in an environment of its own under .interop (about 5 GB), read what we write.
interop: .venv/ready .interop/gptqmodel/ready .interop/autogptq/ready .interop/llmcompressor/ready .interop/exllamav2/ready .interop/lmeval/ready \
		.interop/mistral/ready
	$(BIN)/python -m pytest -m interop tests/interop

.interop/%/ready: tests/interop/requirements/%.txt
	$(PYTHON) -m venv .interop/$*
	.interop/$*/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

check: .venv/ready
	scripts/check

benchmark: .venv/ready
	$(BIN)/python benchmarks/bnb_7b.py

benchmark-convert: .venv/ready
	$(BIN)/python benchmarks/convert_7b.py

# Compiled by all cores, what pip would do by one; torch has a file for later Pythons, which does not compile.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

clean:
	rm -rf .venv .demo .interop
