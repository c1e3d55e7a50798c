"""A sum and its norm are one region on a GPU, which computes the same, and nothing changes elsewhere."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, GPU, captured, captured_plain, config, plan, rewritten
from strategies import models, phases, placements
from test_triton_mla import HERE, SIMULATED
from test_triton_norm import ON_GPU

from ktcompile import Context, Region, RulesError, Target, regions
from ktcompile.graph import join, take_over
from ktcompile.passes import fuse_norms as module
from ktcompile.passes.choose_kernels import ChooseKernels
from ktcompile.passes.fold import Fold
from ktcompile.passes.fuse_norms import FuseNorms
from ktcompile.passes.insert_copies import InsertCopies
from ktcompile.passes.place import Place
from ktcompile.target import Device

CPU = Target((Device("cpu", "cpu", 1 << 34, 1e11),))
OPS = ("moe", "mla", "gqa", "linear", "mlp", "norm", "add_norm", "router", "other")
REFERENCE = ChooseKernels(**dict.fromkeys(OPS, ("reference",)))
FUSED = replace(REFERENCE, norm=("triton_norm",), add_norm=("triton_add_norm",))


def test_page(golden: Golden) -> None:
    passes = Fold(), Place({"*.experts": "cpu", "*": "gpu"}), FuseNorms(), InsertCopies(), ChooseKernels()
    golden("deepseek_v3", plan("deepseek_v3", GPU, *passes)[-1].text())


@given(data=st.data(), name=models, phase=phases)
@settings(max_examples=10)
def test_any_placement_computes_the_same(data: st.DataObject, name: str, phase: Any) -> None:
    """To the last bit, and every norm of a sum is fused or told why not."""
    plain = captured_plain(name, phase)
    passes = Fold(), Place(data.draw(placements(name))), FuseNorms(), InsertCopies(), REFERENCE
    gm, ctx = rewritten(plain.gm, ON_GPU, *passes)
    wanted = plain.run()
    assert all(map(torch.equal, wanted, plain.run_rewritten(gm)))
    assert all(map(torch.equal, wanted, plain.run_lowered(gm, ON_GPU)))
    told = {n.path for n in ctx.notes if n.by == "fuse-norms"}
    for region in regions(gm, op="norm"):
        before = region.inputs[0]
        assert region.path in told or "residual" not in str(before.meta.get("path"))
    assert all(r.device == r.home for r in regions(gm, op="add_norm"))


@given(name=models, data=st.data())
@settings(max_examples=6)
def test_twice_changes_nothing(name: str, data: st.DataObject) -> None:
    gm, _ = rewritten(captured(name), ON_GPU, Fold(), Place(data.draw(placements(name))), FuseNorms())
    before = str(gm.graph)
    assert str(FuseNorms().run(gm, Context(ON_GPU)).graph) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str) -> None:
    """All norms between layers; there is no sum before the first."""
    gm, ctx = rewritten(captured(name), ON_GPU, Fold(), Place({"*": "cpu:1"}), FuseNorms())
    found = list(regions(gm, op="add_norm"))
    layers = config(name).num_hidden_layers
    assert len(found) == 2 * layers and not any(n.by == "fuse-norms" for n in ctx.notes)
    assert not any("residual" in r.path for r in regions(gm))
    assert len({r.node.target for r in found}) <= 2, "equal pairs have one body"


@HERE
@SIMULATED
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_whole_models(name: str, phase: Any) -> None:
    plain = captured_plain(name, phase)
    gm = rewritten(plain.gm, ON_GPU, Fold(), Place({"*": "cpu:1"}), FuseNorms(), InsertCopies(), FUSED)[0]
    assert {r.kernel for r in regions(gm, op="add_norm")} == {"triton_add_norm"}
    for got, want in zip(plain.run_lowered(gm, ON_GPU), plain.run(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ what stays


def notes(target: Target, rules: dict[str, str], options: FuseNorms | None = None) -> set[str]:
    ctx = rewritten(captured("deepseek_v3"), target, Fold(), Place(rules), options or FuseNorms())[1]
    return {n.why for n in ctx.notes if n.by == "fuse-norms"}


def test_what_stays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notes(CPU, {"*": "cpu"}) == {"there is no GPU"}
    assert notes(ON_GPU, {"*norm*": "cpu", "*": "cpu:1"}) == {"reads a sum made on cpu:1"}
    assert notes(ON_GPU, {"*": "cpu"}) == {"triton_add_norm: runs on cuda, the region is on cpu"}
    with pytest.raises(RulesError, match=r"kernel = 'x'|no kernel 'x'"):
        notes(ON_GPU, {"*": "cpu:1"}, FuseNorms("x"))
    monkeypatch.setattr(module, "added", lambda region: False)
    assert any("is not a sum of two values" in n for n in notes(ON_GPU, {"*": "cpu:1"}))


def test_what_is_computed_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A region that is not what it is said to be is left: here its sum is made a difference behind the pass's back."""

    def other(first: Region, second: Region, op: str, binding: Any) -> Region:
        made = join(first, second, op, binding)
        for node in made.body.graph.nodes:
            if getattr(node.target, "__name__", node.target) == "add" and len(node.all_input_nodes) == 2:
                node.target = torch.sub
        made.body.recompile()
        return made

    monkeypatch.setattr(module, "join", other)
    gm, ctx = rewritten(captured("deepseek_v3"), ON_GPU, Fold(), Place({"*": "cpu:1"}), FuseNorms())
    assert not list(regions(gm, op="add_norm")) and len(list(regions(gm, "*residual*")))
    assert all("on random inputs its captured code differs from the op by" in n.why for n in ctx.notes)


def test_pairs_of_equal_code_are_joined_with_one_body() -> None:
    gm, _ = rewritten(captured("deepseek_v3"), ON_GPU, Fold(), Place({"*": "cpu:1"}))
    total = next(regions(gm, "*residual*"))
    norm = next(Region(u) for u in total.node.users if Region(u).op == "norm")
    one, other = (join(total, norm, "add_norm", norm.binding) for _ in range(2))
    assert one.node.target == other.node.target and not one.node.users
    take_over(one, total, norm)
    gm.graph.lint()
    assert [r.path for r in regions(gm, norm.path)] == [norm.path] * 2
