"""Sums between layers and logits are float32 where the model has 16 bits; all else stays, and so do fp32 models."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, GPU, Phase, captured, captured_plain, checkpoint, config, rewritten
from models import settings as compiled_for
from strategies import models, phases, placements
from test_fuse_norms import FUSED, REFERENCE
from test_simulated_gpu import gpu
from test_triton_mla import HERE, SIMULATED
from test_triton_norm import ON_GPU
from torch import Tensor, fx, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from ktcompile import Context, Region, regions, value_of
from ktcompile.capture import annotate, annotate_weights, empty_model
from ktcompile.model import capture_phase, load
from ktcompile.ops import plain
from ktcompile.passes.fold import Fold
from ktcompile.passes.fuse_norms import FuseNorms
from ktcompile.passes.insert_copies import InsertCopies
from ktcompile.passes.place import Place
from ktcompile.passes.widen import Widen

BF16 = torch.bfloat16


@cache
def narrow(name: str, phase: Phase = "decode") -> fx.GraphModule:
    """The annotated graph that `ktcompile.load` makes of a model in bf16."""
    given = replace(compiled_for(GPU), dtype=BF16)
    return capture_phase(empty_model(config(name), BF16), phase, given, checkpoint(name))


def types(region: Region) -> set[torch.dtype]:
    value = value_of(region.node)
    return {v.dtype for v in (value if isinstance(value, tuple) else (value,))}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str) -> None:
    """All sums of layers, and the logits. What is between them is of 16 bits, and equal code is still one."""
    gm, ctx = rewritten(narrow(name), GPU, Fold(), Widen())
    assert not any(n.by == "widen" for n in ctx.notes)
    sums = list(regions(gm, "*residual*"))
    assert len(sums) == 2 * config(name).num_hidden_layers and all(types(r) == {torch.float32} for r in sums)
    norms = [r for r in regions(gm, op="norm") if any("residual" in str(i.meta.get("path")) for i in r.inputs)]
    assert len(norms) == len(sums) and all(types(r) == {BF16} for r in norms)
    assert len({r.node.target for r in sums}) == 1 and len({r.node.target for r in norms}) == 1
    (head,) = regions(gm, "lm_head")
    assert types(head) == {torch.float32} and [u.op for u in head.node.users] == ["output"]
    inside = [r for op in ("mla", "gqa", "moe", "mlp", "embed") for r in regions(gm, op=op)]
    assert all(types(r) == {BF16} for r in (*inside, *regions(gm, "*.mlp.sum")))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_fp32_stays(name: str) -> None:
    gm, _ = rewritten(captured(name), GPU, Fold())
    ctx, before = Context(GPU), str(gm.graph)
    assert str(Widen().run(gm, ctx).graph) == before
    assert [n.why for n in ctx.notes] == ["no sum of layers, and no logits, of 16 bits"]


@given(name=models, data=st.data())
@settings(max_examples=4)
def test_twice_changes_nothing(name: str, data: st.DataObject) -> None:
    gm, _ = rewritten(narrow(name, data.draw(phases)), GPU, Fold(), Widen())
    before = str(gm.graph)
    assert str(Widen().run(gm, Context(GPU)).graph) == before


@given(data=st.data(), name=models, phase=phases)
@settings(max_examples=8)
def test_any_placement_is_nearer_to_float32(data: st.DataObject, name: str, phase: Any) -> None:
    """And returns what the caller's code returns: bf16 where that does not ask for more."""
    given = captured_plain(name, phase, BF16)
    passes = Fold(), Widen(), Place(data.draw(placements(name))), FuseNorms(), InsertCopies(), REFERENCE
    gm, _ = rewritten(given.gm, ON_GPU, *passes)
    got = given.run_rewritten(gm)
    assert [t.dtype for t in got] == [BF16] * len(got)
    assert all(map(torch.equal, got, given.run_lowered(gm, ON_GPU)))
    want = _in_float32(name, phase)
    before, after = (float((t.float() - want).norm() / want.norm()) for t in (given.run()[0], got[0]))
    assert after < before, f"{before:.1e} before, {after:.1e} after"


@cache
def _in_float32(name: str, phase: Any) -> Tensor:
    """Logits of the bf16 model's weights in float32 arithmetic, from a cache that holds what the bf16 model wrote."""
    narrow, wide = captured_plain(name, phase, BF16), captured_plain(name, phase)
    of = {str(n.meta.get("weight", n.meta.get("input"))): a for n, a in zip(narrow.nodes, narrow.fresh(), strict=True)}
    args = [
        a if not isinstance(a, Tensor) else of[str(n.meta.get("weight", n.meta.get("input")))].to(a.dtype)
        for n, a in zip(wide.nodes, wide.args, strict=True)
    ]
    with torch.no_grad():
        found: Tensor = wide.gm(*args)[0]
    return found


