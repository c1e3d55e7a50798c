"""Packed weights on disk: read if whole, ours and of these weights, else packed again and said why."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import ktcompile
from ktcompile.checkpoint import open_checkpoint
from ktcompile.errors import RulesError
from ktcompile.packed_cache import PackedCache, fingerprint, packed_folder
from ktcompile.weights import GGUFSource, ModuleSource

NAME = "0" * 40 + ".packed"
TENSORS = {
    "gate": torch.arange(60, dtype=torch.uint8).view(3, 20),
    "down": torch.randint(0, 255, (17 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).view(
        17, -1
    ),
}


@pytest.fixture(scope="module")
def source() -> GGUFSource:
    found = open_checkpoint().source
    assert isinstance(found, GGUFSource)
    return found


@pytest.fixture
def cache(tmp_path: Path, source: GGUFSource) -> PackedCache:
    return PackedCache(tmp_path / "packed", source)


def test_what_is_saved_is_loaded(cache: PackedCache) -> None:
    cache.save(NAME, TENSORS)
    found = cache.load(NAME)
    assert found is not None and found.keys() == TENSORS.keys() and cache.notes == []
    assert (cache.loaded, cache.saved) == (1, 1)
    assert all(torch.equal(found[k], t) for k, t in TENSORS.items())
    assert os.stat(cache.folder).st_mode & 0o777 == 0o700 and os.stat(cache.folder / NAME).st_mode & 0o777 == 0o600
    assert [p.name for p in cache.folder.iterdir()] == [NAME]


def test_what_is_not_there_is_no_note(cache: PackedCache) -> None:
    assert cache.load(NAME) is None and cache.notes == []


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0xFF
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: os.truncate(p, p.stat().st_size - 1), "does not fit into"),
        (lambda p: os.truncate(p, 100), "does not fit"),
        (lambda p: p.write_bytes(b""), "the file is empty"),
        (lambda p: p.write_bytes(b"something else altogether"), "is no file of packed weights"),
        (lambda p: flip(p, -(1 << 20)), "'down' is damaged at byte"),
        (lambda p: flip(p, 4096), "'gate' is damaged at byte 4096"),
        (lambda p: flip(p, 20), "header length"),
        (lambda p: flip(p, 30), "header"),
        (lambda p: p.chmod(0o622), "others than its owner may write to it"),
        (lambda p: p.rename(p.with_suffix(".x")) and p.symlink_to(p.with_suffix(".x")), "is a link"),
    ],
)
def test_a_file_that_is_not_right_is_not_used(cache: PackedCache, damage: Callable[[Path], object], why: str) -> None:
    cache.save(NAME, TENSORS)
    damage(cache.folder / NAME)
    assert cache.load(NAME) is None
    assert len(cache.notes) == 1 and cache.notes[0].startswith("not used: ") and why in cache.notes[0]


def test_a_file_under_another_name_is_not_used(cache: PackedCache) -> None:
    cache.save(NAME, TENSORS)
    other = "1" * 40 + ".packed"
    (cache.folder / NAME).rename(cache.folder / other)
    assert cache.load(other) is None and "was written under the name" in cache.notes[0]


@given(st.integers(0, 8191), st.integers(0, 255))
def test_no_damaged_byte_raises(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    cache = PackedCache(tmp_path_factory.mktemp("packed"), open_checkpoint().source)  # type: ignore[arg-type]
    small = {"gate": TENSORS["gate"]}
    cache.save(NAME, small)
    raw = bytearray((cache.folder / NAME).read_bytes())
    raw[at % len(raw)] = value
    (cache.folder / NAME).write_bytes(raw)
    found = cache.load(NAME)
    assert found is None or torch.equal(found["gate"], small["gate"])


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, source: GGUFSource) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(RulesError, match="others than its owner may write to it"):
        PackedCache(tmp_path, source)
    (tmp_path / "file").touch()
    with pytest.raises(RulesError, match=r"packed cache .*: (File exists|Not a directory)"):
        PackedCache(tmp_path / "file", source)


def test_a_full_disk_is_a_note_and_leaves_nothing(cache: PackedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ktcompile.packed_cache._write", full)
    cache.save(NAME, TENSORS)
    assert "No space left on device" in cache.notes[0] and list(cache.folder.iterdir()) == []


def test_killed_while_writing_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    code = f"""
import pathlib, time, torch
from ktcompile import packed_cache
from ktcompile.checkpoint import open_checkpoint
real = packed_cache._write
def slow(path, *rest):
    real(path, *rest)
    print("written", flush=True)
    time.sleep(60)
packed_cache._write = slow
cache = packed_cache.PackedCache(pathlib.Path({str(tmp_path / "packed")!r}), open_checkpoint().source)
cache.save({NAME!r}, {{"a": torch.ones(9, dtype=torch.uint8)}})
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [p.suffix for p in (tmp_path / "packed").iterdir()] == [".partial"]


def test_names_depend_on_everything_that_decides_the_bytes(cache: PackedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        cache.name(keys, layout, details)
        for keys in (("a",), ("a", "b"))
        for layout in ("rows", "tiles")
        for details in ("q4_k", "q8_0")
    }
    monkeypatch.setattr("ktcompile.packed_cache.__version__", "99")
    names.add(cache.name(("a",), "rows", "q4_k"))
    monkeypatch.setattr("platform.machine", lambda: "other")
    names.add(cache.name(("a",), "rows", "q4_k"))
    assert len(names) == 10


def test_another_file_has_another_fingerprint(tmp_path: Path, source: GGUFSource) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(Path(source.path).read_bytes())
    first = fingerprint(GGUFSource(path))
    assert fingerprint(GGUFSource(path)) == first
    time.sleep(0.01)
    os.utime(path)
    assert fingerprint(GGUFSource(path)) != first
    with pytest.raises(RulesError, match="ModuleSource reads no files"):
        fingerprint(ModuleSource({}))


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert packed_folder("user", "m.gguf") == Path("/cache/ktcompile/packed")
    assert packed_folder("model", str(tmp_path / "m.gguf")) == tmp_path / ".ktcompile-packed"
    assert packed_folder("model", str(tmp_path)) == tmp_path / ".ktcompile-packed"
    assert packed_folder(tmp_path / "x", "m.gguf") == tmp_path / "x"


def test_the_second_start_packs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(model: PreTrainedModel) -> torch.Tensor:
        found: torch.Tensor = model(torch.arange(3, 12)[None]).logits
        return found

    first = ktcompile.load(packed_cache=tmp_path / "packed")
    assert len(list((tmp_path / "packed").iterdir())) == 5, "one file a layer with experts"
    monkeypatch.setattr("ktcompile.backends.cpu_moe._pack", None)
    second = ktcompile.load(packed_cache=tmp_path / "packed")
    assert second.store.cache.notes == [] and torch.equal(logits(first), logits(second))
