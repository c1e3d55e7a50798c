"""The Triton router agrees with `ktrans::router`, which agrees with Hugging Face's modules.

On a GPU if there is one, else in Triton's interpreter; `test_compiles_for_hopper` needs neither.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, GPU, captured, rewritten
from test_triton_mla import DEVICE, H100, HERE, SIMULATED, Recorder, randn, run_here
from test_triton_norm import CHOICE
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from ktcompile import Device, Target, load, regions
from ktcompile.backends import triton_norm
from ktcompile.backends import triton_router as kernels
from ktcompile.backends.triton_language import triton
from ktcompile.capture import capture
from ktcompile.kernel import available, refusal
from ktcompile.ops import router as op
from ktcompile.ops.router import RouterShape, Rule, follows_rule
from ktcompile.ops.router import router as definition
from ktcompile.passes.fold import Fold
from ktcompile.passes.place import Place
from ktcompile.passes.prune_experts import PruneExperts
from ktcompile.target import detect
from ktcompile.verify import wrong_binding

ON_GPU = Target((Device("cpu:1", "cuda", 1 << 34, 1e12), Device("cpu", "cpu", 1 << 34, 1e11)))
"""Its GPU is the CPU."""

V3 = Rule("sigmoid", "bias", 8, 4, "top2", eps=1e-20, scaling=2.5)


def defined(x: Tensor, weight: Tensor, bias: Tensor | None, s: RouterShape) -> tuple[Tensor, Tensor]:
    r = s.rule
    assert r is not None
    rest = (r.groups, r.groups_kept, r.group_score, r.fill, r.eps, r.scaling, r.logits, r.dtype)
    return definition(x, weight, bias, s.top_k, s.normalised, r.scoring, *rest)


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    """Equal experts in any order, with their scores."""
    (a, i), (b, j) = got, want
    assert a.shape == b.shape and a.dtype == b.dtype and i.dtype == torch.int64
    (i, at), (j, bt) = i.sort(-1), j.sort(-1)
    assert torch.equal(i, j)
    torch.testing.assert_close(a.gather(-1, at), b.gather(-1, bt), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ Hugging Face


def hugging_face(name: str, dtype: torch.dtype) -> tuple[Any, RouterShape]:
    """A router of Hugging Face's with random weights, and what should be bound for it."""
    config: PretrainedConfig
    if name == "v3":
        config = DeepseekV3Config(
            hidden_size=100, n_routed_experts=48, num_experts_per_tok=6, n_group=6, topk_group=3, norm_topk_prob=True
        )
        module: nn.Module = DeepseekV3TopkRouter(config)
        rule = replace(V3, groups=6, groups_kept=3)
        shape = RouterShape(48, 6, 0, 1, True, rule)
    elif name.startswith("v2"):
        method = name.removeprefix("v2_")
        config = DeepseekV2Config(
            hidden_size=100, n_routed_experts=60, num_experts_per_tok=6, n_group=5, topk_group=2, topk_method=method,
            routed_scaling_factor=1.5, num_attention_heads=4,
        )  # fmt: skip
        module = DeepseekV2TopkRouter(config)
        rule = Rule("softmax", scaling=1.5)
        if method != "greedy":
            rule = replace(rule, groups=5, groups_kept=2, fill=0.0)
        shape = RouterShape(60, 6, 0, 1, False, rule)
    elif name == "qwen3":
        config = Qwen3MoeConfig(hidden_size=100, num_experts=60, num_experts_per_tok=4, norm_topk_prob=True)
        module = Qwen3MoeTopKRouter(config)
        shape = RouterShape(60, 4, 0, 1, True, Rule("softmax", logits=dtype, dtype=dtype))
    else:
        config = MixtralConfig(hidden_size=100, num_local_experts=8, num_experts_per_tok=2)
        module = MixtralTopKRouter(config)
        shape = RouterShape(8, 2, 0, 1, True, Rule("softmax", logits=dtype))
    module.to(DEVICE, dtype)
    nn.init.normal_(module.weight, 0, 0.1)
    if name == "v3":
        nn.init.normal_(module.e_score_correction_bias, 0, 0.1)
    return module, shape


