"""Builds `ktcompile._native` from csrc with cffi in API mode; `python csrc/build.py` compiles it in place."""

import re
import subprocess
import sys
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (  # the slowest first: with several compilers at work none is left over at the end
    "moe_avx2",
    "moe_avx512",
    "moe_avx512_vnni",
    "pack",
    "ceiling",
    "moe_avx512_bf16",
    "moe_amx",
    "moe_amx_int8",
    "blocks",
    "unpack",
    "quantize",
    "quantize_k",
    "moe",
    "moe_task",
    "moe_scalar",
    "pool",
    "place",
    "submit",
    "cpu",
)
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.h"))


def cdef() -> str:
    """The declarations of kt.h: the header is the one definition of the ABI, cffi only cannot read its directives."""
    text = (ROOT / "csrc" / "kt.h").read_text()
    return re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(cdef())
# No -m flags: each file names its instruction set in a pragma, so one build runs on every CPU.
ffibuilder.set_source(
    "ktcompile._native",
    '#include "kt.h"',
    sources=[f"csrc/{name}.c" for name in SOURCES],
    include_dirs=["csrc"],
    depends=HEADERS,
    extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    extra_link_args=["-pthread"],
    libraries=["m"],
)

if __name__ == "__main__":
    sys.exit(subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT).returncode)
