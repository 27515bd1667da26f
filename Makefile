# make demo   the whole job on the small world, with nothing but Python 3.11+ and make on the machine
# make bench  what we claim about speed, as ratios of one run (minutes)
# make test   formatting, lint, types, import contracts and the default suite
# make test-full  the long proofs too; SDXL_EXPERTS_PILLOW_SOURCE names Pillow's unpacked source where no index gives it
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo-out

# Models come from folders here; nothing is looked for on the network.
export HF_HUB_OFFLINE := 1

.PHONY: demo test check test-full bench clean

demo: .venv/demo.done
	$(BIN)/python -m demo.main_job $(OUT)

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

check: .venv/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-full: .venv/test.done
	$(BIN)/python -m pytest -m "not gpu" --durations=20

bench: .venv/test.done
	$(BIN)/python -m benchmarks.store_read
	$(BIN)/python -m benchmarks.store_share
	$(BIN)/python -m benchmarks.store_size
	$(BIN)/python -m benchmarks.transfer
	$(BIN)/python -m benchmarks.cache_encode
	$(BIN)/python -m benchmarks.cache_build --count 20000
	$(BIN)/python -m benchmarks.train_overhead --cores 0,1
	$(BIN)/python -m benchmarks.start_time
	$(BIN)/python -m benchmarks.service --pictures 200
	$(BIN)/python -m benchmarks.dashboard
	$(BIN)/python -m benchmarks.scale --rows 1000000 --records 100000

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/demo.done: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tensorboard]'
	@touch $@

.venv/test.done: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv demo-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