NAMES = ("v3", "v2_greedy", "v2_group_limited_greedy", "qwen3", "mixtral")


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_is_hugging_faces(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module, shape = hugging_face(name, dtype)
        x = randn(20, 100, dtype=dtype)
        bias = getattr(module, "e_score_correction_bias", None)
        with torch.no_grad():
            _, scores, ids = module(x)
            assert scores.dtype == shape.rule.dtype  # type: ignore[union-attr]
            same(defined(x, module.weight, bias, shape), (scores, ids), 1e-6)


@HERE
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("name", NAMES)
def test_hugging_face(name: str, tokens: int) -> None:
    module, shape = hugging_face(name, torch.float32)
    x = randn(tokens, 100)
    with torch.no_grad():
        _, scores, ids = module(x)
        same(kernels.route(x, module.weight, getattr(module, "e_score_correction_bias", None), shape), (scores, ids))


@HERE
@pytest.mark.parametrize("name", NAMES)
def test_hugging_face_in_bfloat16(name: str) -> None:
    """The tokens whose choice hangs on no rounding: with every logit moved by one part in 64 it stays."""
    module, shape = hugging_face(name, torch.bfloat16)
    x, weight = randn(20, 100, dtype=torch.bfloat16), module.weight.detach()
    bias = getattr(module, "e_score_correction_bias", None)
    with torch.no_grad():
        _, scores, ids = module(x)
        got, found = kernels.route(x, weight, bias, shape)
    sure = torch.ones(20, dtype=torch.bool, device=DEVICE)
    for seed in range(5):
        torch.manual_seed(seed)
        other = weight.float() * (1 + randn(weight.shape[0], 1) / 64)
        sure &= (defined(x.float(), other, bias, exact(shape))[1].sort(-1)[0] == ids.sort(-1)[0]).all(-1)
    assert sure.sum() >= 3
    same((got[sure], found[sure]), (scores[sure], ids[sure]), 2e-2)


def exact(shape: RouterShape) -> RouterShape:
    assert shape.rule is not None
    return replace(shape, rule=replace(shape.rule, logits=torch.float32))


# ------------------------------------------------------------------------------------------------ sizes and ties


@HERE
@settings(max_examples=15)
@given(
    size=st.sampled_from([(256, 8, 4), (60, 1, 1), (60, 5, 2), (160, 8, 3), (384, 1, 1), (8, 1, 1), (6, 3, 1)]),
    tokens=st.sampled_from([0, 1, 2, 3, 5, 33]),
    width=st.sampled_from([1, 60, 1024, 1100]),
    top_k=st.sampled_from([1, 2, 6, 8]),
    scoring=st.sampled_from(["sigmoid", "softmax"]),
    group_score=st.sampled_from(["max", "top2"]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_any_size(
    size: tuple[int, int, int],
    tokens: int,
    width: int,
    top_k: int,
    scoring: Any,
    group_score: Any,
    options: tuple[bool, bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    experts, groups, kept = size
    with_bias, normalised, wide = options
    rule = Rule(scoring, "bias" if with_bias else None, groups, kept, group_score, 0.0, 1e-20, 1.7)
    shape = RouterShape(experts, min(top_k, experts // groups * kept), 0, 1, normalised, rule)
    x, weight = randn(tokens, width), randn(experts, width) / width**0.5
    bias = randn(experts).abs() if with_bias else None
    got = kernels.route(x[None] if wide else x, weight, bias, shape)
    same(got, defined(x, weight, bias, shape))


@HERE
def test_strides() -> None:
    shape = RouterShape(16, 4, 0, 1, True, replace(V3, groups=4, groups_kept=2))
    big, weight, bias = randn(6, 80, 4), randn(16, 40) / 6, randn(16) / 9
    for x in (big[:, ::2, 0], big[:, 20:60, 1], big.transpose(1, 2)[..., 40:], randn(3, 120)[:, 40:80]):
        same(kernels.route(x, weight, bias, shape), defined(x, weight, bias, shape))


@HERE
def test_ties_go_to_the_lowest_id() -> None:
    """All experts are equal: groups 0 and 1, and in these the first experts in order; also with a bias that ties."""
    shape = RouterShape(24, 5, 0, 1, True, Rule("sigmoid", "bias", 6, 2, "top2"))
    x, weight = randn(3, 40), torch.zeros(24, 40, device=DEVICE)
    for bias in (torch.zeros(24), torch.full((24,), -0.7)):
        scores, ids = kernels.route(x, weight, bias.to(DEVICE), shape)
        assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
        torch.testing.assert_close(scores, torch.full_like(scores, 0.2))


@HERE
def test_not_a_number_never_leaves_the_experts() -> None:
    x, weight = torch.full((2, 40), float("nan"), device=DEVICE), randn(256, 40)
    for rule in (V3, Rule("softmax"), Rule("softmax", None, 8, 1, fill=0.0)):
        bias = None if rule.bias is None else randn(256)
        _, ids = kernels.route(x, weight, bias, RouterShape(256, 8, 0, 1, True, rule))
        for row in ids.tolist():
            assert len(set(row)) == 8 and set(row) <= set(range(256))


def test_refusals() -> None:
    weight, x = torch.zeros(256, 40), torch.zeros(1, 40)
    for given_weight, shape in (
        (weight, RouterShape(256, 8, 0, 1, True)),
        (weight[:9], RouterShape(256, 8, 0, 1, True, V3)),
    ):
        with pytest.raises(ValueError, match="not of RouterShape"):
            kernels.route(x, given_weight, None, shape)


# ------------------------------------------------------------------------------------------------ bindings


def bound(name: str, *passes: Any) -> Any:
    gm = rewritten(captured(name), ON_GPU, Fold(), *passes, Place({"*": "cpu:1"}))[0]
    return next(iter(regions(gm, op="router")))


def test_rule_of_deepseek() -> None:
    region = bound("deepseek_v3")
    rule = replace(V3, bias="e_score_correction_bias", groups=4, groups_kept=2)
    assert region.binding.shape == RouterShape(16, 4, 1, 0, True, rule)
    assert refusal(kernels.TritonRouter(), region, ON_GPU) is None


class Gate(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate = router

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, scores, ids = self.gate(x)
        return scores, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_rules_are_read_from_the_code(name: str, dtype: torch.dtype) -> None:
    router, wanted = hugging_face(name, dtype)
    gate = Gate(router.cpu())
    gm = capture(lambda x: gate(x), (torch.randn(2, 5, 100).to(dtype),))
    (region,) = regions(rewritten(gm, ON_GPU, Fold())[0], op="router")
    found = region.binding.shape
    assert wanted.rule is not None and found.normalised == wanted.normalised
    assert found.rule == replace(wanted.rule, bias=wanted.rule.bias and "e_score_correction_bias")


@pytest.mark.parametrize("name", CONFIGS)
def test_families(name: str) -> None:
    """All but gpt-oss, which chooses by logits and has its softmax over the chosen."""
    why = refusal(kernels.TritonRouter(), bound(name), ON_GPU)
    assert why == ("its captured code follows no rule that is understood" if name == "gpt_oss" else None)


WRONG: dict[str, dict[str, Any]] = {
    "scaling": {"scaling": 1.0},
    "scoring": {"scoring": "softmax"},
    "groups": {"groups": 1, "groups_kept": 1},
    "groups kept": {"groups_kept": 1},
    "type": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rules_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that the code does not follow is dropped; what else is known of the router stays."""
    region = next(iter(regions(rewritten(captured("deepseek_v3"), GPU, Fold())[0], op="router")))
    assert wrong_binding(region) is None
    right = op._rule

    def mistaken(*args: Any) -> Rule:
        rule = right(*args)
        assert rule is not None
        return replace(rule, **WRONG[wrong])

    monkeypatch.setattr(op, "_rule", mistaken)
    gm, _ = rewritten(captured("deepseek_v3"), GPU, Fold())
    shapes = {r.binding.shape for r in regions(gm, op="router")}
    assert shapes == {RouterShape(16, 4, 1, 0, True)}


def test_pruning() -> None:
    """Fewer experts from the start is the same rule; dropping some afterwards is another router."""
    region = bound("deepseek_v3", PruneExperts(keep=2))
    assert region.binding.shape.top_k == 2 and follows_rule(region.body, region.binding.shape)
    assert wrong_binding(region) is None
    region = bound("deepseek_v3", PruneExperts(keep=2, ranking="weight"))
    why = refusal(kernels.TritonRouter(), region, ON_GPU)
    assert why == "a pass changed which of the chosen experts are kept"


# ------------------------------------------------------------------------------------------------ the embedded model


@HERE
@SIMULATED
def test_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A prefill and three steps, all norms and routers in Triton, attention not (slow here): the logits of the CPU."""
    found = available() | {"triton_norm": triton_norm.TritonNorm(), "triton_router": kernels.TritonRouter()}
    monkeypatch.setattr("ktcompile.passes.choose_kernels.available", lambda: found)
    monkeypatch.setattr("ktcompile.model.available_kernels", lambda: found)
    host = detect().host
    rules = tmp_path / "rules.yaml"
    slow = {"linear": ("reference",), "mlp": ("reference",)}
    lists = "".join(f"        {op}: [{', '.join(names)}]\n" for op, names in (CHOICE | slow).items())
    rules.write_text(
        f"extends: deepseek-v3\npipeline:\n  - choose-kernels:\n      mla: [reference]\n      ops:\n{lists}"
    )
    target = Target((Device("cpu:1", "cuda", 1 << 30, 1e12), host))
    given = load(target=target, rules=rules, dtype="fp32", context=256)
    for phase in ("prefill", "decode"):
        rows = given.plans[phase].rows
        assert {r.kernel for r in rows if r.op == "norm"} == {"triton_norm"}
        assert {r.kernel for r in rows if r.op == "router"} == {"triton_router"}
    ids = torch.randint(2, 6000, (6,), generator=torch.Generator().manual_seed(0))
    want = stepwise(load(target=Target((host,)), dtype="fp32", context=256), ids)
    got = stepwise(given, ids)
    off = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert off.max() <= 1e-4, off


def stepwise(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a prefill of all but three tokens, then of one token a step."""
    given: Any = model
    pools, first = given.new_cache(1), len(ids) - 3
    found = [given.step(ids[:first], torch.arange(first), [first], torch.arange(first), pools)]
    for i in range(first, len(ids)):
        found.append(given.step(ids[i : i + 1], torch.arange(i, i + 1), [1], torch.tensor([0]), pools))
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------ the compiler


def test_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\n"
    code += "from ktcompile.backends import triton_router as m; print(m.TritonRouter().missing(), m.interpreted())"
    assert run_here(code) == "triton is not installed False\n"


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """Both kernels as DeepSeek-V3's and V2's router and Qwen3-MoE's launch them."""
    code = "import test_triton_router as t; t.compile_for_hopper()"
    lines = run_here(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == ["_logits", "_select"] * 3 + ["_select"], lines
    assert all(int(line.split()[1]) <= H100.shared_bytes for line in lines), lines


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    here: Any = kernels
    here._logits, here._select = Recorder(here._logits), Recorder(here._select)
    half = torch.bfloat16
    for tokens, experts, width, rule, top_k, types in (
        (1, 256, 7168, V3, 8, (half, torch.float32)),
        (5, 160, 5120, Rule("softmax", None, 8, 3, fill=0.0), 6, (half, half)),
        (2, 60, 2048, Rule("softmax", logits=half, dtype=half), 4, (half, half)),
        (64, 384, 512, replace(V3, groups=1, groups_kept=1), 8, (half, half)),
    ):
        x, weight = torch.randn(tokens, width).to(types[0]), torch.randn(experts, width).to(types[1])
        bias = torch.randn(experts) if rule.bias else None
        kernels.route(x, weight, bias, RouterShape(experts, top_k, 0, 1, True, rule))
