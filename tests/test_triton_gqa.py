"""The Triton GQA kernels agree with `gqa_reference`, which agrees with Hugging Face's attention modules (`test_gqa`).

Runs on a GPU if there is one, else in Triton's interpreter; see `test_triton_mla`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_families
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_simulated_gpu import gpu
from test_triton_mla import (
    CACHE,
    DEVICE,
    H100,
    HERE,
    REQUESTS,
    TILES,
    Recorder,
    bits,
    close,
    make_step,
    randn,
    run_here,
)
from torch import Tensor

import ktcompile
from ktcompile.backends import triton_gqa as kernels
from ktcompile.backends.triton_gqa import tiles_for
from ktcompile.backends.triton_language import triton
from ktcompile.backends.triton_mla import Processors, Tiles
from ktcompile.ops.gqa import GQAShape, attend_reference, gqa_reference
from ktcompile.ops.mla import append_reference
from ktcompile.target import detect

SETTINGS = settings(max_examples=25, deadline=None)
SHAPE = GQAShape(heads=8, kv_heads=2, dim=64, rope=64, scale=0.125, interleaved=False, eps=1e-6, window=None)
SHAPES = {
    "qwen3": SHAPE,
    "multi-head": replace(SHAPE, heads=3, kv_heads=3),
    "one key": replace(SHAPE, heads=20, kv_heads=1),
    "half turned": replace(SHAPE, rope=32),
    "pairs": replace(SHAPE, rope=32, interleaved=True),
    "window": replace(SHAPE, window=7),
    "wide window": replace(SHAPE, window=40),
    "no power": replace(SHAPE, heads=6, kv_heads=2, dim=80, rope=40),
}


@HERE
@SETTINGS
@given(
    requests=REQUESTS,
    name=st.sampled_from(sorted(SHAPES)),
    tiles=TILES,
    sinks=st.booleans(),
    seed=st.integers(0, 99),
    **CACHE,
)
@example([(64, 1), (0, 1), (65, 1)], "one key", Tiles(16, 16, 8, 4, 1), True, 0, 16, torch.bfloat16, torch.int32, 1)
@example([(65, 17), (0, 5), (16, 0), (63, 1)], "window", None, False, 0, 64, torch.float16, torch.int32, 0)
def test_attend(
    requests: list[tuple[int, int]],
    name: str,
    tiles: Tiles | None,
    sinks: bool,
    seed: int,
    page: int,
    dtype: torch.dtype,
    index: torch.dtype,
    padding: int,
) -> None:
    """Any tiles, pages in any order with NaN in every slot that nobody may read, requests without tokens, padding."""
    torch.manual_seed(seed)
    shape = SHAPES[name]
    width = 2 * shape.kv_heads * shape.dim
    step = make_step(requests, width, page, dtype, index, padding, spare=seed % 2)
    append_reference(*step.cache, randn(step.tokens, width, dtype=dtype))
    before = step.pool.clone()
    query = randn(step.tokens, shape.heads, shape.dim, dtype=dtype)
    sink = randn(shape.heads, dtype=dtype) if sinks else None
    out = torch.full_like(query, float("nan"))
    got = kernels.gqa_attend(query, *step.cache, shape, sink, out, tiles=tiles)
    assert got is out
    close(got, attend_reference(query, *step.cache, shape, sink), dtype)
    assert not got[step.tokens - padding :].any()
    assert torch.equal(bits(step.pool), bits(before))


@HERE
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 20])
def test_tiles_and_chunks(dim: int, window: int | None) -> None:
    """Any tiles give the same answer, and a prefill is its tokens decoded one by one."""
    torch.manual_seed(0)
    dtype, stored, queries = torch.bfloat16, [63, 130], 3
    shape = GQAShape(16, 2, dim, dim, dim**-0.5, False, 1e-6, window)
    step = make_step([(s, queries) for s in stored], 4 * dim, 16, dtype)
    append_reference(*step.cache, randn(step.tokens, 4 * dim, dtype=dtype))
    query, sinks = randn(step.tokens, 16, dim, dtype=dtype), randn(16, dtype=dtype)
    want = attend_reference(query, *step.cache, shape, sinks)
    for tiles in (None, Tiles(64, 64, 1, 8, 2), Tiles(16, 32, 5, 4, 2), Tiles(32, 16, 64, 8, 2)):
        close(kernels.gqa_attend(query, *step.cache, shape, sinks, tiles=tiles), want, dtype)
    for i in range(queries):
        rows = torch.arange(i, step.tokens, queries)
        cache = (step.pool, step.page_table, step.seq_len + i, torch.arange(3, device=DEVICE))
        close(kernels.gqa_attend(query[rows].contiguous(), *cache, shape, sinks), want[rows], dtype)


def make_weights(shape: GQAShape, hidden: int, norm: str, biases: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {"q": shape.heads * shape.dim, "k": shape.kv_heads * shape.dim, "v": shape.kv_heads * shape.dim}
    weights = {f"{r}_proj": randn(n, hidden, dtype=dtype) / hidden**0.5 for r, n in sizes.items()}
    weights["o_proj"] = randn(hidden, sizes["q"], dtype=dtype) / sizes["q"] ** 0.5
    if biases:
        weights |= {f"{r}_proj.bias": randn(n, dtype=dtype) for r, n in (sizes | {"o": hidden}).items()}
        weights["sinks"] = randn(shape.heads, dtype=dtype)
    if norm:
        weights |= {f"{r}_norm": randn(shape.dim if norm == "head" else sizes[r], dtype=dtype) for r in "qk"}
    return weights


@HERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm", "biases"), [("head", False), ("whole", False), ("", True)])
@pytest.mark.parametrize("name", ["qwen3", "half turned", "pairs", "no power"])
def test_gqa(name: str, norm: str, biases: bool, dtype: torch.dtype) -> None:
    """The whole block on four requests, one of which brings nothing: its result, and every slot of the pool."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    step = make_step([(17, 5), (0, 1), (5, 0), (64, 1)], 2 * shape.kv_heads * shape.dim, 16, dtype, padding=2)
    weights = make_weights(shape, 96, norm, biases, dtype)
    hidden = randn(1, step.tokens, 96, dtype=dtype)
    angle = randn(1, step.tokens, shape.rope // 2).repeat(1, 1, 1 if biases else 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    mine, theirs = step.pool.clone(), step.pool.clone()
    want = gqa_reference(hidden, cos, sin, weights, shape, theirs, *step.cache[1:])
    got = kernels.gqa(hidden, cos, sin, weights, shape, mine, *step.cache[1:], max_queries=5)
    close(got[:, :-2], want[:, :-2], dtype)
    written = theirs.isfinite()
    assert torch.equal(mine.isfinite(), written)
    close(mine[written], theirs[written], dtype)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 8192),
    requests=st.integers(1, 256),
    kv_heads=st.sampled_from([1, 2, 4, 8, 16]),
    group=st.integers(1, 16),
    dim=st.sampled_from([64, 80, 128, 256]),
    window=st.none() | st.integers(1, 4096),
    itemsize=st.sampled_from([2, 4]),
    context=st.integers(16, 1 << 20),
    shared=st.sampled_from([99 << 10, 163 << 10, 227 << 10]),
)
def test_tiles_fit(
    tokens: int,
    requests: int,
    kv_heads: int,
    group: int,
    dim: int,
    window: int | None,
    itemsize: int,
    context: int,
    shared: int,
) -> None:
    shape = GQAShape(kv_heads * group, kv_heads, dim, dim, 0.1, False, 0.0, window)
    t = tiles_for(tokens, requests, shape, itemsize, context, None, Processors(100, shared))
    for size in (t.rows, t.keys, t.splits):
        assert size & (size - 1) == 0
    assert t.rows >= 16 and t.keys >= 16 and t.splits >= 1
    # Queries and the pipeline's keys and values lie in shared memory.
    assert (t.rows + 2 * t.keys * t.stages) * dim * itemsize <= shared or t.rows == t.keys == 16
    assert t.splits == 1 or t.splits * t.keys <= context


