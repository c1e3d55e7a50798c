"""FlashInfer's core agrees with the definition of mla: a stand-in of its wrapper everywhere, itself where it is.

PYTHONPATH=… TRITON_INTERPRET=0 python -m pytest tests/test_flashinfer_mla.py    on a machine with both
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flashinfer_stand_in import BatchMLAPagedAttentionWrapper, modules
from models import captured_plain, rewritten
from test_simulated_gpu import gpu
from test_triton_mla import DEVICE, HERE, SIMULATED, Step, close, make_step, make_weights, randn
from torch import Tensor

from ktcompile import Call, Packed, load, regions
from ktcompile.backends import flashinfer_mla, gluon_mla
from ktcompile.backends.flashinfer_mla import Attention, FlashInferMLA, FlashInferMLAPlanes, unavailable, uncompilable
from ktcompile.backends.mla import TritonMLA, TritonMLAPlanes
from ktcompile.kernel import StepFacts, available, refusal
from ktcompile.ops.mla import MLAShape, append_reference, attend_reference, mla_reference
from ktcompile.passes.fold import Fold
from ktcompile.symbols import PAGE
from ktcompile.target import fake

LORA, ROPE = 512, 64
SCALE = 192**-0.5
REAL = (
    unavailable()
    or (None if torch.cuda.is_available() else "there is no GPU")
    or (None if DEVICE == "cuda" else "TRITON_INTERPRET is not 0")
)
Wrappers = list[BatchMLAPagedAttentionWrapper]
ON_GPU = pytest.mark.skipif(REAL is not None, reason=f"FlashInfer itself: {REAL}")


@pytest.fixture(params=["stand-in"] if REAL else ["stand-in", "itself"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test that asks for it runs on both."""
    if request.param == "stand-in":
        _stand_in(monkeypatch)
    return str(request.param)


@pytest.fixture
def wrappers(monkeypatch: pytest.MonkeyPatch) -> Wrappers:
    """Those that the stand-in makes from here on."""
    return _stand_in(monkeypatch)


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Wrappers:
    taken: Wrappers = []
    for name, module in modules(taken).items():
        monkeypatch.setitem(sys.modules, name, module)
    return taken


def facts(requests: list[tuple[int, int]], step: Step) -> StepFacts:
    return StepFacts(tuple(s for s, _ in requests), tuple(q for _, q in requests), step.page_table)


def queries(step: Step, heads: int) -> tuple[Tensor, Tensor]:
    """Latent queries lie as `mla` passes them: heads outermost in memory."""
    latent = randn(heads, step.tokens, LORA, dtype=torch.bfloat16).transpose(0, 1)
    return latent, randn(step.tokens, heads, ROPE, dtype=torch.bfloat16)


def filled(requests: list[tuple[int, int]], index: torch.dtype = torch.int64, padding: int = 0, spare: int = 0) -> Step:
    """A step whose rows are stored."""
    step = make_step(requests, LORA + ROPE, PAGE, torch.bfloat16, index, padding, spare)
    append_reference(*step.cache, randn(step.tokens, LORA + ROPE, dtype=torch.bfloat16))
    return step


def check(attention: Attention, step: Step, heads: int) -> None:
    latent, rope = queries(step, heads)
    want = attend_reference(latent, rope, *step.cache, SCALE)
    got = attention(latent, rope, *step.cache, SCALE)
    close(got, want, torch.bfloat16)
    assert got.is_contiguous() and not got[int(step.query_start[-1]) :].any()


STEPS = {
    "decode of one": [(129, 1)],
    "decode of the first token": [(0, 1)],
    "prefill": [(0, 70)],
    "prefill after a context": [(100, 33)],
    "a key alone in the last block": [(62, 3), (64, 1), (128, 1)],
    "mixed": [(17, 5), (0, 1), (64, 0), (63, 1), (5, 19)],
    "two tokens among many requests": [(64, 2), (1, 0), (7, 0), (0, 0), (9, 0), (3, 0)],
    "some requests pause": [(40, 1), (3, 0), (80, 1)],
    "nobody brings any": [(3, 0), (0, 0)],
}


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("requests", STEPS.values(), ids=STEPS)
def test_attend(core: str, requests: list[tuple[int, int]], heads: int, begun: bool) -> None:
    """Decode, prefill, any mix, and padding; with lengths from the caller, or from the device."""
    torch.manual_seed(0)
    attention = Attention()
    for padding in (0, 3):
        step = filled(requests, padding=padding, spare=1)
        if begun:
            attention.begin(facts(requests, step))
        check(attention, step, heads)
        check(attention, step, heads)  # another layer
        attention.end()


