"""The thread pool: tests/native/test_pool.c, compiled plainly and with the sanitizers that are here."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()
BUILDS = {
    "plain": ("-O3",),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}


def compile_c(source: Path, program: Path, flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = [*COMPILER, "-std=gnu11", "-Wall", "-Wextra", *flags, "-I", str(HERE.parent / "csrc")]
    return subprocess.run([*command, str(source), "-o", str(program), "-pthread"], capture_output=True, text=True)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=120)


def skip_without(flags: tuple[str, ...], folder: Path) -> None:
    """Skips with the compiler's words, or the sanitizer's own, if a program with nothing in it does not work."""
    source, program = folder / "empty.c", folder / "empty"
    source.write_text("int main(void) { return 0; }\n")
    built = compile_c(source, program, flags)
    if built.returncode:
        pytest.skip(f"{' '.join(flags)}: {built.stderr.strip()}")
    done = run(program)
    if done.returncode:
        pytest.skip(f"{' '.join(flags)}: {(done.stdout + done.stderr).strip()}")


@pytest.mark.parametrize("build", BUILDS)
def test_pool(build: str, tmp_path: Path) -> None:
    flags = BUILDS[build]
    if build != "plain":
        skip_without(flags, tmp_path)
    program = tmp_path / "test_pool"
    built = compile_c(HERE / "native" / "test_pool.c", program, flags)
    assert built.returncode == 0, built.stderr
    machines = tmp_path / "machines"
    machines.mkdir()
    done = run(program, str(machines))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok test_never_more_spin_than_cpus" in done.stdout  # the last one
    assert not done.stderr, done.stderr
