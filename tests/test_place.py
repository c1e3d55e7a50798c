"""place: every region gets the device of the first rule that matches its module path."""

import re
from fnmatch import fnmatchcase

import pytest
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPU, TWO, captured, plan, rewritten, with_capacity
from strategies import models, placements

from ktcompile import CapacityError, RulesError, regions
from ktcompile.passes.fold import Fold
from ktcompile.passes.place import Place


def refused(rules: dict[str, str], name: str = "deepseek_v3") -> str:
    with pytest.raises(RulesError) as error:
        rewritten(captured(name), GPU, Fold(), Place(rules))
    return f"{error.value}\n"


def test_page(golden: Golden) -> None:
    rules = {"layers.1.mlp.experts": "gpu", "*.experts": "cpu", "*": "gpu"}
    golden("first_experts_on_gpu", plan("deepseek_v3", GPU, Fold(), Place(rules))[-1].text())


def test_what_it_changes(golden: Golden) -> None:
    before, after = plan("deepseek_v3", GPU, Fold(), Place(), every=True)
    golden("diff", after.diff(before) + "\n")


def _expanded(glob: str) -> list[str]:
    """Braces by another way than the product's: `{a,b}` and `{1..3}` as all their plain globs."""
    found = re.search(r"\{(.*?)\}", glob)
    if not found:
        return [glob]
    bounds = found[1].split("..")
    words = [str(i) for i in range(int(bounds[0]), int(bounds[1]) + 1)] if len(bounds) == 2 else found[1].split(",")
    return [g for word in words for g in _expanded(glob.replace(found[0], word, 1))]


@given(data=st.data(), name=models)
@settings(max_examples=15)
def test_first_match_wins(data: st.DataObject, name: str) -> None:
    rules = data.draw(placements(name))
    gm, _ = rewritten(captured(name), TWO, Fold(), Place(rules))
    for region in regions(gm):
        hit = next(g for g in rules if any(fnmatchcase(f".{region.path}", f"*.{plain}") for plain in _expanded(g)))
        assert (region.device, region.home) == (rules[hit], rules[hit]), f"{region.path} by {hit}"


def test_a_page_pool_follows_its_attention() -> None:
    gm, _ = rewritten(captured("deepseek_v3"), TWO, Fold(), Place({"layers.1.*": "cpu:1", "*": "cpu"}))
    pools = {n.meta["input"]: n.meta["device"] for n in gm.graph.nodes if n.op == "placeholder" and n.meta.get("state")}
    assert sorted(pools.values()) == ["cpu", "cpu", "cpu:1"]
    assert next(d for i, d in pools.items() if "layers.1." in i) == "cpu:1"


def test_an_unknown_device(golden: Golden) -> None:
    golden("unknown_device", refused({"*.experts": "cuda:1", "*": "gpu"}) + refused({"*": "GPU"}))


def test_a_rule_that_matches_nothing(golden: Golden) -> None:
    golden("matches_nothing", refused({"*.mlp.expert": "cpu", "*": "gpu"}) + refused({"decoder.*": "cpu", "*": "gpu"}))


def test_a_region_without_a_rule(golden: Golden) -> None:
    golden("no_rule", refused({"*.experts": "cpu"}))


def test_too_small(golden: Golden) -> None:
    with pytest.raises(CapacityError) as error:
        rewritten(captured("deepseek_v3"), with_capacity(GPU, cuda_0=100 << 10), Fold(), Place())
    golden("too_small", f"{error.value}\n")


def test_it_needs_a_folded_graph() -> None:
    with pytest.raises(RulesError, match="place requires folded, which no earlier pass establishes"):
        rewritten(captured("deepseek_v3"), GPU, Place())