@HERE
@SIMULATED
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_kernels_of_a_gpu(name: str, phase: Any) -> None:
    given = captured_plain(name, phase, BF16)
    gm = rewritten(given.gm, ON_GPU, Fold(), Widen(), Place({"*": "cpu:1"}), FuseNorms(), InsertCopies(), FUSED)[0]
    fused = list(regions(gm, op="add_norm"))
    assert {r.kernel for r in fused} == {"triton_add_norm"} and all(types(r) == {torch.float32, BF16} for r in fused)
    got, want = given.run_lowered(gm, ON_GPU)[0], given.run()[0]
    assert float((got.float() - want.float()).norm() / want.float().norm()) < 2e-2


@HERE
@SIMULATED
def test_the_head_of_a_gpu(tmp_path: Path) -> None:
    """From planes, of one token and of several, as from decoded weights; the page and the step say float32."""
    ids, found = torch.arange(40, 43), {}
    for kernel in ("triton_linear", "reference"):
        rules = tmp_path / f"{kernel}.yaml"
        rest = "norm: [reference], add-norm: [reference], router: [reference], mla: [reference], mlp: [reference]"
        rules.write_text(f"extends: base\npipeline:\n  - choose-kernels: {{linear: [{kernel}], {rest}}}\n")
        model = load(target=gpu(1 << 30), rules=rules, dtype="bf16", context=64)
        (head,) = (r for r in model.plans["decode"].rows if r.op == "linear")
        assert head.kernel == kernel and head.type == "f32[1,1,6144]"
        cache = model.new_cache(1)
        first = model.step(ids, torch.arange(3), [3], torch.arange(3), cache)
        found[kernel] = torch.cat([first, model.step(ids[:1], torch.tensor([3]), [1], torch.tensor([0]), cache)])
    got, want = found["triton_linear"], found["reference"]
    assert got.dtype == want.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())
    assert float((got - want).norm() / want.norm()) < 1e-2


# ------------------------------------------------------------------------------------------------ what stays


class Sums(nn.Module):
    """Norms and a head, wired as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(32, 40, bias=kind == "bias")
        self.norm: nn.Module = nn.LayerNorm(32) if kind == "other norm" else DeepseekV3RMSNorm(32)

    def forward(self, x: Tensor, r: Tensor) -> Any:
        total = x + r
        found = self.head(self.norm(total))
        if self.kind == "result":
            return total, found
        if self.kind == "two readers":
            return found.float(), found
        return (found * 2).float() if self.kind == "no linear" else found.float()


def folded(kind: str) -> tuple[fx.GraphModule, nn.Module]:
    found: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch.compiler.reset()
    model = Sums(kind).to(BF16)
    with torch.no_grad():
        torch.compile(model, backend=record, dynamic=False)(*torch.randn(2, 3, 32, dtype=BF16))
    annotate(found[0])
    annotate_weights(found[0], None)
    return rewritten(found[0], ON_GPU, Fold())[0], model


@pytest.mark.parametrize(
    ("kind", "why"),
    {
        "other norm": {"is read by norm, which is no RMSNorm and no sum"},
        "result": {"is a result, or read outside of regions"},
        "two readers": {"head is read by others too"},
        "no linear": {"makes float32 of more than a linear's result"},
        "bias": set(),
    }.items(),
)
def test_what_stays_is_told(kind: str, why: set[str]) -> None:
    gm, model = folded(kind)
    ctx = Context(ON_GPU)
    made = Widen().run(gm, ctx)
    assert {n.why for n in ctx.notes} == why
    made.recompile()
    given = dict(zip("xr", torch.randn(2, 3, 32, dtype=BF16), strict=True))
    weights = {k: v.detach() for k, v in model.named_parameters()}
    nodes = [n for n in made.graph.nodes if n.op == "placeholder"]
    args = [weights[n.meta["weight"]] if "weight" in n.meta else given[n.meta["input"]] for n in nodes]
    with torch.no_grad():
        got, want = fx.Interpreter(made).run(*args), model(**given)
    for a, b in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------------------------ the op


@given(
    rows=st.sampled_from([(), (0,), (1,), (2, 3)]),
    shape=st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 64])),
    dtype=st.sampled_from([BF16, torch.float16, torch.float32]),
    wanted=st.sampled_from([BF16, torch.float32]),
    has_bias=st.booleans(),
    block=st.sampled_from([1, 100, 1 << 20]),
)
def test_linear(rows: Any, shape: tuple[int, int], dtype: Any, wanted: Any, has_bias: bool, block: int) -> None:
    x, weight = torch.randn(*rows, shape[1]).to(dtype), torch.randn(*shape).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_BLOCK", block)
        got = torch.ops.ktrans.linear(x, weight, bias, wanted)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert got.dtype == wanted and got.shape == (*rows, shape[0])
    tolerance = 2**-7 if BF16 in (wanted,) else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=10 * tolerance)
