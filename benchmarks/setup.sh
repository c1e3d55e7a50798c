#!/usr/bin/env bash
# Makes the virtual environment: torch on its own, the rest pinned by constraints.txt, then ktcompile with its C kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} venv=${VENV:-.venv}
torch_version=2.13.0

fail() { printf '%s\n' "$@" >&2; exit 1; }
missing=()
command -v "$python" >/dev/null || missing+=("python3")
command -v gcc >/dev/null || missing+=("gcc")
command -v make >/dev/null || missing+=("make")
if command -v "$python" >/dev/null; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$($python -V) is too old: ktcompile needs Python 3.11 or later. Name another: make PYTHON=python3.12 ..."
  "$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=("python3-venv")
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [ -f "$include/Python.h" ] || missing+=("python3-dev")
fi
[ ${#missing[@]} = 0 ] || fail "missing on this machine: ${missing[*]}" "  sudo apt install ${missing[*]}"

[ -x "$venv/bin/python" ] || { echo "creating $venv"; "$python" -m venv "$venv"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }

if ! "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null; then
  echo "installing torch $torch_version"
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    pip install "torch==$torch_version"
  else  # no GPU: a CPU build, a tenth of the size, if this machine's package index or PyTorch's has one
    pip install "torch==$torch_version+cpu" 2>/dev/null ||
      pip --retries 0 --timeout 15 install "torch==$torch_version" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
      pip install "torch==$torch_version"
  fi
fi
echo "installing the rest"
pip install -c constraints.txt setuptools cffi
pip install -c constraints.txt --no-build-isolation -e '.[dev]'