def test_tiles_of_qwen3() -> None:
    """A decode step fills an H100 with parts of the context; of 32 requests, with these; a prefill is never split."""
    shape = replace(SHAPE, heads=64, kv_heads=4, dim=128, rope=128)

    def tiles(tokens: int, requests: int) -> Tiles:
        return tiles_for(tokens, requests, shape, 2, 32768, None, H100)

    assert (tiles(1, 1).rows, tiles(1, 1).splits) == (16, 32)
    assert (tiles(32, 32).rows, tiles(32, 32).splits) == (16, 1)
    assert (tiles(4096, 1).rows, tiles(4096, 1).splits) == (64, 1)


@HERE
def test_refusals() -> None:
    step = make_step([(3, 1)], 256, 16)
    query = randn(1, 8, 64)
    with pytest.raises(ValueError, match=r"queries are torch\.bfloat16, the pool is torch\.float32"):
        kernels.gqa_attend(query.bfloat16(), *step.cache, SHAPE)
    with pytest.raises(ValueError, match=r"needs rows of 512, not of pool \[4, 16, 256\]"):
        kernels.gqa_attend(query, *step.cache, replace(SHAPE, kv_heads=4))
    with pytest.raises(ValueError, match=r"query must be contiguous \[tokens, 8, 64\]"):
        kernels.gqa_attend(query[..., :32], *step.cache, SHAPE)
    wide, narrow, angle = query.flatten(1), randn(1, 128), randn(1, 64)
    with pytest.raises(ValueError, match=r"does not fit query \[1, 512\]"):
        kernels.gqa_write(wide, wide, narrow, None, angle, angle, SHAPE, *step.cache)
    with pytest.raises(ValueError, match=r"cos and sin must be \[1, 64\]"):
        kernels.gqa_write(wide, narrow, narrow, None, angle[:, :16], angle[:, :16], SHAPE, *step.cache)


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """Every kernel, with the arguments a step of Qwen3, of GLM-4 and of gpt-oss launches it with; no GPU is needed."""
    code = "import test_triton_gqa as t; t.compile_for_hopper()"
    lines = run_here(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == ["_write", "_attend", "_merge"] * 3 + ["_write", "_attend"], lines
    attends = [line.split() for line in lines if line.startswith("_attend")]
    assert [mma for *_, mma in attends] == ["mma", "mma", "mma", "wgmma"], lines
    assert all(int(shared) <= H100.shared_bytes for _, shared, _ in attends), lines


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    here: Any = kernels
    for name in ("_write", "_attend", "_merge"):
        setattr(here, name, Recorder(getattr(here, name)))
    here._check_cache = lambda *_: None
    here.interpreted = lambda: False
    here.processors_of = lambda device: H100
    qwen3 = GQAShape(64, 4, 128, 128, 0.1, False, 1e-6, None)
    glm4 = GQAShape(96, 8, 128, 64, 0.1, True, 1e-5, None)
    gpt_oss = GQAShape(64, 8, 64, 64, 0.1, False, 0.0, 128)
    steps = (qwen3, 1, torch.bfloat16), (glm4, 1, torch.float16), (gpt_oss, 2, torch.bfloat16)
    for shape, n, dtype in (*steps, (qwen3, 300, torch.bfloat16)):
        width = shape.kv_heads * shape.dim
        requests = [(2000, 1)] * n if n < 300 else [(0, n)]
        step = make_step(requests, 2 * width, 16, dtype, torch.int64)
        key, angle = randn(n, width, dtype=dtype), randn(n, shape.rope // 2, dtype=dtype)
        norm = randn(shape.dim, dtype=dtype)
        norms = (norm, norm) if shape.eps else None
        wide = randn(n, shape.heads * shape.dim, dtype=dtype)
        query = kernels.gqa_write(wide, key, key, norms, angle, angle, shape, *step.cache)
        kernels.gqa_attend(query, *step.cache, shape, None if shape.eps else randn(shape.heads, dtype=dtype))


# ------------------------------------------------------------------------------------------------ whole models

TARGET = gpu(1 << 30) if DEVICE == "cpu" else detect()


def load(name: str, folder: Path, kernels: str, quantize: str | None = None) -> Any:
    """A family's tiny model on a GPU, or on a "GPU" that is the CPU: there only attention is interpreted."""
    rules = folder / "rules.yaml"
    lists = f"{{gqa: [{kernels}], ops: {{norm: [reference], router: [reference]}}}}"
    rules.write_text(f"extends: base\npipeline:\n  - choose-kernels: {lists}\n")
    checkpoint = test_families.opened(name, folder)
    return ktcompile.load(checkpoint, target=TARGET, rules=rules, dtype="fp32", context=64, quantize=quantize)


@HERE
@pytest.mark.parametrize("name", ["qwen2_moe_window", "qwen3_moe", "glm4_moe", "mixtral", "gpt_oss"])
def test_model(name: str, tmp_path: Path) -> None:
    """Two prompts of 19 and 5 tokens, and three steps after them: Hugging Face's eager logits of each alone."""
    model, fast = test_families.eager(name), load(name, tmp_path, "triton_gqa_planes, triton_gqa")
    for plan in fast.plans.values():
        attention = [r for r in plan.rows if r.name.endswith("attn") and r.op != "glue"]
        on = [(r.op, TARGET[r.device].kind, r.kernel) for r in attention]  # of several GPUs, each has its layers
        assert on == [("gqa", "cuda", "triton_gqa")] * 2
        assert not any(r.name.startswith("mask") for r in plan.rows)  # nobody reads it any more
    whole = [tiny.ids(1, tokens + 3, seed)[0] for seed, tokens in ((1, 19), (2, 5))]
    with torch.no_grad():
        wanted = [model(ids[None]).logits[0] for ids in whole]
    pools = fast.new_cache(2)
    for begin, end in ((0, -3), (-3, -2), (-2, -1), (-1, None)):
        parts = [prompt[begin:end] for prompt in whole]
        counts = [len(p) for p in parts]
        positions = torch.cat([n + torch.arange(c) for n, c in zip(pools.lengths, counts, strict=True)])
        got = fast.step(torch.cat(parts), positions, counts, torch.arange(sum(counts)), pools).cpu()
        for logits, want in zip(got.split(counts), wanted, strict=True):
            test_families.close(logits, want[begin:end])


@HERE
def test_model_in_planes(tmp_path: Path) -> None:
    """Projections in q8_0: what the captured code makes of the same values, decoded at each call."""
    found = []
    for kernel in ("triton_gqa_planes", "encoded"):
        (folder := tmp_path / kernel).mkdir()
        fast = load("qwen3_moe", folder, kernel, "*.self_attn=q8_0")
        assert [r.kernel for r in fast.plans["decode"].rows if r.op == "gqa"] == [kernel] * 2
        first = fast(tiny.ids(1, 19), use_cache=True)
        then = fast(tiny.ids(1, 1, 1), past_key_values=first.past_key_values)
        found.append(torch.cat([first.logits, then.logits], 1).cpu())
    test_families.close(*found)
