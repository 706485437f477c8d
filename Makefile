# demo, test, check, bench, faults: each sets up what it needs in .venv, and needs python3 (3.11 or newer).
# A stamp in .venv remembers what is installed, so only the first call takes minutes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions for Python 3.11, the pair that is tested; newer Pythons take the newest releases.
PINS = $(shell $(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info < (3, 12) else "")')
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS)

.PHONY: demo test check bench faults nano clean

demo: $(VENV)/.installed-core
	$(BIN)/python -m qwenvl_jax.cli.main demo --output demo.png

# ARGS goes to pytest: make test ARGS="tests/test_prompt.py -k boxes"
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

# Hours and tens of gigabytes of disk at full size: each script's first lines say what it takes.
bench: $(VENV)/.installed-bench
	@for script in benchmarks/*.py; do echo "$$script" && $(BIN)/python $$script || exit 1; done

# Kills, starves and misleads a small training run, and prints what came of it: docs/reliability.md.
faults: $(VENV)/.installed-test
	$(BIN)/python tests/faults.py $(ARGS)

# Trains the small model again, into runs/nano, and scores it: docs/nano.md says how long it takes, and
# which two Debian packages it needs.
nano: export PYTHON := $(BIN)/python
nano: $(VENV)/.installed-generate
	@for stage in stage0_text stage0_sight stage0_tell stage1 stage2 stage2_longer stage3 \
	  stage2_again stage3_again; do \
	  $(BIN)/python train.py configs/nano/$$stage.py || exit 1; done
	test -d runs/nano/drawn || $(BIN)/python convert.py import runs/nano/stage3_again runs/nano/drawn
	test -d runs/nano/wide_start || $(BIN)/python convert.py vocabulary \
	  runs/nano/drawn configs/nano/wide.tiktoken runs/nano/wide_start
	for rows in train cells named more asked pairs dialogue heldout exam fresh fresh_pairs fresh_chat letters related pages signs lines close last last_pairs counted whole whole_pairs boxed level; do \
	  configs/nano/rows.sh $$rows || exit 1; done
	@for stage in stage2_wide stage2_cells stage3_wide stage2_longer_cells stage2_last_cells \
	  stage2_named stage2_pairs; do \
	  $(BIN)/python train.py configs/nano/$$stage.py || exit 1; done
	test -d runs/nano/paired || $(BIN)/python convert.py import runs/nano/stage2_pairs runs/nano/paired
	test -d runs/nano/finer_start || $(BIN)/python convert.py queries runs/nano/paired 36 runs/nano/finer_start
	@for stage in stage2_finer stage2_read stage2_pages stage2_signs stage2_lines stage2_close stage2_last stage2_counted; do \
	  $(BIN)/python train.py configs/nano/$$stage.py || exit 1; done
	test -d runs/nano/counted || $(BIN)/python convert.py import runs/nano/stage2_counted runs/nano/counted
	test -d runs/nano/patches_start || $(BIN)/python convert.py queries runs/nano/counted 64 runs/nano/patches_start
	@for stage in stage2_patches stage2_boxed stage2_level; do \
	  $(BIN)/python train.py configs/nano/$$stage.py --model.dtype float32 || exit 1; done
	$(BIN)/python -m qwenvl_jax.cli.main eval --model runs/nano/stage2_level
	$(BIN)/python -m qwenvl_jax.cli.main eval --model runs/nano/stage2_level \
	  --rows $(addprefix runs/nano/rows/heldout/,scenes animals food english chinese) --num-rows 1000
	$(BIN)/python -m qwenvl_jax.cli.main eval --model runs/nano/stage2_level \
	  --rows $(addprefix runs/nano/rows/exam/,animals food) --num-rows 4000

clean:
	rm -rf $(VENV) build demo.png

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qwenvl-jax needs Python 3.11 or newer: got $$($(PYTHON) --version 2>&1); run 'make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'"; exit 2; }
	@echo "setting up $(VENV): the first time this downloads jax and takes a few minutes"
	@$(PYTHON) -m venv $(VENV) || { echo "python has no venv module: on Debian and Ubuntu install python3-venv"; exit 2; }
	@touch $@

$(VENV)/.installed-core: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[$*]'
	@touch $@
