# make demo: the whole way on a synthetic stack.  make lint: ruff and mypy.
# make test: the suite without the slow tests.  make test-all: with them.
# make torture: kills, power cuts, full disks, damaged files and wrong commands, 25 minutes.  make torture-quick: 2 minutes.
PYTHON ?= python3
BIN := .venv/bin
DEMO := --name_data demo --gpu_ids -1

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all torture torture-quick lint clean

demo: .venv/.installed
	$(BIN)/python run_make_database.py --name_data demo --synthetic 20 --num_test 3 --overwrite
	$(BIN)/python main.py --mode train $(DEMO) --nch_ker 16 --ny_load 192 --nx_load 192 --num_epoch 30
	$(BIN)/python main.py --mode test $(DEMO)
	$(BIN)/python display_result.py --name_data demo
	@echo
	@echo "Look at  results/unet/demo/index.html  and  results/unet/demo/figure.png"
	@echo "Curves:  $(BIN)/tensorboard --logdir ./log/unet/demo"

test: .venv/.installed-dev
	$(PYTEST) -m "not slow"

test-all: .venv/.installed-dev
	$(PYTEST)

torture: .venv/.installed-dev
	$(BIN)/python tests/torture/run.py

torture-quick: .venv/.installed-dev
	$(BIN)/python tests/torture/run.py --quick

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit('error: Python 3.11 or newer is needed: make PYTHON=python3.11' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv
