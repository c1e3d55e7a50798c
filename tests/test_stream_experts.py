"""Experts that lie in RAM are shared by CPU and GPU in steps of many tokens: the same results, each computed once.

Kernels on a GPU if there is one, else in Triton's interpreter; `test_compiles_for_hopper` needs neither.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPU, captured, rewritten
from test_simulated_gpu import HOST, gpu
from test_synthetic import synthetic, tiny
from test_triton_mla import DEVICE, H100, HERE, SIMULATED, Recorder, run_here
from torch import Tensor

from ktcompile import Region, RulesError, Target, load, regions
from ktcompile.backends import native
from ktcompile.backends import triton_streamed as kernels
from ktcompile.backends.triton_language import triton
from ktcompile.backends.triton_streamed import Layer, streamed
from ktcompile.capture import empty_model
from ktcompile.checkpoint import open_checkpoint
from ktcompile.kernel import available
from ktcompile.model import capture_phase, explain, run_pipeline, settings_for
from ktcompile.ops.moe import MIN_SHARED_TOKENS, MoeShape, Share, moe, moe_share
from ktcompile.passes.fold import Fold
from ktcompile.passes.place import Place
from ktcompile.passes.stream_experts import StreamExperts
from ktcompile.profile import read_bytes
from ktcompile.runtime import Step
from ktcompile.target import fake

EXPERTS, HIDDEN, WIDTH = 5, 512, 256
SHARE = Share(True, 1.0, 0.5, 0.001)


def layer(down_type: str, rows: int = HIDDEN, width: int = WIDTH) -> tuple[Layer, Tensor, Tensor]:
    """A layer's experts packed, and their values: gate_up and down."""
    generator = torch.Generator().manual_seed(0)
    packed, values = [], []
    for type, n, cols in (("q4_k", width, rows), ("q6_k", width, rows), (down_type, rows, width)):
        nbytes = native.packed_bytes(type, n, cols)
        out = native.empty(EXPERTS * nbytes).view(EXPERTS, nbytes)
        for e in range(EXPERTS):
            raw = native.quantize(torch.randn(n, cols, generator=generator) * 3 / cols**0.5, type)
            native.pack(raw, type, type, n, cols, None, out[e], (0, n))
        packed.append(out)
        values.append(torch.stack([native.unpack(o, type, n, cols) for o in out]))
    gate, up, down = values
    return Layer(*packed, ("q4_k", "q6_k", down_type)), torch.cat([gate, up], 1), down


def close(got: Tensor, want: Tensor) -> None:
    assert got.isfinite().all()
    off = float((got.double().cpu() - want.double()).norm() / want.double().norm().clamp(min=1e-9))
    assert off <= 2e-2, f"off by {off:.1e}"


