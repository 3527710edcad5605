# Each target makes .venv with what it needs, pinned by constraints.txt, and runs.
#
#   make toy     the laptop job: real text to a ByteDMD verdict (results and figures in out/)
#   make test    the whole test suite
#   make check   formatter, linter, types, documentation build
#   make speed   the benchmarks of hashing and of pricing

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: toy test check speed clean

# A stamp per set of extras, so that an installation happens once.
$(VENV)/stamp-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

toy: $(VENV)/stamp-fast,plot
	$(BIN)/python bench/bytedmd_toy.py --out out/toy

test: $(VENV)/stamp-fast,plot,test
	$(BIN)/python -m pytest

check: $(VENV)/stamp-fast,plot,test,lint,docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

speed: $(VENV)/stamp-fast,plot
	$(BIN)/python bench/hashing_speed.py
	$(BIN)/python bench/pricing_speed.py

clean:
	rm -rf $(VENV) build site out *.egg-info
