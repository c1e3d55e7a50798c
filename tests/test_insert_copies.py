"""insert-copies: a value that is read on another device goes there once, just before its first use."""

import pytest
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, GPU, TWO, captured, plan, rewritten
from strategies import models, phases, placements
from torch import fx

from ktcompile import PassError, RulesError, copies, device_of, is_scalar, regions
from ktcompile.passes.fold import Fold
from ktcompile.passes.insert_copies import InsertCopies
from ktcompile.passes.place import Place


def test_page(golden: Golden) -> None:
    golden("experts_on_cpu", plan("deepseek_v3", GPU, Fold(), Place(), InsertCopies())[-1].text())


def test_what_it_changes(golden: Golden) -> None:
    _, before, after = plan("qwen3_moe", GPU, Fold(), Place(), InsertCopies(), every=True)
    golden("diff", after.diff(before) + "\n")


@given(data=st.data(), name=models, phase=phases)
@settings(max_examples=8)
def test_as_many_copies_as_crossings(data: st.DataObject, name: str, phase: str) -> None:
    """A copy for each (value, other device that reads it), no more, and each at its first reader."""
    rules = data.draw(placements(name))
    before, _ = rewritten(captured(name, phase), TWO, Fold(), Place(rules))  # type: ignore[arg-type]
    wanted = {
        (v.name, r.device)
        for r in regions(before)
        for v in r.inputs
        if not is_scalar(v) and device_of(v) not in (None, r.device)
    }
    output = next(n for n in before.graph.nodes if n.op == "output")
    wanted |= {(v.name, "cpu") for v in output.all_input_nodes if device_of(v) not in (None, "cpu")}
    gm, _ = rewritten(captured(name, phase), TWO, Fold(), Place(rules), InsertCopies())  # type: ignore[arg-type]
    made = [(c.args[0].name, c.args[1]) for c in copies(gm)]
    assert len(made) == len(set(made)) and set(made) == wanted
    for region in regions(gm):
        assert {device_of(v) for v in region.inputs if not is_scalar(v)} <= {None, region.device}
    for copy in copies(gm):
        between = copy.next
        while between not in copy.users:  # only copies for the same reader stand between a copy and its first use
            assert between in set(copies(gm))
            between = between.next


@pytest.mark.parametrize("name", CONFIGS)
def test_one_device_needs_no_copy_and_says_so(name: str) -> None:
    gm, ctx = rewritten(captured(name), TWO, Fold(), Place({"*": "cpu"}), InsertCopies())
    assert not list(copies(gm))
    assert [n.why for n in ctx.notes if n.by == "insert-copies"] == ["every value is already where it is read"]


def test_it_needs_a_placed_graph() -> None:
    with pytest.raises(RulesError, match="insert-copies requires placed, which no earlier pass establishes"):
        rewritten(captured("deepseek_v3"), GPU, Fold(), InsertCopies())


def test_a_page_pool_goes_where_its_attention_goes() -> None:
    gm, ctx = rewritten(captured("deepseek_v3"), TWO, Fold(), Place({"*": "cpu"}))
    moved = next(regions(gm, "layers.1.self_attn"))
    moved.place("cpu:1")
    InsertCopies().run(gm, ctx)
    assert {device_of(n) for n in moved.inputs if n.meta.get("state")} == {"cpu:1"}


def test_a_page_pool_never_crosses(golden: Golden) -> None:
    """A pass that moves attention and leaves its cache behind is told so."""
    gm, ctx = rewritten(captured("deepseek_v3"), TWO, Fold(), Place({"*": "cpu"}))
    moved = next(regions(gm, "layers.1.self_attn"))
    moved.place("cpu:1")
    next(n for n in moved.inputs if n.meta.get("state")).meta["device"] = "cpu"
    with pytest.raises(PassError) as error:
        InsertCopies().run(gm, ctx)
    golden("pool", f"{error.value}\n")


def test_sizes_stay_on_the_host() -> None:
    gm, _ = rewritten(captured("deepseek_v3", "prefill"), TWO, Fold(), Place({"*": "cpu:1"}), InsertCopies())
    assert any(is_scalar(a) for n in gm.graph.nodes for a in n.all_input_nodes)
    assert not [c for c in copies(gm) if isinstance(c.args[0], fx.Node) and is_scalar(c.args[0])]