@HERE
@pytest.mark.parametrize("down", ["q4_k", "q6_k"])
@pytest.mark.parametrize("count", [0, 2, 5])
def test_the_experts_below_a_number(down: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several pieces, with experts that have no token, one, and more than a block of tokens."""
    made, gate_up, down_proj = layer(down)
    each = sum(t.shape[1] for t in (made.gate, made.up, made.down))
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 2 * each)
    tokens = 40
    x = torch.randn(tokens, HIDDEN).to(DEVICE, torch.bfloat16)
    ids = torch.tensor([[0, 4, 3]] * 39 + [[2, 3, 4]], device=DEVICE)  # 1 has none, 2 has one
    scores = torch.rand(tokens, 3, device=DEVICE)
    shape = MoeShape(EXPERTS, HIDDEN, WIDTH, 3, "silu")
    got = streamed(x[None], ids, scores, made, shape, count)
    assert got.shape == (1, tokens, HIDDEN)
    kept = (scores * (ids < count)).cpu().double()
    close(got[0], moe(x.cpu().double(), ids.cpu(), kept, gate_up.double(), down_proj.double(), "silu"))


@HERE
def test_rows_that_fill_no_block() -> None:
    made, gate_up, down_proj = layer("q6_k", 768, 256)
    x = torch.randn(2, 17, 768).to(DEVICE, torch.bfloat16)[1]
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(17)]).to(DEVICE)
    scores = torch.rand(17, 2, device=DEVICE, dtype=torch.bfloat16)
    got = streamed(x, ids, scores, made, MoeShape(EXPERTS, 768, 256, 2, "silu"), 4)
    kept = (scores * (ids < 4)).cpu().double()
    close(got, moe(x.cpu().double(), ids.cpu(), kept, gate_up.double(), down_proj.double(), "silu"))
    assert streamed(x[:0], ids[:0], scores[:0], made, MoeShape(EXPERTS, 768, 256, 2, "silu"), 4).shape == (0, 768)


@given(
    tokens=st.integers(0, 100_000),
    experts=st.integers(1, 512),
    top_k=st.integers(1, 8),
    seconds=st.tuples(*[st.floats(1e-6, 10)] * 3),
)
def test_how_many_stream(tokens: int, experts: int, top_k: int, seconds: tuple[float, float, float]) -> None:
    """None in small steps, never more than there are, and never fewer for more tokens."""
    shape, share = MoeShape(experts, 256, 256, min(top_k, experts), "silu"), Share(True, *seconds)
    count = share.streamed(tokens, shape)
    assert 0 <= count <= experts and count <= share.streamed(tokens + 1, shape)
    assert count == 0 or tokens >= MIN_SHARED_TOKENS


@settings(max_examples=10)
@given(tokens=st.integers(1, 100), seed=st.integers(0, 99))
def test_two_shares_are_the_layer(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(tokens)])
    scores = torch.rand(tokens, 3, generator=generator)
    weights = torch.randn(6, 8, 8, generator=generator), torch.randn(6, 8, 4, generator=generator)
    parts = [moe_share(x, ids, scores, *weights, "silu", s, 1.0, 0.5, 0.001, 0.9) for s in (True, False)]
    torch.testing.assert_close(sum(parts), moe(x, ids, scores, *weights, "silu"))


# ------------------------------------------------------------------------------------------------ the pass


class Takes(kernels.TritonStreamed):
    """Accepts what the small models of the tests are: fp32, not packed."""

    def refuses(self, region: Region, target: Target) -> str | None:
        return None


def passed(phase: Any, *passes: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("ktcompile.passes.stream_experts.available", lambda: {"triton_streamed": Takes()})
    return rewritten(captured("deepseek_v3", phase), GPU, Fold(), Place(), *passes)


def test_layers_are_shared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, ctx = passed("prefill", StreamExperts(), monkeypatch=monkeypatch)
    gm = StreamExperts().run(gm, ctx)  # twice changes nothing
    found = {r.path: r for r in regions(gm)}
    whole = [p for p in found if p.endswith(".experts")]
    assert whole and not ctx.notes
    for path in whole:
        rest, part, total = found[path], found[f"{path}.streamed"], found[f"{path}.sum"]
        assert (rest.device, part.device, part.home, total.device) == ("cpu", "cuda:0", "cpu", "cuda:0")
        assert part.binding.shape.share == replace(rest.binding.shape.share, streams=True)
        assert set(rest.node.users) == set(part.node.users) == {total.node}
    names = [r.name for r in regions(gm)]
    assert names.index("L1.experts.streamed") < names.index("L1.shared") < names.index("L1.experts.sum")


def test_experts_on_the_gpu_are_not_shared() -> None:
    gm = captured("deepseek_v3", "prefill")
    _, ctx = rewritten(gm, fake("24G"), Fold(), Place({"*": "gpu", "*.experts": "cpu"}), StreamExperts())
    assert [(n.by, n.why) for n in ctx.notes] == [
        ("place", "rule '*.experts' applies to nothing: earlier rules take all that it matches"),
        ("stream-experts", "no experts lie in RAM"),
    ]


def test_what_is_kept_on_disk_is_found_again(file: Path) -> None:
    """Experts are packed alike whatever else is chosen: rates are measured anew at every start."""
    checkpoint = open_checkpoint(file)
    keys, shapes = set(), set()
    for experts, speed in ((2, 1), (1, 1), (2, 3)):
        devices = tuple(replace(d, bandwidth=d.bandwidth / speed) for d in fake("24G").devices)
        chosen = settings_for(checkpoint, target=replace(fake("24G"), devices=devices), context=64, experts=experts)
        gm = capture_phase(empty_model(checkpoint.config, chosen.dtype), "prefill", chosen, checkpoint)
        gm, _ = run_pipeline(gm, chosen, "", "prefill", 64, source=checkpoint.source)
        region = next(r for r in regions(gm, op="moe") if r.device == "cpu")
        keys.add(available()[str(region.kernel)].cache_key(region))
        shapes.add(region.binding.shape)
    assert len(shapes) == 3 and len(keys) == 1


def test_each_reads_its_own_experts() -> None:
    shape = MoeShape(10, 32, 16, 2, "silu", share=Share(True, 1.0, 1.0, 0.0))
    tokens = 2 * MIN_SHARED_TOKENS

    def read(of: MoeShape, count: int) -> int:
        call = SimpleNamespace(op="moe", shape=of)
        return read_bytes(SimpleNamespace(call=call, packed=SimpleNamespace(nbytes=1000)), count)  # type: ignore[arg-type]

    rest = replace(shape, share=replace(SHARE, streams=False, across_s=1.0, read_s=1.0, token_s=0.0))
    assert (read(shape, tokens), read(rest, tokens)) == (500, 500)
    assert (read(shape, 1), read(rest, 1)) == (0, 200)
    assert read(replace(shape, share=None), 1) == 200


def test_what_is_not_shared_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        notes = passed("decode", StreamExperts(), monkeypatch=patched)[1].notes
    assert {n.why for n in notes} == {"off in steps of 1 token: they need few experts of a layer"}
    with pytest.raises(RulesError, match="most = 2; a part"):
        rewritten(captured("deepseek_v3", "prefill"), GPU, Fold(), Place(), StreamExperts(2))
    gm, ctx = rewritten(captured("deepseek_v3", "prefill"), GPU, Fold(), Place(), StreamExperts())
    assert {n.why for n in ctx.notes} == {"triton_streamed: experts packed as f32 are not streamed; q4_k, q6_k are"}
    assert not any("streamed" in r.path for r in regions(gm))
    ctx = rewritten(captured("deepseek_v3", "prefill"), Target((HOST,)), Fold(), Place(), StreamExperts())[1]
    assert [n.why for n in ctx.notes] == ["there is no GPU"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 of two layers in Q4_K and Q6_K."""
    found: Path = synthetic.write(replace(tiny("v3"), groups_used=2), tmp_path_factory.mktemp("v3"))
    return found


RULES = """extends: deepseek-v3
pipeline:
  - choose-kernels:
      {names}
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """Everything but the experts by torch: Triton's interpreter takes minutes for it."""
    lists = [f"{op}: [reference]" for op in ("mla", "linear", "mlp", "norm", "router", "other")]
    lists.append("moe: [avx512_bf16, scalar, reference]")  # says nothing of what streams
    path = tmp_path / "rules.yaml"
    path.write_text(RULES.format(names="\n      ".join(lists)))
    return path


@HERE
@SIMULATED
def test_a_whole_model(file: Path, rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and two steps on a GPU that is the CPU: the logits of a model whose experts do not stream, up to bf16."""
    monkeypatch.setattr("ktcompile.ops.moe.MIN_SHARED_TOKENS", 16)
    given = load(file, target=gpu(1 << 30), dtype="bf16", context=64, rules=rules)
    kernel = {r.name: r.kernel for r in given.plans["prefill"].rows}
    assert kernel["L1.experts.streamed"] == "triton_streamed"
    assert not any("streamed" in r.name for r in given.plans["decode"].rows)
    calls = [m.call for m in given.phases["prefill"].gm.modules() if isinstance(m, Step) and m.call.op == "moe"]
    assert all(0 < c.shape.share.streamed(24, c.shape) < c.shape.experts for c in calls) and len(calls) == 4
    rules.write_text(rules.read_text() + "  - stream-experts: {most: 0}\n")
    plain = load(file, target=gpu(1 << 30), dtype="bf16", context=64, rules=rules)
    assert not any("streamed" in r.name for r in plain.plans["prefill"].rows)
    ids = torch.randint(2, 6000, (24,), generator=torch.Generator().manual_seed(0))
    rows = []
    for model in (plain, given):
        cache = model.new_cache(1)
        found = [model.step(ids, torch.arange(24), [24], torch.arange(24), cache)]
        for i in (24, 25):
            found.append(model.step(torch.tensor([7 + i]), torch.tensor([i]), [1], torch.tensor([0]), cache))
        rows.append(torch.cat(found).float())
    off = (rows[1] - rows[0]).norm() / rows[0].norm()
    assert off <= 3e-2, off


def test_page(file: Path, golden: Golden) -> None:
    checkpoint = open_checkpoint(file)
    plan = explain(checkpoint, settings_for(checkpoint, target=fake("24G"), context=512), "prefill", 512)[-1]
    golden("prefill", "\n".join(line for line in plan.text().splitlines() if "experts" in line))


# ------------------------------------------------------------------------------------------------ the compiler


def test_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\n"
    code += "from ktcompile.backends import triton_streamed as m; print(m.TritonStreamed().missing())"
    assert run_here(code) == "triton is not installed\n"


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    code = "import test_stream_experts as t; t.compile_for_hopper()"
    lines = run_here(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == ["_up", "_down", "_sum"] * 2, lines
    assert all(int(line.split()[1]) <= H100.shared_bytes for line in lines), lines


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU")
def test_memory_that_cannot_be_pinned() -> None:
    """It is said, and torch goes on: the runtime's error is not left for the next kernel."""
    held = torch.zeros(3, 1 << 20, dtype=torch.uint8)
    inside = held.data_ptr() + (1 << 20)
    assert int(torch.cuda.cudart().cudaHostRegister(inside, 4096, 0)) == 0
    try:
        with pytest.warns(UserWarning, match="cannot be pinned"):
            Layer(held, held, held, ("q4_k", "q4_k", "q6_k")).pin()
        assert float(torch.ones(8, device="cuda").sum()) == 8
    finally:
        torch.cuda.cudart().cudaHostUnregister(inside)


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    here: Any = kernels
    for name in ("_up", "_down", "_sum"):
        setattr(here, name, Recorder(getattr(here, name)))
    here.interpreted = lambda: False
    for tokens, type in ((2048, "q4_k"), (64, "q6_k")):
        packed = [native.empty(256 * 4096).view(256, -1)[:, : 16 << 4] for _ in range(3)]
        x = torch.zeros(tokens, 7168, dtype=torch.bfloat16)
        ids, scores = torch.zeros(tokens, 8, dtype=torch.int64), torch.zeros(tokens, 8)
        shape = MoeShape(256, 7168, 2048, 8, "silu", share=SHARE)
        streamed(x, ids, scores, Layer(*packed, (type, "q4_k", type)), shape, 1)
