"""Several GPUs: layers in a row on each, as even as can be; the same answers as on one."""

import gc
from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, captured, placed, plan, rewritten
from strategies import any_model, phases
from test_simulated_gpu import HOST, at_once, check_forced, forced, without_planes
from test_simulated_gpu import model as simulated
from test_step_graph import check_choices, check_streamed, graph_of
from torch import fx

from ktcompile import Device, RulesError, Target, copies, device_of, is_scalar, load, regions
from ktcompile.graph import copy_to
from ktcompile.model import PHASES, _sampled
from ktcompile.passes.fold import Fold
from ktcompile.passes.insert_copies import InsertCopies
from ktcompile.passes.place import Place, _cut, _layer
from ktcompile.runtime import check_one_layout
from ktcompile.step_graph import StreamedStep
from ktcompile.target import fake, with_sizes
from ktcompile.verify import used

RULES = {"*.experts": "cpu", "*": "gpus"}


def machine(count: int) -> Target:
    """So many "GPUs" on which torch computes on the CPU."""
    return Target((*(Device(f"cpu:{i + 1}", "cuda", 1 << 30, 1e12) for i in range(count)), HOST))


def where(gm: fx.GraphModule) -> dict[int, set[str]]:
    """The GPUs of each layer."""
    found: dict[int, set[str]] = {}
    for region in regions(gm):
        if (n := _layer(region)) is not None and region.device != HOST.name:
            found.setdefault(n, set()).add(str(region.device))
    return found


# ------------------------------------------------------------------------------------------------ placement


def test_page(golden: Golden) -> None:
    golden("two", plan("deepseek_v3_tied", fake("2x24G"), Fold(), Place(RULES), InsertCopies())[-1].text())


@given(name=any_model, count=st.integers(1, 4), phase=phases)
@settings(max_examples=12)
def test_layers_in_a_row_and_every_edge_local(name: str, count: int, phase: str) -> None:
    target = machine(count)
    gm, _ = rewritten(captured(name, phase), target, *placed(RULES))  # type: ignore[arg-type]
    names = [d.name for d in target.devices]
    layers = where(gm)
    assert all(len(on) == 1 for on in layers.values())
    order = [names.index(*layers[n]) for n in sorted(layers)]
    assert order == sorted(order) and len(set(order)) == min(count, len(layers))
    assert order[0] == 0
    for region in regions(gm):
        assert all(is_scalar(v) or device_of(v) in (None, region.device) for v in region.inputs)
    crossings = [tuple(c.args) for c in copies(gm)]
    assert len(crossings) == len(set(crossings))
    on = {r.path.removeprefix("model."): r.device for r in regions(gm)}
    assert (on["embed_tokens"], on["norm"], on["lm_head"]) == (names[0], names[order[-1]], names[order[-1]])
    for region in regions(gm):  # a layer's pool follows its attention
        for node in region.inputs:
            if node.meta.get("state"):
                assert node.meta["device"] == region.device


@given(name=any_model, count=st.integers(2, 4))
@settings(max_examples=8)
def test_both_phases_are_cut_alike(name: str, count: int) -> None:
    """Weights are packed once: every region has its home in both graphs."""
    check_one_layout([rewritten(captured(name, p), machine(count), *placed(RULES))[0] for p in PHASES])


@pytest.mark.parametrize("name", CONFIGS)
def test_one_gpu_is_gpu(name: str) -> None:
    for target in (fake("24G"), fake(None)):
        ways = [Place({"*.experts": "cpu", "*": device}) for device in ("gpus", "gpu")]
        gpus, gpu = (rewritten(captured(name), target, Fold(), way)[0] for way in ways)
        assert [r.device for r in regions(gpus)] == [r.device for r in regions(gpu)]


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), count=st.integers(1, 4))
def test_the_fullest_is_as_empty_as_can_be(sizes: Sequence[int], count: int) -> None:
    """As by trying every cut; the rest is even within one layer of the mean."""

    def loads(firsts: Sequence[int]) -> list[int]:
        return [sum(sizes[a:b]) for a, b in pairwise((*firsts, len(sizes)))]

    ways = [loads((0, *cut)) for cut in combinations_with_replacement(range(len(sizes) + 1), count - 1)]
    least, _ = _cut(sizes, [1] * count)
    _, firsts = _cut(sizes, [1] * count, least)
    found = loads(firsts)
    assert max(found) == least == min(map(max, ways))
    assert sum(n * n for n in found) == min(sum(n * n for n in way) for way in ways if max(way) == least)
    assert least <= sum(sizes) / count + max(sizes)


