"""fold: one region a module call, with its captured code as body."""

import pytest
import torch
from conftest import Golden
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIGS, GPU, captured, captured_plain, captured_user, plan, rewritten
from strategies import models, phases
from torch import nn

from ktcompile import OPS, bind, fold, regions
from ktcompile.capture import annotate, capture
from ktcompile.graph import GLUE
from ktcompile.ops.moe import Clamp
from ktcompile.passes.fold import Fold


def why_not(name: str, experts: str) -> str:
    """The notes of fold on a user's own model."""
    _, ctx = rewritten(captured_user(name, experts).gm, GPU, Fold())
    return "".join(f"{n.path}: {n.why}\n" for n in ctx.notes)


def test_page(golden: Golden) -> None:
    golden("deepseek_v3", plan("deepseek_v3", GPU, Fold())[-1].text())


def test_page_of_keys_and_values(golden: Golden) -> None:
    golden("qwen3_moe", plan("qwen3_moe", GPU, Fold(), phase="prefill")[-1].text())


@given(name=models, phase=phases, known=st.sets(st.sampled_from([*OPS, "experts"])))
def test_any_subset_of_ops_computes_the_same(name: str, phase: str, known: set[str]) -> None:
    """A region is its captured code: what `bind` understands decides where it is cut, never what it computes."""
    plain = captured_plain(name, phase)  # type: ignore[arg-type]

    def some(site):  # type: ignore[no-untyped-def]
        bound = bind(site)
        return bound if bound is not None and bound.op in known else None

    folded, _ = fold(plain.gm, some)
    assert {r.op for r in regions(folded)} <= known | {GLUE}
    assert all(map(torch.equal, plain.run(), plain.run_rewritten(folded)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_in_a_region_and_equal_layers_share_their_body(name: str) -> None:
    folded, _ = rewritten(captured(name), GPU, Fold())
    read = {w for r in regions(folded) for w in r.weights.values()}
    assert read == {n for n in folded.graph.nodes if "weight" in n.meta and n.users}
    moe = list(regions(folded, op="moe"))
    assert len(moe) >= 1 and len({id(r.body) for r in moe}) == 1
    assert len(list(regions(folded, op="router"))) == len(moe)


def test_experts_with_biases_keep_their_captured_code(golden: Golden) -> None:
    golden("gpt_oss", why_not("gpt_oss", "grouped_mm"))


def test_experts_with_biases_are_moe_where_our_marker_has_them() -> None:
    plain = captured_user("gpt_oss", "ktrans")
    folded, _ = rewritten(plain.gm, GPU, Fold())
    found = list(regions(folded, op="moe"))
    assert len(found) == 2 and {r.binding.shape.clamp for r in found} == {Clamp(1.702, 7.0)}
    assert found[0].matrix_shape("gate_up_proj") == (8, 64, 64) and found[0].matrix_shape("down_proj") == (8, 64, 32)
    assert torch.equal(plain.run()[0], captured_user("gpt_oss", "grouped_mm").run()[0])


def test_a_dynamic_cache_is_the_reason_that_attention_stays(golden: Golden) -> None:
    golden("dynamic_cache", why_not("deepseek_v3", "grouped_mm"))


class _GateExperts(nn.Module):
    """Experts of two whose gate is clamped, as those of DeepSeek-V4: it looks like `moe`, and is not."""

    def __init__(self, clamp: bool) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 8, 4)), nn.Parameter(torch.ones(2, 4, 4))
        self.clamp = clamp

    def forward(self, x, ids, scores):  # type: ignore[no-untyped-def]
        gate, up = torch.bmm(self.gate_up_proj[ids[:, 0]], x[:, :, None]).squeeze(-1).chunk(2, -1)
        gate = gate.clamp(max=1.0) if self.clamp else gate
        hidden = nn.functional.silu(gate) * up
        return torch.bmm(self.down_proj[ids[:, 0]], hidden[:, :, None]).squeeze(-1) * scores


class _Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args):  # type: ignore[no-untyped-def]
        return (self.inner(*args),)


@pytest.mark.parametrize("clamp", [False, True])
def test_a_gate_of_its_own_is_refused(clamp: bool) -> None:
    module = _Around(_GateExperts(clamp))
    gm = capture(lambda *a: module(*a), (torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)))
    folded, refusals = fold(gm, bind)
    assert [r.op for r in regions(folded)] == ["experts" if clamp else "moe"]
    assert [why for _, why in refusals] == (
        ["not moe: it does not compute act(gate) * up and nothing else between its products"] if clamp else []
    )


class _Twice(nn.Module):
    """Calls one norm twice, with other code in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return (self.norm(self.norm(x).relu()),)


def test_a_module_called_twice_is_not_one_region() -> None:
    module = _Twice()
    gm = capture(lambda x: module(x), (torch.ones(2, 4),))
    annotate(gm)
    folded, refusals = fold(gm, bind)
    assert refusals in ([], [("norm", "not norm: other code runs between its first and last operation")])
    x = torch.randn(2, 4)
    inputs = [
        x if "input" in n.meta else dict(module.named_parameters())[n.meta["weight"]]
        for n in folded.graph.nodes
        if n.op == "placeholder"
    ]
    with torch.no_grad():
        assert torch.equal(torch.fx.Interpreter(folded).run(*inputs)[0], module(x)[0])
