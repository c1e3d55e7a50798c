"""The kernels without Python: tests/native/test_moe.c and all of csrc, compiled with AddressSanitizer and UBSan."""

import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native import report
from tolerances import FEW_VALUES

from ktcompile.backends import native

HERE = Path(__file__).resolve().parent
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PROCESSES = 2
"""Compilers at a time: one takes up to 600 MB."""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)


def skip_without_sanitizers(folder: Path) -> None:
    """Skips with the compiler's words, or the sanitizer's own, if a program with nothing in it does not work."""
    source, program = folder / "empty.c", folder / "empty"
    source.write_text("int main(void) { return 0; }\n")
    built = run(*COMPILER, *FLAGS, source, "-o", program)
    done = built if built.returncode else run(program)
    if done.returncode:
        pytest.skip(f"{' '.join(FLAGS)}: {(done.stdout + done.stderr).strip()}")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitizers")
    skip_without_sanitizers(folder)
    sources = sorted((HERE.parent / "csrc").glob("*.c"), key=lambda path: -path.stem.count("_"))  # the slow ones first
    sources.append(HERE / "native" / "test_moe.c")

    def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
        return run(*COMPILER, "-std=gnu11", "-O1", "-g1", *FLAGS, "-c", source, "-o", folder / f"{source.stem}.o")

    with ThreadPoolExecutor(PROCESSES) as several:
        for built in several.map(compile_one, sources):
            assert built.returncode == 0, built.stderr
    program = folder / "test_moe"
    linked = run(*COMPILER, *FLAGS, *folder.glob("*.o"), "-o", program, "-pthread", "-lm")
    assert linked.returncode == 0, linked.stderr
    return program


@pytest.mark.parametrize("memory", ["malloc", "pages"])
def test_no_byte_beside_a_buffer(program: Path, memory: str) -> None:
    """Sizes around the edges of groups, spans and tiles, in buffers of exactly the size they need."""
    done = run(program, memory, *(str(FEW_VALUES[native.FAMILY[isa]]) for isa in native._ISAS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    for isa, reason in native.isas().items():
        assert f"{isa}: " in done.stdout
        report.ran(isa, "native" if reason is None else f"not run: {reason}")
