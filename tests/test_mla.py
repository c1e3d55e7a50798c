"""Attention on a GPU: `triton` and `triton_encoded` against the captured code, and bindings that are wrong."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GPU, captured, captured_plain, rewritten
from test_synthetic import synthetic, tiny
from tolerances import CHAIN
from torch import Tensor, fx

from ktcompile import Call, Device, Kernel, Parts, Region, Target, regions, value_of
from ktcompile.backends import triton_mla
from ktcompile.backends.mla import TritonMLA, TritonMLAEncoded, TritonMLAPlanes
from ktcompile.capture import empty_model
from ktcompile.checkpoint import open_checkpoint
from ktcompile.kernel import refusal
from ktcompile.model import Phase, capture_phase, settings_for
from ktcompile.ops.base import Binding
from ktcompile.passes.fold import Fold
from ktcompile.symbols import PAGE, sizes
from ktcompile.target import detect
from ktcompile.verify import _inputs, gib, wrong_binding
from ktcompile.weights import ModuleSource, values

FAMILIES = ("deepseek_v3_q", "deepseek_v3_yarn", "deepseek_v2", "deepseek_v2_yarn")
PHASES: tuple[Phase, ...] = ("decode", "prefill")
ROLES = ("hidden", "cos", "sin", "pool", "page_table", "seq_len", "query_start")


def gpu(capacity: int) -> Target:
    """A "GPU" on which torch computes on the CPU, and Triton in its interpreter."""
    return Target((Device("cpu:1", "cuda", capacity, 1e12), detect().host))


ROOMY, TIGHT = gpu(1 << 30), gpu(8 << 20)


@cache
def embedded(phase: Phase, dtype: str = "fp32") -> fx.GraphModule:
    """The folded graph of the embedded model, in a type, everything on the GPU."""
    checkpoint = open_checkpoint()
    settings = settings_for(checkpoint, target=ROOMY, dtype=dtype, context=256)
    gm, ctx = rewritten(
        capture_phase(empty_model(checkpoint.config, settings.dtype), phase, settings, checkpoint), ROOMY, Fold()
    )
    assert not ctx.notes
    for region in regions(gm):
        region.place("cpu:1")
    return gm


def attention(gm: fx.GraphModule) -> list[Region]:
    return list(regions(gm, op="mla"))


def close(got: Tensor, want: Tensor, precision: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype and got.isfinite().all()
    off = (got.double() - want.double()).norm() / want.double().norm()
    assert off <= CHAIN[precision], f"off by {off:.1e}"


def compare(kernel: Kernel, region: Region, source: Any, inputs: list[Any], target: Target, precision: str) -> None:
    """The kernel on packed weights, and the captured code on decoded ones: same result, same pool."""
    keys = {leaf: str(node.meta["weight"]) for leaf, node in region.weights.items()}
    packed = kernel.pack(Parts(source, keys), region, target)
    assert packed.nbytes == kernel.packed_bytes(region) and packed.layout == kernel.layout
    call = Call(region.path, region.op, region.binding.shape, None, tuple(region.weights))
    weights = [values(source, keys[leaf], value_of(node).dtype) for leaf, node in region.weights.items()]
    pool = region.binding.roles["pool"]
    ours, theirs = ([*inputs[:pool], inputs[pool].clone(), *inputs[pool + 1 :]] for _ in range(2))
    with torch.no_grad():
        want = region.body(*theirs, *weights)
        got = kernel(packed, call, *(ours[region.binding.roles[role]] for role in ROLES))
    close(got, want, precision)
    close(ours[pool], theirs[pool], precision)
    same = (theirs[pool] == inputs[pool]).all(-1)
    assert not same.all() and torch.equal(ours[pool][same], theirs[pool][same])  # and nothing beside the new rows


# ------------------------------------------------------------------------------------------------ real inputs


class _Recorder(fx.Interpreter):
    """Runs a folded graph and keeps what its attention regions read, before they write to it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.read: dict[str, list[Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.meta.get("op") == "mla" and n.op == "call_module":
            region = Region(n)
            given = [self.env[i] for i in region.inputs]
            self.read[region.path] = [i.clone() if isinstance(i, Tensor) else i for i in given]
        return super().run_node(n)


@cache
def recorded(name: str, phase: Phase) -> tuple[fx.GraphModule, Mapping[str, list[Any]]]:
    """The folded graph of a model with random weights, and what each attention block read: two requests."""
    plain = captured_plain(name, phase)
    gm, _ = rewritten(plain.gm, ROOMY, Fold())
    for region in regions(gm):
        region.place("cpu:1")
    recorder = _Recorder(gm)
    with torch.no_grad():
        recorder.run(*plain.fresh())
    return gm, recorder.read


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_requests(name: str, phase: Phase) -> None:
    """Each layer, on what it reads in the model: prefill of 5 and 3 tokens, then one token more of each."""
    gm, read = recorded(name, phase)
    source = ModuleSource({k: v.detach() for k, v in captured_plain(name, phase).keys.items()})
    assert len(read) == len(attention(gm)) == 3
    for region in attention(gm):
        assert refusal(TritonMLA(), region, ROOMY) is None
        compare(TritonMLA(), region, source, read[region.path], ROOMY, "f32")


@pytest.mark.parametrize(("kernel", "target"), [(TritonMLA(), ROOMY), (TritonMLAEncoded(), TIGHT)], ids=["", "encoded"])
@pytest.mark.parametrize(("phase", "dtype"), [("decode", "fp32"), ("prefill", "fp32"), ("decode", "bf16")])
def test_weights_of_a_file(kernel: Kernel, target: Target, phase: Phase, dtype: str) -> None:
    """The embedded model's own weights, decoded once or at each call, on random inputs after five stored tokens."""
    gm = embedded(phase, dtype)
    known = sizes(gm, 3, 8 + 2 * PAGE)
    first, *_, last = attention(gm)
    for region in (first, last):
        assert refusal(kernel, region, target) is None
        compare(kernel, region, open_checkpoint().source, _inputs(region, known), target, dtype.replace("fp32", "f32"))


@pytest.mark.parametrize("phase", PHASES)
def test_v2_lite(phase: Phase, tmp_path: Path) -> None:
    """A rotation by complex numbers, in every kernel: random weights in the encodings of a Q4_K_M file."""
    checkpoint = open_checkpoint(synthetic.write(tiny("v2-lite"), tmp_path))
    settings = settings_for(checkpoint, target=ROOMY, dtype="fp32", context=256)
    captured = capture_phase(empty_model(checkpoint.config, settings.dtype), phase, settings, checkpoint)
    gm, ctx = rewritten(captured, ROOMY, Fold())
    assert not ctx.notes and len(attention(gm)) == 3
    for region in regions(gm):
        region.place("cpu:1")
    region = attention(gm)[0]
    cos, sin = (region.inputs[region.binding.roles[role]] for role in ("cos", "sin"))
    assert cos is sin and value_of(cos).dtype == torch.complex64
    inputs = _inputs(region, sizes(gm, 12, 5 + 12 + 2 * PAGE))
    for kernel in (TritonMLA(), TritonMLAEncoded(), TritonMLAPlanes()):
        assert refusal(kernel, region, TIGHT) is None
        compare(kernel, region, checkpoint.source, inputs, TIGHT, "f32")


# ------------------------------------------------------------------------------------------------ refusals


def test_bytes_of_both_layouts() -> None:
    """Decoded is what torch holds; encoded is smaller, all but kv_b_proj as stored."""
    region = attention(embedded("decode"))[0]
    weights = region.weights.values()
    assert TritonMLA().packed_bytes(region) == sum(value_of(w).nbytes for w in weights)
    stored = {leaf: w.meta["nbytes"] for leaf, w in region.weights.items()}
    stored["kv_b_proj.weight"] = value_of(region.weights["kv_b_proj.weight"]).nbytes
    assert TritonMLAEncoded().packed_bytes(region) == sum(stored.values())


def test_where_it_does_not_run() -> None:
    for kernel in (TritonMLA(), TritonMLAEncoded()):
        gm = rewritten(captured_plain("deepseek_v3_q").gm, TIGHT, Fold())[0]
        region = attention(gm)[0]
        region.place("cpu")
        assert refusal(kernel, region, TIGHT) == "runs on cuda, the region is on cpu"
        region.place("cpu:1")
        region.unbind()
        assert refusal(kernel, region, TIGHT) == "the region keeps its captured body"
        norm = next(regions(gm, op="norm"))
        norm.place("cpu:1")
        assert refusal(kernel, norm, TIGHT) == "is for mla"


def test_encoded_only_where_it_saves() -> None:
    kernel = TritonMLAEncoded()
    region = attention(embedded("decode"))[0]
    decoded = sum(value_of(w).nbytes for r in regions(embedded("decode")) for w in r.weights.values())
    assert kernel.refuses(region, ROOMY) == f"decoded, all weights of cpu:1 are {gib(decoded)} and fit"
    assert kernel.refuses(region, TIGHT) is None
    plain = attention(recorded("deepseek_v3_q", "prefill")[0])[0]
    assert kernel.refuses(plain, TIGHT) == "none of its weights is quantised as a whole"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing is what this machine lacks; a plan for a GPU elsewhere is not refused for it."""
    region = attention(embedded("decode"))[0]
    assert TritonMLA().missing() is None
    monkeypatch.setattr(triton_mla, "triton", None)
    for kernel in (TritonMLA(), TritonMLAEncoded()):
        assert kernel.missing() == "triton is not installed"
        assert kernel.refuses(region, TIGHT) is None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert kernel.refuses(region, TIGHT) == "triton is not installed"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_mla, "interpreted", lambda: False)
    why = "there is no GPU that torch can use"
    assert TritonMLA().missing() == TritonMLAEncoded().missing() == why


# ------------------------------------------------------------------------------------------------ wrong bindings


@cache
def folded(phase: Phase, name: str = "deepseek_v3_yarn") -> fx.GraphModule:
    return rewritten(captured(name, phase), GPU, Fold())[0]


def _reshaped(**changes: Any) -> Callable[[Binding], Binding]:
    return lambda binding: replace(binding, shape=replace(binding.shape, **changes))


def _swapped(a: str, b: str) -> Callable[[Binding], Binding]:
    return lambda binding: replace(binding, roles={**binding.roles, a: binding.roles[b], b: binding.roles[a]})


WRONG: Mapping[str, tuple[str, Callable[[Binding], Binding]]] = {
    "interleaved": ("mla", lambda b: replace(b, shape=replace(b.shape, interleaved=not b.shape.interleaved))),
    "scale": ("mla", lambda b: replace(b, shape=replace(b.shape, scale=b.shape.scale * 1.1))),
    "cos and sin": ("mla", _swapped("cos", "sin")),
    "in_place": ("mla", _reshaped(in_place=True)),
    "eps": ("mla", _reshaped(eps=0.1)),
    "gelu": ("moe", _reshaped(activation="gelu")),
    "gelu_tanh": ("moe", _reshaped(activation="gelu_tanh")),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_bindings_are_found(wrong: str, phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right one is agreed with, the wrong one is not, and the reason says of which op."""
    op, change = WRONG[wrong]
    check_wrong(next(regions(folded(phase), op=op)), change, monkeypatch)


@pytest.mark.parametrize("wrong", ["interleaved", "in_place"])
def test_wrong_rotations_of_v2_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pairs stay where they are, in the pool too."""
    region = next(regions(folded("decode", "deepseek_v2"), op="mla"))
    check_wrong(region, _reshaped(**{wrong: False}), monkeypatch)


def check_wrong(region: Region, change: Callable[[Binding], Binding], monkeypatch: pytest.MonkeyPatch) -> None:
    op = region.op
    assert wrong_binding(region) is None
    monkeypatch.setitem(region.node.meta, "binding", change(region.binding))
    why = wrong_binding(region)
    assert why is not None
    assert re.fullmatch(
        rf"not {op}: on random inputs its captured code differs from the op by \d\.\de[+-]\d\d in its (result|pool)",
        why,
    )
