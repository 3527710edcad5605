# Each target makes .venv with what it needs, pinned by constraints.txt, and runs.
#
#   make toy     the laptop job: real text to a ByteDMD verdict (results and figures in out/)
#   make test    the tests, without the slow ones, which start whole commands, browsers, ranks and compilers
#   make test-slow    those; CI runs both
#   make check   formatter, linter, types, documentation build
#   make redraw  every figure drawn anew and compared with the committed one, half a minute
#   make site    the documentation, in site/; open site/index.html
#   make findings        every result, figure and document of the findings, from nothing; QUICK=1: a small version
#   make corpora reuse and prices on texts of eight other kinds, downloaded for the run; no part of them is kept
#   make speed   the benchmarks of hashing, of pricing, and of pricing rows at production scale
#   make bench-cpu    the hardware benchmark where there is no GPU: RAM against a real file, cold and warm
#   make end-to-end-cpu   a whole tiny model with Engram, served, its overhead taken apart; on a CPU
#   make mutants    random one-place changes of the exact files, each run against its tests; most of an hour
#   make ranges  both ends of the stated ranges of versions, each in an environment of its own; ENDS=newest: one
#   make processors   the tests of floating-point numbers as older processors compute them, on this one
#   make bench-layer  gather, convolution, layer, construction and cold reads against what others do
#   make fuzz    stress: random programs, damaged files, kills, threads, forks, leaks; some ten minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: toy test test-slow check redraw site findings corpora speed bench-cpu end-to-end-cpu bench-layer ranges processors mutants fuzz clean

# A stamp per set of extras, so that an installation happens once.
$(VENV)/stamp-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

toy: $(VENV)/stamp-fast,plot
	$(BIN)/python bench/bytedmd_toy.py --out out/toy

test: $(VENV)/stamp-fast,plot,ref,test,docs
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: $(VENV)/stamp-fast,plot,ref,test,docs
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

check: $(VENV)/stamp-fast,plot,ref,test,lint,docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m zensical build --strict --clean # as a module, so that it finds `bench.site`

redraw: $(VENV)/stamp-fast,plot,ref
	$(BIN)/python bench/fill_docs.py --redraw

site: $(VENV)/stamp-docs
	$(BIN)/python -m zensical build --strict --clean # as a module, so that it finds `bench.site`
	@echo "open site/index.html"

findings: $(VENV)/stamp-fast,plot,ref
	$(BIN)/python bench/findings.py $(if $(QUICK),--quick)

corpora: $(VENV)/stamp-fast,plot,ref
	$(BIN)/python bench/how_far.py other_texts

speed: $(VENV)/stamp-fast,plot
	$(BIN)/python bench/hashing_speed.py
	$(BIN)/python bench/pricing_speed.py
	$(BIN)/python bench/row_speed.py

bench-cpu: $(VENV)/stamp-fast,plot,ref
	$(BIN)/python bench/gpu_wall.py --device cpu --out out/gpu_wall_cpu --table_params 6e8 --dtype float32 \
		--backbone qwen3-4b --steps prefill:1x64 decode:4 --rounds 30 --seq_len 1024 --batch_size 1 --iterations 12

end-to-end-cpu: $(VENV)/stamp-fast,plot,ref
	OMP_NUM_THREADS=1 $(BIN)/python bench/gpu_wall.py --end-to-end --device cpu --out out/end_to_end_cpu # more of them wait for each other

bench-layer: $(VENV)/stamp-fast,plot,ref
	$(BIN)/python bench/layer_speed.py --out out/layer_speed/results.json

ranges:
	$(PYTHON) tests/ranges.py $(ENDS) $(if $(TORCH),--torch $(TORCH))

# What torch compiled for one set of instructions, its cache gives to another, so compiled steps are left out.
processors: $(VENV)/stamp-fast,plot,ref,test,docs
	for set in "default COMPATIBLE SSE41 nehalem" "avx2 AVX2 AVX2 haswell"; do set -- $$set; echo "$$1"; \
		NUMBA_CPU_NAME=$$4 NUMBA_CPU_FEATURES= \
		ATEN_CPU_CAPABILITY=$$1 MKL_CBWR=$$2 ONEDNN_MAX_CPU_ISA=$$3 $(BIN)/python -m pytest \
		-q -n auto --ignore tests/ref/fusion/test_compiled.py tests/ref/fusion tests/ref/test_layer.py tests/ref/rows tests/ref/hashing \
		tests/ref/attach tests/ref/guides tests/cross tests/bench/rivals || exit 1; done

mutants: $(VENV)/stamp-fast,plot,ref,test,docs
	$(BIN)/python -m tests.mutants

fuzz: $(VENV)/stamp-fast,plot,ref,test
	$(BIN)/python -m tests.fuzz --out bench/results/stress.json

clean:
	rm -rf $(VENV) .venvs-ranges .cache build site out *.egg-info
