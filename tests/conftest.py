"""The environment of every test, golden pages, hypothesis' profile, and the last lines of a run."""

import io
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it reads this once; 0 on a GPU's own run

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from ktcompile import cli
from ktcompile.backends import native

HERE = Path(__file__).parent

torch.set_num_threads(1)
settings.register_profile(
    "ktrans",
    deadline=None,
    max_examples=25,
    print_blob=True,
    derandomize=bool(os.environ.get("CI")),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
    if not os.environ.get("CI")
    else [Phase.explicit, Phase.generate],  # a shrink takes minutes: the blob repeats it here
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ktrans")

NEEDS = {
    "test_server*.py": ("fastapi", "httpx", "openai", "prometheus_client", "uvicorn"),
    "test_server_anthropic.py": ("anthropic",),
    "test_server_llm.py": ("llm",),
    "test_server_ollama.py": ("ollama",),
    "test_server_page.py": ("playwright", "chromium"),
}
LACKING = {
    files: ", ".join(n for n in names if find_spec(n) is None and shutil.which(n) is None)
    for files, names in NEEDS.items()
}
collect_ignore_glob = [files for files, names in LACKING.items() if names]
"""A machine may lack packages and programs that the server's clients are made of; the last lines of the run say so."""

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/ from this run")


@pytest.fixture
def ktrans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `ktrans ARGS` in this process, with caches of its own; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(*args: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ktrans", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(cli, "err", cli.Console(stderr=True, highlight=False, width=200))
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where it is; without it no test that asks is collected."""
    found = shutil.which("chromium")
    assert found is not None
    return found


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, text)` compares with tests/golden/<module>/<name>.txt."""
    folder = HERE / "golden" / request.module.__name__.removeprefix("test_")

    def check(name: str, actual: str) -> None:
        path = folder / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(actual)
        assert path.exists(), f"{path} is missing; run with --update-golden and review it"
        assert actual == path.read_text(), f"{path} differs; review, then rerun with --update-golden"
        assert actual.count("\n") <= 60, f"{path} has over 60 lines: the model is too big for the point"

    return check


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    """A running server (`served.Served`)."""
    yield from import_module("served").running()


@pytest.fixture(scope="module")
def pool() -> Iterator[native.Pool]:
    """Two threads for the native kernels."""
    made = native.Pool(2)
    yield made
    made.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands what it ran to the process that prints the summary."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["ran"] = import_module("native.report").RAN


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    report = import_module("native.report")
    for isa, how in getattr(node, "workeroutput", {}).get("ran", {}).items():
        report.ran(isa, how)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which instruction sets ran, and where the Triton kernels did: no variant is skipped in silence."""
    lines = import_module("native.report").lines()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    where = (
        "in Triton's interpreter, on the CPU"
        if interpreted
        else f"on {torch.cuda.get_device_name(0)}"
        if torch.cuda.is_available()
        else "not at all: no GPU, and TRITON_INTERPRET is not 1"
    )
    terminalreporter.section("what really ran")
    lacking = [f"{files} not run, not installed: {names}" for files, names in LACKING.items() if names]
    server = "; ".join(lacking) or "and its clients over loopback"
    for line in (*lines, f"triton kernels {where}", f"server         {server}"):
        terminalreporter.write_line(line)
