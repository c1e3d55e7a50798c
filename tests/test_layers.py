"""Imports go one way. This file is the rule; `docs/` only repeats it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    "errors",
    "version",
    "files",
    "target",
    "weights",
    "fake",
    "graph",
    "folding",
    "symbols",
    "ops",
    "kernel",
    "memory",
    "verify",
    "plan",
    "pipeline",
    "budget",
    "capture",
    "cache",
    "layers",
    "tokenizer",
    "gguf_config",
    "packed_cache",
    "checkpoint",
    "convert",
    "inspect",
    "runtime",
    "compile_cache",
    "counters",
    "sampling",
    "step_parts",
    "step_graph",
    "model",
    "dynamo",
    "apart",
    "template_process",
    "template",
    "generate",
    "pages",
    "penalties",
    "text",
    "grammar_trial",
    "grammar",
    "request",
    "pace",
    "schedule",
    "bench",
    "profile",
    "report",
    "timeline",
    "engine",
    "server",
    "cli",
)
"""A file imports only files before it. `__init__.py` is the facade, for passes, backends and users."""

OWNERS = {
    "transformers": {"capture", "cache", "checkpoint", "layers", "model", "tokenizer", "template", "generate"},
    "triton": {
        "backends.handover",
        "backends.triton_gqa",
        "backends.triton_linear",
        "backends.triton_mla",
        "backends.triton_norm",
        "backends.triton_router",
    },
    "cffi": {"backends.native"},
    "ktcompile._native": {"backends.native"},
}
FILES = [
    p
    for folder in ("ktcompile", "passes", "backends")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if not {"passes", "backends", "rules"} & set(p.relative_to(ROOT / folder).parts)
]
IDS = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in FILES]


def imports(path: Path) -> set[str]:
    """Every module or name that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize(("path", "name"), list(zip(FILES, IDS, strict=True)), ids=IDS)
def test_imports_go_one_way(path: Path, name: str) -> None:
    here, *rest = name.split(".")
    for other in sorted(imports(path)):
        root, *parts = other.split(".")
        if root in ("passes", "backends", "rules"):
            raise AssertionError(f"{path}: import ktcompile.{root}: the same file under two names loads twice")
        if root != "ktcompile" or not parts:
            continue
        if here == "passes":
            assert parts[0] not in ("passes", "backends"), f"{path} imports {other}"
        elif here == "backends":
            assert parts[0] != "passes", f"{path} imports {other}"
        elif rest[0] != "__init__":
            assert parts[0] not in ("passes", "backends"), f"{path} imports {other}"
            if parts[0] in ORDER and parts[0] != rest[0]:
                assert ORDER.index(parts[0]) < ORDER.index(rest[0]), f"{path} imports {other}, which is above it"


@pytest.mark.parametrize(("path", "name"), list(zip(FILES, IDS, strict=True)), ids=IDS)
def test_foreign_packages_have_an_owner(path: Path, name: str) -> None:
    for other in imports(path):
        for package, owners in OWNERS.items():
            if other == package or other.startswith(f"{package}."):
                assert name.removeprefix("ktcompile.") in owners, f"{path} imports {other}"


PRIVATE = {
    "_dispatch",
    "_dynamo",
    "_dynamo_source",
    "_inductor",
    "_functorch",
    "_subclasses",
    "_higher_order_ops",
    "_guards",
    "_version",
    "_C",
    "_ops",
    "_prims",
}


@pytest.mark.parametrize(("path", "name"), list(zip(FILES, IDS, strict=True)), ids=IDS)
def test_private_torch_is_in_two_files(path: Path, name: str) -> None:
    if name in ("ktcompile.capture", "ktcompile.fake"):
        return
    used = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    used |= {part for i in imports(path) if i.split(".")[0] in ("torch", "transformers") for part in i.split(".")}
    used |= {
        n.args[1].value
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "getattr" and isinstance(n.args[1], ast.Constant)
    }
    assert not used & PRIVATE, f"{path} uses {used & PRIVATE}"


def test_every_file_has_its_place() -> None:
    names = {i.split(".")[1] for i in IDS if i.startswith("ktcompile.")} - {"__init__", "assets", "_native"}
    assert names <= set(ORDER), f"add {names - set(ORDER)} to ORDER"
