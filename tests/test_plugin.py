"""A pass from somebody else's package: installed, found by name, used from a rules file, and on the page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Golden

from ktcompile import PassError
from ktcompile.pipeline import available, load_rules

HERE = Path(__file__).parent

_PAGE = """
import sys, warnings
warnings.simplefilter("ignore")
from models import GPU, plan
from ktcompile import load_rules
sys.stdout.write(plan("deepseek_v3", GPU, *load_rules(sys.argv[1]).until("insert-copies").passes)[-1].text())
"""

_RULES = """
extends: base
pipeline:
  - place: {rules: {"*.experts": cpu, "*": gpu}}
  - hot-layers: {budget: 400_000}
"""


def test_an_installed_pass_is_used_by_name(tmp_path: Path, golden: Golden) -> None:
    source, target, rules = tmp_path / "plugin", tmp_path / "site", tmp_path / "rules.yaml"
    shutil.copytree(HERE / "plugin", source)  # a build leaves files behind
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--disable-pip-version-check",
            "--target",
            target,
            source,
        ],
        check=True,
        timeout=120,
    )
    rules.write_text(_RULES)
    done = subprocess.run(
        [sys.executable, "-c", _PAGE, rules],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(target)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    golden("hot_layers", done.stdout)


def broken(tmp_path: Path, code: str) -> Path:
    """A site directory with a plugin `broken` whose module is `code`."""
    info = tmp_path / "kt_broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kt-broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ktcompile.passes]\nbroken = kt_broken_pass:Broken\n")
    (tmp_path / "kt_broken_pass.py").write_text(code)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import a_module_that_is_not_there\n", "No module named 'a_module_that_is_not_there'"),
        ("x = 1\n", "has no attribute 'Broken'"),
        ("raise RuntimeError('no licence')\n", "no licence"),
        ("def (\n", "invalid syntax"),
    ],
)
def test_a_broken_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str) -> None:
    monkeypatch.syspath_prepend(broken(tmp_path, code))
    monkeypatch.delitem(sys.modules, "kt_broken_pass", raising=False)
    with pytest.raises(PassError, match=r"pass 'broken' \(kt_broken_pass:Broken\) cannot be loaded: ") as error:
        load_rules("base")
    assert why in str(error.value)


def test_ours_are_found_as_anybodys() -> None:
    assert {"fold", "place", "insert-copies", "prune-experts", "choose-kernels"} <= set(available())
    assert all(name == cls.name for name, cls in available().items())
