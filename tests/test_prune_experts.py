"""prune-experts: fewer experts a token than the model was trained with, chosen in one of two ways."""

from copy import deepcopy

import pytest
import torch
from conftest import Golden
from hypothesis import given
from hypothesis import strategies as st
from models import GPU, TWO, captured, captured_plain, captured_user, plan, real, rewritten
from strategies import phases
from torch import Tensor, nn

from ktcompile import RulesError, regions
from ktcompile.passes.choose_kernels import ChooseKernels
from ktcompile.passes.fold import Fold
from ktcompile.passes.insert_copies import InsertCopies
from ktcompile.passes.place import Place
from ktcompile.passes.prune_experts import PruneExperts, keep_largest

FAMILIES = ("deepseek_v3", "deepseek_v2", "qwen3_moe", "mixtral", "glm4_moe")


def test_page(golden: Golden) -> None:
    passes = (Fold(), PruneExperts(2), Place(), InsertCopies(), ChooseKernels(moe=("reference",)))
    golden("keep_2", plan("deepseek_v3", GPU, *passes)[-1].text())


def test_what_it_changes(golden: Golden) -> None:
    before, after = plan("deepseek_v3", GPU, Fold(), PruneExperts(2), every=True)
    golden("diff", after.diff(before) + "\n")


def with_top_k(name: str, keep: int) -> nn.Module:
    """Hugging Face's model with the same weights, made to use `keep` experts a token."""
    model = deepcopy(real(name))
    model.config.num_experts_per_tok = keep
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = keep
    return model


@pytest.mark.parametrize(("name", "keep"), [(n, k) for n in FAMILIES for k in (1, 3) if n != "mixtral" or k < 2])
def test_choice_is_the_model_with_a_smaller_top_k(name: str, keep: int) -> None:
    plain = captured_user(name, "ktrans")
    gm, _ = rewritten(plain.gm, TWO, Fold(), PruneExperts(keep))
    ids = next(a for n, a in zip(plain.nodes, plain.args, strict=True) if n.meta.get("input", "").endswith("ids"))
    with torch.no_grad():
        wanted = with_top_k(name, keep)(ids).logits
    before, after = ([o for o in out if o.shape == wanted.shape] for out in (plain.run(), plain.run_rewritten(gm)))
    assert len(after) == 1 and torch.equal(after[0], wanted) and not torch.equal(before[0], wanted)


def with_top_k_of(name: str) -> int:
    return int(real(name).config.num_experts_per_tok)


@given(name=st.sampled_from(FAMILIES), phase=phases, ranking=st.sampled_from(("choice", "weight")))
def test_keeping_all_prunes_nothing(name: str, phase: str, ranking: str) -> None:
    plain = captured_plain(name, phase)  # type: ignore[arg-type]
    gm, ctx = rewritten(plain.gm, TWO, Fold(), PruneExperts(with_top_k_of(name), ranking))  # type: ignore[arg-type]
    notes = [n for n in ctx.notes if n.by == "prune-experts"]
    assert len(notes) == len(list(regions(gm, op="router")))
    assert all("nothing to prune" in n.why for n in notes)
    assert all(map(torch.equal, plain.run(), plain.run_rewritten(gm)))


@given(seed=st.integers(0, 99), tokens=st.integers(1, 5), keep=st.integers(1, 6), normalised=st.booleans())
def test_keep_largest(seed: int, tokens: int, keep: int, normalised: bool) -> None:
    scores = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(seed)) + 0.1
    orders = (torch.Generator().manual_seed(seed + t) for t in range(tokens))
    ids = torch.stack([torch.randperm(16, generator=order)[:6] for order in orders])
    best, kept = keep_largest(scores, ids, keep, normalised)
    for t in range(tokens):
        order = sorted(zip(scores[t].tolist(), ids[t].tolist(), strict=True), reverse=True)[:keep]
        assert kept[t].tolist() == [i for _, i in order]
        ratio = scores[t].sum() / sum(s for s, _ in order) if normalised else 1.0
        torch.testing.assert_close(best[t], Tensor([s * ratio for s, _ in order]))


@pytest.mark.parametrize("ranking", ["choice", "weight"])
def test_costs_know_of_it(ranking: str) -> None:
    passes = (Place(), InsertCopies(), ChooseKernels(moe=("reference",)))
    (whole,) = plan("deepseek_v3", GPU, Fold(), *passes)
    (pruned,) = plan("deepseek_v3", GPU, Fold(), PruneExperts(1, ranking), *passes)  # type: ignore[arg-type]
    us = [next(r.us for r in p.rows if r.op == "moe") for p in (whole, pruned)]
    assert us[0] == pytest.approx(4 * us[1])  # one token: 4 experts of 16, or 1


def refused(keep: int) -> str:
    with pytest.raises(RulesError) as error:
        rewritten(captured("deepseek_v3"), GPU, Fold(), PruneExperts(keep))
    return f"{error.value}\n"


def test_impossible_numbers(golden: Golden) -> None:
    golden("impossible", refused(0) + refused(-1) + refused(17))


def test_off_says_so() -> None:
    _, ctx = rewritten(captured("deepseek_v3"), GPU, Fold(), PruneExperts())
    assert [n.why for n in ctx.notes] == ["off: every expert that the router chooses runs"]


def test_experts_that_are_not_understood_keep_their_router() -> None:
    plain = captured_user("gpt_oss")
    gm, ctx = rewritten(plain.gm, TWO, Fold(), PruneExperts(1))
    why = {n.why for n in ctx.notes if n.by == "prune-experts"}
    assert why == {"its scores are read by something else than one `moe` region"}
    assert torch.equal(plain.run()[0], plain.run_rewritten(gm)[0])