@pytest.mark.parametrize("count", [1, 2, 7, 32, 33, 64])
def test_decode_of_many(core: str, count: int) -> None:
    torch.manual_seed(count)
    requests = [((17 * r) % 90, 1) for r in range(count)]
    step = filled(requests, torch.int32 if count == 7 else torch.int64)
    attention = Attention()
    attention.begin(facts(requests, step))
    check(attention, step, 16)


@HERE
@pytest.mark.parametrize("in_place", [False, True])
def test_the_whole_block(core: str, in_place: bool) -> None:
    """FlashInferMLA as a kernel, against the definition: the same result, the same rows in the pool."""
    torch.manual_seed(0)
    shape = MLAShape(8, 16, ROPE, 24, LORA, 80**-0.5, True, 1e-6, in_place)
    requests = [(17, 5), (0, 1), (5, 0), (64, 1)]
    step = make_step(requests, LORA + ROPE, PAGE, torch.bfloat16, torch.int64, padding=2)
    weights = make_weights(shape, 80, 40, torch.bfloat16)
    hidden = randn(1, step.tokens, 80, dtype=torch.bfloat16)
    angle = randn(1, step.tokens, ROPE // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    if in_place:  # as DeepSeek-V2 has it
        cos = sin = torch.polar(torch.ones_like(angle), angle)[..., : ROPE // 2]
    mine, theirs = step.pool.clone(), step.pool.clone()
    kernel, tables = FlashInferMLA(), step.cache[1:]
    call = Call("attn", "mla", shape, None, tuple(weights))
    want = mla_reference(hidden, cos, sin, weights, shape, theirs, *tables)
    kernel.begin(facts(requests, step))
    got = kernel(Packed("plain", weights), call, hidden, cos, sin, mine, *tables)
    kernel.end()
    close(got, want, torch.bfloat16)
    written = theirs.isfinite()
    assert torch.equal(mine.isfinite(), written)
    close(mine[written], theirs[written], torch.bfloat16)


# ------------------------------------------------------------------------------------------------ plans


def test_one_plan_a_step(wrappers: Wrappers) -> None:
    """All layers share it, all other steps share a wrapper, and nothing is planned that does not run."""
    attention = Attention()
    for requests, plans in (([(5, 1)] * 3, [1]), ([(6, 1)] * 3, [2]), ([(7, 4), (7, 0)], [2, 1]), ([(9, 9)], [2, 2])):
        step = filled(requests)
        attention.begin(facts(requests, step))
        for _ in range(4):
            check(attention, step, 16)
        attention.end()
        assert [w.plans for w in wrappers] == plans
    assert [(w.fixed, w.batches) for w in wrappers] == [(True, [3, 3]), (False, [1, 1])]


def test_the_page_table_is_written_to_between_steps(core: str) -> None:
    """As requests of a server get pages: the table is the same tensor, with other pages in it."""
    attention, requests = Attention(), [(47, 1), (47, 1)]  # pages are full
    step = filled(requests)
    for _ in range(3):
        attention.begin(facts(requests, step))
        check(attention, step, 16)
        attention.end()
        step.page_table.copy_(step.page_table.roll(1, 1))


def test_a_recorded_step_reads_its_own_plan(wrappers: Wrappers) -> None:
    """`begin` alone is what happens before a replay: lengths, pages and queries are new, addresses are not."""
    attention, heads, count = Attention(), 16, 3
    first = [(30, 1), (3, 1), (64, 1)]
    step = filled(first, spare=6)
    latent, rope = queries(step, heads)
    attention.begin(facts(first, step))
    with torch.inference_mode():  # as the step that is recorded runs; `begin` does not
        out = attention(latent, rope, *step.cache, SCALE)
    (replay,) = wrappers[0].recorded
    for stored in ([31, 4, 65], [130, 47, 0], [0, 0, 16]):
        requests = [(s, 1) for s in stored]
        other = filled(requests, spare=step.page_table.shape[1] - max(stored) // PAGE - 1)
        step.pool.copy_(other.pool)
        latent.copy_(randn(*latent.shape, dtype=torch.bfloat16))
        attention.end()
        attention.begin(facts(requests, other))
        with torch.inference_mode():
            replay()
        want = attend_reference(latent, rope, step.pool, *other.cache[1:], SCALE)
        close(out, want, torch.bfloat16)
    assert wrappers[0].plans == 4 and len(wrappers) == 1 and wrappers[0].batches == [count] * 4


@ON_GPU
@pytest.mark.parametrize("count", [1, 4, 32])
def test_a_cuda_graph(count: int) -> None:
    """FlashInfer itself, recorded once, replayed after other plans."""
    torch.manual_seed(0)
    attention, heads, width = Attention(), 128, 40
    stored = torch.zeros(count, dtype=torch.int64, device="cuda")
    start = torch.arange(count + 1, device="cuda")
    table = torch.randperm(count * width, device="cuda").view(count, width)
    pool = torch.zeros(count * width, PAGE, LORA + ROPE, dtype=torch.bfloat16, device="cuda").normal_()
    step = Step(pool, table, stored, start, count)
    latent, rope = queries(step, heads)
    attention.begin(StepFacts((0,) * count, (1,) * count, table))
    with torch.inference_mode():
        attention(latent, rope, *step.cache, SCALE)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(latent, rope, *step.cache, SCALE)
    attention.end()
    for seed in range(5):
        lengths = torch.randint(0, width * PAGE - 1, (count,), generator=torch.Generator().manual_seed(seed))
        stored.copy_(lengths)
        attention.begin(StepFacts(tuple(lengths.tolist()), (1,) * count, table))
        graph.replay()
        attention.end()
        close(out, attend_reference(latent, rope, *step.cache, SCALE), torch.bfloat16)


def test_a_step_must_be_the_one_that_began(wrappers: Wrappers) -> None:
    requests = [(5, 2), (3, 1)]
    step = filled(requests)
    attention = Attention()
    attention.begin(StepFacts((5,), (4,), step.page_table))
    with pytest.raises(ValueError, match=r"has 1 requests and 4 tokens; this call has 2 and 3"):
        check(attention, step, 16)
    attention.end()
    check(attention, step, 16)


def test_too_much_for_one_plan_is_left_to_triton(wrappers: Wrappers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_mla, "MAX_WORKS", 2)
    monkeypatch.setattr(flashinfer_mla, "mla_attend", lambda *args, max_queries: attend_reference(*args))
    check(Attention(), filled([(9, 16)]), 16)  # 256 pairs are two tiles of 128
    assert len(wrappers) == 1
    check(Attention(), filled([(9, 17)]), 16)
    assert len(wrappers) == 1


# ------------------------------------------------------------------------------------------------ refusals


def test_layouts_are_those_of_triton() -> None:
    found = available()
    for name, kernel, like in (
        ("flashinfer", FlashInferMLA, TritonMLA),
        ("flashinfer_planes", FlashInferMLAPlanes, TritonMLAPlanes),
    ):
        assert type(found[name]) is kernel and kernel.name == name
        assert (kernel.layout, kernel.quantizes) == (like.layout, like.quantizes)
        assert kernel.pack is like.pack and kernel.packed_bytes is like.packed_bytes


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = rewritten(captured_plain("deepseek_v3_q").gm, gpu(1 << 30), Fold())[0]
    region = next(regions(gm, op="mla"))
    region.place("cpu:1")
    kernel, target = FlashInferMLA(), gpu(1 << 30)
    assert refusal(kernel, region, target) == "FlashInfer takes latents of 512 and keys of 64; these are 32 and 8"
    monkeypatch.setattr(flashinfer_mla, "LATENT", 32)
    monkeypatch.setattr(flashinfer_mla, "ROTATED", 8)
    assert refusal(kernel, region, target) == "FlashInfer is used in bf16 alone; hidden is float32"
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    _stand_in(monkeypatch)
    assert refusal(kernel, region, target) is None
    object.__setattr__(region.binding.shape, "heads", 20)
    assert refusal(kernel, region, target) == "FlashInfer's causal tiles are right where heads divide 128; there are 20"
    object.__setattr__(region.binding.shape, "heads", 4)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", None)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert kernel.missing() == refusal(kernel, region, target) == "flashinfer is not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert refusal(kernel, region, target) == "flashinfer is not installed"
    _stand_in(monkeypatch)
    monkeypatch.setattr(flashinfer_mla, "uncompilable", lambda: "no nvcc")
    assert refusal(kernel, region, target) == kernel.missing() == "no nvcc"


def test_the_kernel_for_hopper_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is here, for at least as many heads as that kernel has rows, and if it runs there."""
    gm = rewritten(captured_plain("deepseek_v3_q").gm, fake("2x24G"), Fold())[0]
    region = next(regions(gm, op="mla"))
    own = region.binding.shape.heads
    capabilities = [(9, 0), (7, 5)]
    _stand_in(monkeypatch)
    for name, value in (("LATENT", 32), ("ROTATED", 8), ("uncompilable", lambda: None)):
        monkeypatch.setattr(flashinfer_mla, name, value)
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 1),
        ("get_device_capability", lambda device: capabilities[device.index]),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    hopper: dict[int, str | None] = {0: None}
    monkeypatch.setattr(gluon_mla, "refuses", hopper.get)
    monkeypatch.setattr(flashinfer_mla, "broken", {torch.device("cuda:0"): "broken"}.get)

    def why(device: str, heads: int) -> str | None:
        region.place(device)
        object.__setattr__(region.binding.shape, "heads", heads)
        return flashinfer_mla._refuses(region, fake("2x24G"))

    assert why("cuda:0", 128) == "on cuda:0 Triton's kernel for Hopper is faster, and needs no plan by the host"
    assert why("cuda:0", 32) == "broken"
    assert why("cuda:1", 128) is why("cuda:1", 32) is None  # imagined
    hopper[0] = "it is for compute capability 9.0, this is 8.0"
    assert why("cuda:0", 128) == "broken"
    capabilities.reverse()
    assert why("cuda:0", own) == "FlashInfer needs compute capability 8.0 for this; cuda:0 has 7.5"


def test_it_is_tried(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that does not know the GPU is found out before a step asks for it."""
    tried = flashinfer_mla.broken.__wrapped__
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    assert tried(device) is None

    def failing(*_: Any) -> Any:
        raise RuntimeError("Ninja build failed.\n[1/2] nvcc\nnvcc fatal: an error: no 'compute_120'\nninja: stopped")

    def wrong(self: Attention, *args: Any) -> Tensor:
        return torch.ones_like(args[0])

    with monkeypatch.context() as patched:
        patched.setattr(Attention, "__call__", wrong)
        assert "is off by" in str(tried(device))
    monkeypatch.setattr(Attention, "_made", failing)
    assert tried(device) == f"flashinfer does not work on {device}: nvcc fatal: an error: no 'compute_120'"


def test_what_compiling_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found: dict[str, object] = {}
    monkeypatch.setattr(flashinfer_mla, "find_spec", found.get)
    needs = "flashinfer compiles its kernels, and there is no"
    assert uncompilable() == f"{needs} nvcc on the path or in {tmp_path}/bin"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    assert uncompilable() == f"{needs} ninja"
    found["ninja"] = True
    assert uncompilable() is None
    found.clear()
    found["flashinfer_jit_cache"] = True
    assert uncompilable() is None


# ------------------------------------------------------------------------------------------------ a whole model

RULES = """extends: deepseek-v3
pipeline:
  - choose-kernels:
      mla: [{kernel}, reference]
      linear: [reference]
      mlp: [reference]
      other: [reference]
"""


@SIMULATED
def test_a_model_says_its_steps(wrappers: Wrappers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of 9 and 3 tokens, two decode steps: one plan each, and the logits that Triton's kernels give."""
    monkeypatch.setattr(flashinfer_mla, "LATENT", 64)  # the embedded model's rows are small
    monkeypatch.setattr(flashinfer_mla, "ROTATED", 32)
    found: dict[str, list[Tensor]] = {"flashinfer": [], "triton": []}
    for kernel, logits in found.items():
        rules = tmp_path / f"{kernel}.yaml"
        rules.write_text(RULES.format(kernel=kernel))
        model: Any = load(target=gpu(1 << 30), dtype="bf16", context=64, rules=rules)
        assert {r.kernel for r in model.plans["decode"].rows if r.op == "mla"} == {kernel}
        cache = model.new_cache(2)
        ids, places = torch.arange(20, 32), torch.cat([torch.arange(9), torch.arange(3)])
        logits.append(model.step(ids, places, [9, 3], torch.arange(12), cache))
        for i in range(2):
            places = torch.tensor(cache.lengths)
            logits.append(model.step(torch.tensor([7 + i, 8 + i]), places, [1, 1], torch.arange(2), cache))
    assert [(w.fixed, w.plans, w.runs) for w in wrappers] == [(False, 1, 6), (True, 2, 12)]
    for got, want in zip(*found.values(), strict=True):
        assert (got.float() - want.float()).norm() <= 3e-2 * want.float().norm()