def test_a_larger_gpu_holds_more() -> None:
    devices = (Device("cpu:1", "cuda", 3 << 30, 1e12), Device("cpu:2", "cuda", 1 << 30, 1e12), HOST)
    gm, _ = rewritten(captured("deepseek_v3"), Target(devices), *placed(RULES))
    uses = {name: sum(use.values()) for name, use in used(gm).items()}
    assert uses["cpu:1"] > uses["cpu:2"] > 0


def test_many_gpus_are_imagined() -> None:
    assert [d.name for d in fake("2x24G").devices] == ["cuda:0", "cuda:1", "cpu"]
    assert fake("2x24G").main.capacity == 24 << 30
    assert with_sizes(fake("8G"), "2x24G").about.startswith("imagined: 2 GPUs of 24G at")
    for wrong in ("0x24G", "x24G", "99x24G", "2x24", "ax1G"):
        with pytest.raises(RulesError):
            fake(wrong)


# ------------------------------------------------------------------------------------------------ answers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rules = without_planes(tmp_path_factory.mktemp("rules"))
    return load(target=machine(3), dtype="fp32", context=256, rules=rules)


def test_logits_are_those_of_the_cpu(model: Any) -> None:
    check_forced(model)


def test_a_padded_batch(model: Any) -> None:
    ids = torch.stack([forced(5, 1), forced(5, 2)])
    both = model(ids).logits
    for row in range(2):
        want = at_once(simulated("cpu"), ids[row])
        assert (both[row] - want).norm() <= 1e-4 * want.norm()


def test_bytes_are_those_of_the_plan(model: Any) -> None:
    gc.collect()  # caches of other tests
    pools = model.new_cache()
    held = model.memory()
    for phase in PHASES:
        for use in model.plans[phase].uses:
            assert (held[use.device].weights, held[use.device].cache) == (use.weights, use.cache)
    assert all(held[f"cpu:{i}"].cache > 0 for i in (1, 2, 3))
    assert pools.nbytes == sum(h.cache for h in held.values())


HEAD_FIRST = """  - place:
      rules:
        "lm_head": gpu
        "*.experts": cpu
        "*": gpus
"""


@pytest.mark.parametrize(("order", "more"), [("1", ""), ("12", ""), ("123", ""), ("121", HEAD_FIRST)])
def test_a_step_is_a_part_for_each_gpu(order: str, more: str, tmp_path: Path) -> None:
    """One after the other, with the residual stream and what all layers read copied between; the same tokens."""
    rules = without_planes(tmp_path)
    rules.write_text(rules.read_text() + more)
    model = load(target=machine(len(set(order))), dtype="fp32", context=64, rules=rules)
    one, other = model.new_cache(2), model.new_cache(2)
    graph = graph_of(model, other, last=_sampled)
    names = [f"cpu:{i}" for i in order]
    assert [str(part.device) for part in graph.parts] == names
    for name, part in zip(names, graph.parts, strict=True):
        for node in part.gm.graph.nodes:
            step = part.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            assert str(getattr(step, "device", name)) == name
        assert not any(n.target is copy_to for n in part.gm.graph.nodes)
    check_choices(model, one, graph, other, (0.0, 3.0, 0.7))
    for a, b in zip(one.pools, other.pools, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    graph.close()


def test_prompts_on_the_streams_of_several_gpus(model: Any) -> None:
    streamed = StreamedStep(model.phases["prefill"], torch.device("cpu:1"), 16)
    one, other = model.new_cache(2), model.new_cache(2)
    check_streamed(model, one, streamed, other, [7, 5])
    streamed.close()


def test_the_default_rules() -> None:
    assert Place().rules == RULES
    with pytest.raises(RulesError, match=r"no device 'gpuz'"):
        rewritten(captured("deepseek_v3"), machine(2), Fold(), Place({"*": "gpuz"}))
