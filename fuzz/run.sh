#!/usr/bin/env bash
# Fuzzes the GGUF header and rules files, FUZZ_SECONDS in all (default 600). Findings stay in out/fuzz; exit 1 if there are any.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
seconds=${FUZZ_SECONDS:-600}
read -r -a targets <<< "${FUZZ_TARGETS:-gguf_header rules}"
export HF_HUB_OFFLINE=1 PYTHONPATH=.:fuzz:tests

if ! "$python" -c 'import atheris' 2>/dev/null; then
  printf '%s\n' "fuzzing needs atheris, which is not installed for $python." \
    "  $python -m pip install atheris==3.0.0    (wheels for Linux on x86-64, Python 3.11 to 3.13)" >&2
  exit 2
fi
failed=()
for target in "${targets[@]}"; do
  found=out/fuzz/$target
  mkdir -p "$found/corpus"
  echo "$target: $((seconds / ${#targets[@]})) seconds"
  "$python" "fuzz/$target.py" "$found/corpus" -artifact_prefix="$found/" -max_total_time=$((seconds / ${#targets[@]})) \
    -timeout=10 -rss_limit_mb=3000 -max_len=65536 -len_control=0 -print_final_stats=1 < /dev/null > "$found/log.txt" 2>&1 ||
    failed+=("$target")
  grep -aE '^stat::(number_of_executed|average_exec|slowest_unit|peak_rss)' "$found/log.txt" | sed "s/^/$target: /" || true
done
[ ${#failed[@]} = 0 ] || {
  for target in "${failed[@]}"; do
    echo "$target: a finding; the input is beside out/fuzz/$target/log.txt, which ends so:" >&2
    grep -av '^stat::' "out/fuzz/$target/log.txt" | tail -n 25 | cut -c 1-400 >&2
  done
  exit 1
}
echo "no findings in ${targets[*]}"
