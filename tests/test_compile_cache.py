"""Compiled graphs on disk: what is read back is what was kept, of every family, and anything else is made anew."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from test_families import VARIANTS, opened
from torch import fx

import ktcompile
from ktcompile import compile_cache
from ktcompile.capture import empty_model
from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.compile_cache import FASTER, FILES, CompileCache, Compiled
from ktcompile.graph import Region, is_region, value_of
from ktcompile.model import PHASES, capture_phase, run_phase, settings_for
from ktcompile.target import Target, detect, fake

HOST = Target((detect().host,))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ktcompile" / "compiled"


def cache_of(checkpoint: Checkpoint, target: Target = HOST, **facts: str) -> CompileCache:
    assert checkpoint.source is not None
    return CompileCache(checkpoint.source, target, **facts)


def compiled(checkpoint: Checkpoint, target: Target) -> Compiled:
    settings = settings_for(checkpoint, target=target, context=64)
    hollow = empty_model(checkpoint.config, settings.dtype)
    graphs, plans = {}, {}
    for phase in PHASES:
        gm = capture_phase(hollow, phase, settings, checkpoint)
        graphs[phase], (plans[phase],), settings = run_phase(gm, settings, checkpoint, phase)
    return Compiled(graphs, plans, settings.chunks, target.host.bandwidth)


def written(gm: fx.GraphModule) -> Iterator[object]:
    """Everything that `lower` may ask of a graph."""
    yield str(gm.graph)
    for node in gm.graph.nodes:
        value = value_of(node)
        tensor = isinstance(value, torch.Tensor) or hasattr(value, "dtype")
        yield f"{value.dtype} {tuple(map(str, value.shape))}" if tensor else None
        yield from ((k, v) for k, v in sorted(node.meta.items()) if k not in ("val", *compile_cache._OF_TRACING))
        if is_region(node):
            yield str(Region(node).body.graph)


@pytest.mark.parametrize(
    ("family", "target"),
    [*((family, HOST) for family in sorted(VARIANTS)), ("deepseek_v3", fake()), ("gpt_oss", fake())],
    ids=lambda v: v if isinstance(v, str) else v.main.name,
)
def test_what_is_kept_is_read_back(family: str, target: Target, tmp_path: Path) -> None:
    checkpoint = opened(family, tmp_path)
    made = compiled(checkpoint, target)
    first = cache_of(checkpoint, target)
    assert first.load() is None
    first.save(made)
    found = cache_of(checkpoint, target).load()
    assert found is not None and found.chunks == made.chunks
    for phase in PHASES:
        assert found.plans[phase].text() == made.plans[phase].text()
        assert list(written(found.graphs[phase])) == list(written(made.graphs[phase]))


def test_a_model_from_the_cache_says_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 5, 9, 30, 2]])
    first = ktcompile.load(target=HOST, compile_cache=True)
    expected = first(ids).logits
    monkeypatch.setattr("ktcompile.model.capture_phase", None)  # whoever captures now fails
    second = ktcompile.load(target=HOST, compile_cache=True)
    assert torch.equal(second(ids).logits, expected)
    assert "kept in" in first.compile_cache.notes[0] and "read from" in second.compile_cache.notes[0]
    assert len(first.compile_cache.notes) == len(second.compile_cache.notes) == 1


EMBEDDED = open_checkpoint()
KEPT = Compiled({}, {}, (512,), HOST.host.bandwidth)


def test_another_model_machine_setting_or_code_is_another_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cache_of(EMBEDDED, pipeline="a").save(KEPT)
    assert cache_of(EMBEDDED, pipeline="a").load() == KEPT
    more = Target((replace(HOST.host, capacity=HOST.host.capacity + 1),))
    assert cache_of(EMBEDDED, pipeline="b").load() is None
    assert cache_of(EMBEDDED, more, pipeline="a").load() is None
    slower = Target((replace(HOST.host, bandwidth=HOST.host.bandwidth / 2),))
    assert cache_of(EMBEDDED, slower, pipeline="a").load() == KEPT  # it is measured, and never the same
    monkeypatch.setattr(compile_cache, "version", lambda name: "99")
    assert cache_of(EMBEDDED, pipeline="a").load() is None


def test_a_plugin_that_was_changed_is_other_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its version may be the same: it is being written."""
    plugin = tmp_path / "hot_layers_of_a_test.py"
    plugin.write_text("BUDGET = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("hot-layers", "hot_layers_of_a_test:HotLayers", "ktcompile.passes")
    monkeypatch.setattr(compile_cache, "entry_points", lambda group: [point])
    before = compile_cache._code()
    assert compile_cache._code() == before
    plugin.write_text("BUDGET = 20\n")
    assert compile_cache._code() != before


def test_a_plan_for_a_machine_that_seemed_slow_is_made_again() -> None:
    """How experts are shared between CPU and GPU depends on it; without a GPU nothing does."""
    for target in (fake(), HOST):
        slow = replace(KEPT, bandwidth=target.host.bandwidth / FASTER / 1.01)
        cache_of(EMBEDDED, target).save(slow)
        again = cache_of(EMBEDDED, target)
        assert (again.load() is None) == (target is not HOST)
        assert ("not used: planned for" in again.notes[0]) == (target is not HOST)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: p.write_bytes(b"something else altogether"), "is no file of packed weights"),
        (lambda p: p.write_bytes(p.read_bytes()[:4200]), "does not fit into"),
        (lambda p: p.chmod(0o622), "others than its owner may write to it"),
    ],
)
def test_a_file_that_is_not_right_is_not_used(folder: Path, damage: Callable[[Path], object], why: str) -> None:
    cache_of(EMBEDDED).save(KEPT)
    damage(next(folder.iterdir()))
    again = cache_of(EMBEDDED)
    assert again.load() is None and why in again.notes[0]


def test_bytes_that_are_no_pickle_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(EMBEDDED)
    cache.save(KEPT)
    monkeypatch.setattr(compile_cache._Reader, "load", lambda self: pickle.loads(b"junk"))
    assert cache.load() is None and "not used" in cache.notes[-1] and "Unpickling" in cache.notes[-1]


def test_what_cannot_be_pickled_is_a_note(folder: Path) -> None:
    cache = cache_of(EMBEDDED)
    cache.save(replace(KEPT, plans={"decode": lambda: None}))  # type: ignore[dict-item]
    assert "not written" in cache.notes[0] and list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "ktcompile").touch()
    cache = cache_of(EMBEDDED)
    assert cache.load() is None
    cache.save(KEPT)
    assert len(cache.notes) == 1 and cache.notes[0].startswith("not used: packed cache ")


def test_only_the_newest_are_kept(folder: Path) -> None:
    for i in range(FILES + 3):
        cache_of(EMBEDDED, number=str(i)).save(KEPT)
    assert len(list(folder.iterdir())) == FILES
    assert cache_of(EMBEDDED, number=str(FILES + 2)).load() == KEPT
    assert cache_of(EMBEDDED, number="0").load() is None
