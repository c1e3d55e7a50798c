#!/usr/bin/env bash
# On a machine with a GPU (network or not): builds the C kernels for its Python, then `test` or `bench`. JSON goes to $OUT or out/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-out}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
"$python" -m pip install -q --no-deps --no-build-isolation --no-index -e .
case "${1:-test}" in
test)
  rc=0
  "$python" -m pytest --durations=15 -x -p no:cacheprovider --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.txt" || rc=$?
  "$python" benchmarks/gpu_check.py > "$out/gpu_check.json" || rc=$?
  cat "$out/gpu_check.json"
  exit $rc ;;
bench)
  "$python" benchmarks/bench_mla.py | tee "$out/bench_mla.jsonl"
  "$python" benchmarks/bench_moe.py | tee "$out/bench_moe.jsonl" ;;
*) echo "usage: $0 test|bench" >&2; exit 2 ;;
esac
