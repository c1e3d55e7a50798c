"""choose-kernels: every region gets the first kernel on its op's list that takes it."""

from functools import cache

import pytest
import torch
from conftest import Golden
from hypothesis import given
from hypothesis import strategies as st
from models import GPU, TWO, captured, captured_plain, plan, rewritten
from strategies import models, phases
from tolerances import TOLERANCE
from torch import Tensor
from torch.fx import GraphModule

from ktcompile import Device, Kernel, Region, RulesError, Target, regions
from ktcompile.kernel import Call, Parts, available, refusal
from ktcompile.model import Phase
from ktcompile.passes.choose_kernels import ChooseKernels
from ktcompile.passes.fold import Fold
from ktcompile.passes.insert_copies import InsertCopies
from ktcompile.passes.place import Place
from ktcompile.symbols import sizes
from ktcompile.target import cpu_features
from ktcompile.weights import ModuleSource

BEFORE = (Fold(), Place(), InsertCopies())
HERE = Target((Device("cpu", "cpu", 1 << 30, 1e11, cpu_features()),))
FAMILY = {"avx512_bf16": "bf16", "amx": "bf16", "avx512_vnni": "int16", "amx_int8": "int8"}


def test_page(golden: Golden) -> None:
    golden("reference", plan("deepseek_v3", GPU, *BEFORE, ChooseKernels(moe=("reference",)))[-1].text())


def test_page_says_why_not(golden: Golden) -> None:
    """A CPU without AVX-512, a model in fp32: the first kernels decline, each with a reason."""
    old = Target((Device("cpu", "cpu", 1 << 34, 5e10, frozenset({"avx2", "fma", "f16c"})),))
    page = plan("qwen3_moe", old, *BEFORE, ChooseKernels(moe=("amx", "avx512", "reference")))[-1].text()
    golden("why_not", page)


@cache
def on_one_device(name: str, phase: Phase) -> GraphModule:
    return rewritten(captured_plain(name, phase).gm, HERE, Fold(), Place({"*": "cpu"}), InsertCopies())[0]


@cache
def takers(name: str, phase: Phase) -> list[tuple[Kernel, Region]]:
    """Every kernel with every region that it takes; equal layers once, and hand kernels as often as all others."""
    found = {
        (k.name, id(r.body)): (k, r)
        for r in regions(on_one_device(name, phase))
        for k in available().values()
        if refusal(k, r, HERE) is None
    }
    own = [pair for pair in found.values() if pair[0].op != "*"]
    return [*found.values(), *own * (len(found) // max(1, len(own)))]


@given(data=st.data(), name=models, phase=phases)
def test_a_kernel_that_accepts_packs_and_runs(data: st.DataObject, name: str, phase: Phase) -> None:
    """Any kernel on any region that it does not refuse: as many bytes as announced, and what the body computes."""
    plain = captured_plain(name, phase)
    gm = on_one_device(name, phase)
    kernel, region = data.draw(st.sampled_from(takers(name, phase)))
    values: dict[str, object] = {}

    class Watch(torch.fx.Interpreter):
        """Notes what the region reads, before it writes to it, and what it returns."""

        def run_node(self, n: torch.fx.Node) -> object:
            if n is region.node:
                values["args"] = [a.clone() if isinstance(a, Tensor) else a for a in map(self.env.get, n.args)]
            values["out" if n is region.node else "other"] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Watch(gm).run(*plain.fresh())
    inputs = values["args"][: len(region.inputs)]  # type: ignore[index]
    if kernel.op == region.op:
        inputs = [inputs[region.binding.roles[role]] for role in region.binding.roles]
    keys = {leaf: str(node.meta["weight"]) for leaf, node in region.weights.items()}
    source = ModuleSource({k: v.detach() for k, v in plain.keys.items()})
    packed = kernel.pack(Parts(source, keys), region, HERE)
    assert packed.layout == kernel.layout
    assert packed.nbytes == kernel.packed_bytes(region)
    binding = region.binding
    call = Call(region.path, region.op, binding.shape if binding else None, region.body, tuple(region.weights))
    with torch.no_grad():
        made = kernel(packed, call, *inputs)
    if kernel.op == "*":
        assert torch.equal(
            *(
                torch.stack([o.float().sum() for o in (v if isinstance(v, tuple) else (v,))])
                for v in (made, values["out"])
            )
        )
        return
    wanted = values["out"]
    assert isinstance(wanted, Tensor) and made.shape == wanted.shape and made.dtype == wanted.dtype
    assert (made - wanted).norm() <= TOLERANCE[FAMILY.get(kernel.name, "f32")] * wanted.norm()


def test_absorb() -> None:
    """The shape says so to the kernel, and a prompt's step needs no keys and values of each head."""
    needs = {}
    for absorb in (False, True):
        choice = ChooseKernels(mla=("triton", "reference"), absorb=absorb)
        gm, _ = rewritten(captured("deepseek_v3", "prefill"), GPU, *BEFORE, choice)
        found = [r for r in regions(gm) if r.op == "mla"]
        assert found and all(r.kernel == "triton" and r.binding.shape.absorb == absorb for r in found)
        needs[absorb] = available()["triton"].workspace_bytes(found[0], sizes(gm, 32, 4096))
    assert needs[True] < needs[False]


def refused(target: Target, choice: ChooseKernels) -> str:
    with pytest.raises(RulesError) as error:
        rewritten(captured("qwen3_moe"), target, *BEFORE, choice)
    return f"{error.value}\n"


def test_an_unknown_kernel(golden: Golden) -> None:
    golden(
        "unknown",
        refused(GPU, ChooseKernels(moe=("avx_512", "reference")))
        + refused(GPU, ChooseKernels(ops={"norm": ("fastest",)})).split("known:", maxsplit=1)[0]
        + "\n",
    )


def test_nobody_takes_it(golden: Golden) -> None:
    bare = Target((Device("cpu", "cpu", 1 << 34, 5e10),))
    golden("nobody", refused(bare, ChooseKernels(moe=("amx", "avx2", "triton"))))


def test_it_needs_a_local_graph() -> None:
    with pytest.raises(RulesError, match="choose-kernels requires local, which no earlier pass establishes"):
        rewritten(captured("qwen3_moe"), TWO, Fold(), Place({"*": "cpu"}), ChooseKernels())
