#!/usr/bin/env bash
# Runs benchmarks and tests on a GPU machine without a package index, stage after stage.
#
#     bench/device/run.sh STAGE...         (in the repository's root, where FOLDER holds what
#                                           assemble.sh packed)
#
# A STAGE is NAME, NAME@SECONDS or NAME[@SECONDS]=COMMAND. Without a COMMAND it is a block of
# bench/engine.py, or several joined by "+"; figures go to $OUT/engine-NAME.json, and those of
# engines that an earlier call measured on the same machine are taken in. For example:
#
#     bench/device/run.sh 'gpu@120=python3 -m pytest -q tests/gpu' throughput+itl@440
#
#   FOLDER=.device    site.tar.xz, and compiled kernels of an earlier run as cache.tar.gz
#   OUT=/tmp/out      results, logs.tar.gz, and cache.tar.gz to carry along next time
#   DEADLINE=570      seconds for all stages; the last one is ended in good order before that
#   ENGINE_ARGS=      further arguments of bench/engine.py
#   SHMROUTE_BENCH_COMMIT=   what result files say, where git is not
#
# Stages that fail do not keep later ones from running; the exit code is the first failure's.
set -uo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
folder=${FOLDER:-.device}
export OUT=${OUT:-/tmp/out}
scratch=${SCRATCH:-/tmp/shmroute-device}
site=$scratch/site cache=$scratch/cache
export LOGS=$scratch/logs
mkdir -p "$OUT" "$LOGS" "$cache"
say() { printf '== +%d s %s\n' "$SECONDS" "$*"; }

unpack() {
  [ -e "$scratch/unpacked" ] && return
  mkdir -p "$site"
  # Python's own tarfile: a bare machine may have no xz.
  python3 - "$folder/site.tar.xz" "$site" <<'PY' || exit
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2], filter="fully_trusted")
PY
  if [ -e "$folder/cache.tar.gz" ]; then tar -xzf "$folder/cache.tar.gz" -C "$cache"; fi
  python3 bench/device/distribution.py "$site" >/dev/null || exit
  touch "$scratch/unpacked"
}

# A process that was killed keeps its GPU memory for a moment; the next engine would size its KV
# cache by what is left.
wait_for_gpu() {
  command -v nvidia-smi >/dev/null || return 0
  local used
  for _ in $(seq 60); do
    used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | sort -n | tail -1)
    [ "$used" -lt 2000 ] && return
    sleep 0.5
  done
  say "the GPU still holds $used MiB"
}

# After each stage, so that a run that is cut off still brings them back.
keep() {
  tar -C "$LOGS" -czf "$OUT/logs.tar.gz" .
  # Sources of the compiled kernels are of no use to a cache.
  tar -C "$cache" --exclude='*.o' --exclude='*.ptx' --exclude='*.tt*ir' --exclude='*.llir' \
    --exclude='*.source' -czf "$OUT/cache.tar.gz" .
}

unpack
export PYTHONPATH=$site:$PWD:$PWD/bench PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor
export TVM_FFI_CACHE_DIR=$cache/tvm-ffi
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export SGLANG_IS_FLASHINFER_AVAILABLE=false # stubs/ has a stand-in only
gpu=$(nvidia-smi --query-gpu=name,memory.used --format=csv,noheader 2>/dev/null || echo none)
say "unpacked; GPU: $gpu"

deadline=${DEADLINE:-570} failed=0
for stage in "$@"; do
  head=${stage%%=*}
  name=${head%%@*} seconds=570
  [ "$head" = "$name" ] || seconds=${head##*@}
  wait_for_gpu
  left=$((deadline - SECONDS))
  [ "$left" -gt 10 ] || { say "$name: no time left"; [ "$failed" -ne 0 ] || failed=124; continue; }
  [ "$seconds" -lt "$left" ] || seconds=$left
  command="python3 bench/engine.py ${name//+/ } ${ENGINE_ARGS:-} --seconds $((seconds - 15))"
  name=${name//+/-}
  command+=" --raw $LOGS/raw --logs $LOGS --json $OUT/engine-$name.json"
  [ "$stage" = "$head" ] || command=${stage#*=}
  say "$name, at most $seconds s: $command"
  # One log for each stage; the console shows its end only.
  timeout --kill-after=15 "$((seconds - 5))" \
    bash -c "$command" >"$LOGS/$name.log" 2>&1
  code=$?
  tail -n 60 "$LOGS/$name.log" | cut -c1-300
  say "$name: exit code $code"
  [ "$failed" -ne 0 ] || failed=$code
  keep
done
say "end; $(df -h /dev/shm | tail -1 | awk '{print $3 " used in /dev/shm"}')"
exit "$failed"
