"""The Triton MLA kernels agree with `mla_reference`, which agrees with Hugging Face's attention module.

Runs on a GPU if there is one, else in Triton's interpreter, which takes orders from the environment alone and only
before triton is first imported: hence the line above the imports. The interpreter accepts code that the compiler does
not, so `test_compiles_for_hopper` compiles every kernel as launched, which needs no GPU either.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

from ktcompile.backends import triton_mla as kernels
from ktcompile.backends.triton_mla import Processors, Tiles
from ktcompile.ops.mla import MLAShape, append_reference, attend_reference, mla_reference, parts_of

DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available() else "cpu"
HERE = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))
SIMULATED = pytest.mark.skipif(DEVICE == "cuda", reason="its GPU is the CPU: this is for Triton's interpreter")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of |got - want| / |want|, whole tensor
H100 = Processors(132, 227 << 10)


@dataclass(frozen=True)
class Step:
    """One ragged step over a cache whose unwritten slots are NaN, so that reading one shows."""

    pool: Tensor
    page_table: Tensor
    seq_len: Tensor
    query_start: Tensor
    tokens: int  # with padding

    @property
    def cache(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.pool, self.page_table, self.seq_len, self.query_start


def make_step(
    requests: list[tuple[int, int]],  # (stored, queries) of each
    width: int,
    page: int,
    dtype: torch.dtype = torch.float32,
    index: torch.dtype = torch.int32,
    padding: int = 0,
    spare: int = 0,  # pages a request has beyond what it needs
) -> Step:
    per_request = max(-(-(stored + queries) // page) for stored, queries in requests) + spare
    per_request = max(1, per_request)
    pages = len(requests) * per_request + 3
    order = torch.randperm(pages)[: len(requests) * per_request].view(len(requests), per_request)
    pool = torch.full((pages, page, width), float("nan"))
    for r, (stored, _) in enumerate(requests):
        for p in range(stored):
            pool[order[r, p // page], p % page] = torch.randn(width)
    seq_len = torch.tensor([stored for stored, _ in requests], dtype=index, device=DEVICE)
    query_start = torch.tensor([0, *(queries for _, queries in requests)]).cumsum(0).to(DEVICE, index)
    tokens = sum(queries for _, queries in requests) + padding
    return Step(pool.to(DEVICE, dtype), order.to(DEVICE, index), seq_len, query_start, tokens)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert got.isfinite().all()
    off = (got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-6)
    assert off <= TOLERANCE[dtype], f"off by {off:.1e}"


def bits(t: Tensor) -> Tensor:
    return t.view({4: torch.int32, 2: torch.int16}[t.itemsize])


REQUESTS = st.lists(
    st.tuples(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65]), st.sampled_from([0, 1, 5, 17])), min_size=1, max_size=4
)
TILES = st.none() | st.builds(
    Tiles,
    rows=st.sampled_from([16, 32, 64]),
    keys=st.sampled_from([16, 32, 64]),
    splits=st.sampled_from([1, 2, 3, 8]),
    warps=st.just(4),
    stages=st.sampled_from([1, 2]),
)
CACHE = {
    "page": st.sampled_from([16, 64]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "index": st.sampled_from([torch.int32, torch.int64]),
    "padding": st.integers(0, 3),
}
SETTINGS = settings(max_examples=25, deadline=None)


@HERE
@SETTINGS
@given(requests=REQUESTS, width=st.sampled_from([96, 48]), seed=st.integers(0, 99), **CACHE)
def test_append(
    requests: list[tuple[int, int]],
    width: int,
    seed: int,
    page: int,
    dtype: torch.dtype,
    index: torch.dtype,
    padding: int,
) -> None:
    torch.manual_seed(seed)
    step = make_step(requests, width, page, dtype, index, padding)
    rows = randn(step.tokens, width, dtype=dtype)
    want = step.pool.clone()
    t = 0
    for r, (stored, queries) in enumerate(requests):
        for p in range(stored, stored + queries):
            want[step.page_table[r, p // page], p % page] = rows[t]
            t += 1
    for append in (append_reference, kernels.latent_append):
        pool = step.pool.clone()
        append(pool, step.page_table, step.seq_len, step.query_start, rows)
        assert torch.equal(bits(pool), bits(want)), append.__name__  # every slot: what was there, or the row


@HERE
@SETTINGS
@given(requests=REQUESTS, heads=st.sampled_from([1, 8, 20]), tiles=TILES, seed=st.integers(0, 99), **CACHE)
@example([(64, 1), (0, 1), (65, 1)], 20, Tiles(16, 16, 8, 4, 1), 0, 16, torch.bfloat16, torch.int32, 1)
@example([(65, 17), (0, 5), (16, 0), (63, 1)], 20, None, 0, 64, torch.float16, torch.int32, 0)
def test_attend(
    requests: list[tuple[int, int]],
    heads: int,
    tiles: Tiles | None,
    seed: int,
    page: int,
    dtype: torch.dtype,
    index: torch.dtype,
    padding: int,
) -> None:
    torch.manual_seed(seed)
    lora, rope = 64, 32
    step = make_step(requests, lora + rope, page, dtype, index, padding, spare=seed % 2)
    append_reference(*step.cache, randn(step.tokens, lora + rope, dtype=dtype))
    before = step.pool.clone()
    q_latent = randn(heads, step.tokens, lora, dtype=dtype).transpose(0, 1)  # strided, as `mla` passes it
    q_rope = randn(step.tokens, heads, rope, dtype=dtype)
    out = torch.full((step.tokens, heads, lora), float("nan"), dtype=dtype, device=DEVICE)
    got = kernels.mla_attend(q_latent, q_rope, *step.cache, 0.2, out, tiles=tiles)
    assert got is out
    close(got, attend_reference(q_latent, q_rope, *step.cache, 0.2), dtype)
    assert not got[step.tokens - padding :].any()
    assert torch.equal(bits(step.pool), bits(before))


@HERE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_deepseek(dtype: torch.dtype) -> None:
    """lora 512, rope 64: any tiles give the same answer, and a prefill is its tokens decoded one by one."""
    torch.manual_seed(0)
    stored, queries, heads = [63, 130], 3, 16
    step = make_step([(s, queries) for s in stored], 576, 64, dtype)
    append_reference(*step.cache, randn(step.tokens, 576, dtype=dtype))
    q_latent, q_rope = randn(step.tokens, heads, 512, dtype=dtype), randn(step.tokens, heads, 64, dtype=dtype)
    want = attend_reference(q_latent, q_rope, *step.cache, 576**-0.5)
    choices = (None, Tiles(64, 64, 1, 8, 2), Tiles(16, 32, 5, 4, 2), Tiles(32, 16, 64, 8, 2))
    for tiles in choices:
        close(kernels.mla_attend(q_latent, q_rope, *step.cache, 576**-0.5, tiles=tiles), want, dtype)
    for i in range(queries):
        rows = torch.arange(i, step.tokens, queries)
        cache = (step.pool, step.page_table, step.seq_len + i, torch.arange(3, device=DEVICE))
        got = kernels.mla_attend(q_latent[rows], q_rope[rows], *cache, 576**-0.5, max_queries=1)
        close(got, want[rows], dtype)


SHAPE = MLAShape(heads=4, nope=16, rope=32, v=24, lora=64, scale=48**-0.5, interleaved=True, eps=1e-6)


def make_weights(shape: MLAShape, hidden: int, q_lora: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    query = shape.heads * (shape.nope + shape.rope)
    sizes = {
        "kv_a_proj_with_mqa": (shape.lora + shape.rope, hidden),
        "kv_a_proj_with_mqa.bias": (shape.lora + shape.rope,),
        "kv_a_layernorm": (shape.lora,),
        "kv_b_proj": (shape.heads * (shape.nope + shape.v), shape.lora),
        "o_proj": (hidden, shape.heads * shape.v),
        "o_proj.bias": (hidden,),
    }
    if q_lora is None:
        sizes |= {"q_proj": (query, hidden)}
    else:
        sizes |= {"q_a_proj": (q_lora, hidden), "q_a_layernorm": (q_lora,), "q_b_proj": (query, q_lora)}
        sizes |= {"q_a_proj.bias": (q_lora,)}
    return {name: randn(*size, dtype=dtype) / size[-1] ** 0.5 for name, size in sizes.items()}


@HERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("interleaved", "q_lora", "heads", "in_place"),
    [(True, 40, 4, False), (False, None, 3, False), (True, None, 3, True), (False, None, 4, True)],
)
def test_mla(dtype: torch.dtype, interleaved: bool, q_lora: int | None, heads: int, in_place: bool) -> None:
    """In place the rotation comes as complex numbers."""
    torch.manual_seed(0)
    shape = replace(SHAPE, interleaved=interleaved, heads=heads, in_place=in_place)
    step = make_step([(17, 5), (0, 1), (5, 0), (64, 1)], shape.lora + shape.rope, 16, dtype, padding=2)
    weights = make_weights(shape, 80, q_lora, dtype)
    hidden = randn(1, step.tokens, 80, dtype=dtype)
    angle = randn(1, step.tokens, shape.rope // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if in_place:
        cos = sin = torch.polar(torch.full_like(angle, 1.2), angle)[..., : shape.rope // 2]
    mine, theirs = step.pool.clone(), step.pool.clone()
    tables = step.cache[1:]
    want = mla_reference(hidden, cos, sin, weights, shape, theirs, *tables)
    got = kernels.mla(hidden, cos, sin, weights, shape, mine, *tables)
    close(got, want, dtype)
    written = theirs.isfinite()
    assert torch.equal(mine.isfinite(), written)
    close(mine[written], theirs[written], dtype)

    w_uk, w_uv = kernels.absorb(weights.pop("kv_b_proj"), shape)
    absorbed = weights | {"w_uk": w_uk.contiguous(), "w_uv": w_uv.contiguous()}
    close(kernels.mla(hidden, cos, sin, absorbed, shape, mine, *tables, max_queries=5), want, dtype)


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("q_lora", [24, None])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, YARN], ids=["default", "yarn"])
def test_hugging_face(rope: dict[str, Any], q_lora: int | None, interleave: bool) -> None:
    """A prefill of 7 tokens and three decode steps, in float32."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_lora, kv_lora_rank=32,
        qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=20, num_hidden_layers=1, rope_interleave=interleave,
        rope_parameters={"rope_theta": 10000.0, **rope}, attention_bias=True, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    module = hf.DeepseekV3Attention(config, 0).to(DEVICE).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    rotary = hf.DeepseekV3RotaryEmbedding(config).to(DEVICE)
    shape = MLAShape(4, 24, 16, 20, 32, module.scaling, interleave, module.kv_a_layernorm.variance_epsilon)
    weights = {name.removesuffix(".weight"): p.detach() for name, p in module.named_parameters()}
    step = make_step([(0, 10)], 48, 16)
    pools = {mla_reference: step.pool.clone()}
    if kernels.unavailable() is None:
        pools[kernels.mla] = step.pool.clone()
    theirs, stored = DynamicCache(config=config), 0
    for tokens in (7, 1, 1, 1):
        hidden = randn(1, tokens, 48)
        position = torch.arange(stored, stored + tokens, device=DEVICE)[None]
        cos, sin = rotary(hidden, position)
        with torch.no_grad():
            want = module(hidden, (cos, sin), None, theirs)[0]
        for mla, pool in pools.items():
            lengths = (torch.tensor([stored], device=DEVICE), torch.tensor([0, tokens], device=DEVICE))
            got = mla(hidden, cos, sin, weights, shape, pool, step.page_table, *lengths)
            close(got, want, torch.float32)
        stored += tokens


@pytest.mark.parametrize("q_lora", [24, None])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, YARN | {"mscale": 0.7}], ids=["default", "yarn"])
def test_hugging_face_v2(rope: dict[str, Any], q_lora: int | None) -> None:
    """The same of DeepSeek-V2, which rotates by complex numbers; its keys lie in the pool as it stores them."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_lora, kv_lora_rank=32,
        qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=20, num_hidden_layers=1, attention_bias=True,
        rope_parameters={"rope_theta": 10000.0, **rope}, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    module = hf_v2.DeepseekV2Attention(config, 0).to(DEVICE).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    rotary = hf_v2.DeepseekV2RotaryEmbedding(config).to(DEVICE)
    shape = MLAShape(4, 24, 16, 20, 32, module.scaling, True, module.kv_a_layernorm.variance_epsilon, True)
    weights = {name.removesuffix(".weight"): p.detach() for name, p in module.named_parameters()}
    step = make_step([(0, 10)], 48, 16)
    pools = {mla_reference: step.pool.clone()}
    if kernels.unavailable() is None:
        pools[kernels.mla] = step.pool.clone()
    theirs, stored = DynamicCache(config=config), 0
    for tokens in (7, 1, 1, 1):
        hidden = randn(1, tokens, 48)
        freqs = rotary(hidden, torch.arange(stored, stored + tokens, device=DEVICE)[None])
        with torch.no_grad():
            want = module(hidden, None, theirs, freqs)[0]
        for mla, pool in pools.items():
            lengths = (torch.tensor([stored], device=DEVICE), torch.tensor([0, tokens], device=DEVICE))
            close(mla(hidden, freqs, freqs, weights, shape, pool, step.page_table, *lengths), want, torch.float32)
        stored += tokens
    layer = theirs.layers[0]
    kept = torch.cat([layer.keys, layer.values], -1)[0, 0]
    for pool in pools.values():
        close(pool[step.page_table[0]].flatten(0, 1)[:stored], kept, torch.float32)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 8192),
    requests=st.integers(1, 256),
    heads=st.integers(1, 128),
    width=st.sampled_from([48, 96, 576, 1088]),
    itemsize=st.sampled_from([2, 4]),
    context=st.integers(16, 1 << 20),
    shared=st.sampled_from([99 << 10, 163 << 10, 227 << 10]),
)
def test_tiles_fit(
    tokens: int, requests: int, heads: int, width: int, itemsize: int, context: int, shared: int
) -> None:
    t = kernels.choose_tiles(tokens, requests, heads, width, itemsize, context, tokens, Processors(100, shared))
    for size in (t.rows, t.keys, t.splits):
        assert size & (size - 1) == 0
    assert t.rows >= 16 and t.keys >= 16 and t.splits >= 1
    assert (t.rows + t.keys * t.stages) * width * itemsize <= shared or t.rows == t.keys == 16
    assert t.splits == 1 or t.splits * t.keys <= context


def test_tiles_of_deepseek() -> None:
    """A step of one token fills an H100 with parts of the context; of 32, with requests; a prefill is never split."""

    def tiles(tokens: int, requests: int, queries: int) -> Tiles:
        return kernels.choose_tiles(tokens, requests, 128, 576, 2, 32768, queries, H100)

    assert tiles(1, 1, 1) == Tiles(64, 64, 64, 8, 2)
    assert tiles(32, 32, 1) == Tiles(64, 64, 2, 8, 2)
    assert tiles(4096, 1, 4096) == Tiles(64, 64, 1, 8, 2)


@HERE
def test_refusals() -> None:
    step = make_step([(3, 1)], 96, 16)
    q_latent, q_rope = randn(1, 2, 64), randn(1, 2, 32)
    with pytest.raises(ValueError, match=r"queries are torch\.bfloat16 and torch\.float32, the pool is torch\.float32"):
        kernels.mla_attend(q_latent.bfloat16(), q_rope, *step.cache, 1.0)
    with pytest.raises(ValueError, match=r"not of pool \[4, 16, 96\]"):
        kernels.mla_attend(q_latent[..., :32], q_rope, *step.cache, 1.0)
    with pytest.raises(ValueError, match=r"rows must be \[tokens, 96\]"):
        kernels.latent_append(*step.cache, q_rope[0])
    rotation = torch.polar(randn(2, 16), randn(2, 16))
    with pytest.raises(ValueError, match=r"cos and sin must be real \[2, 32 or 16\], not \[2, 16\] torch\.complex64"):
        kernels.latent_write(randn(2, 96), randn(2, 4, 32), randn(64), rotation, rotation, SHAPE, *step.cache)
    with pytest.raises(ValueError, match="query_start must be"):
        kernels.latent_append(*step.cache[:3], step.query_start[:1], randn(1, 96))


def run_here(code: str, **environment: str) -> str:
    """Run Python code that starts from another import state than this process."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\n"
    code += "from ktcompile.backends import triton_mla as m; print(m.unavailable(), m.interpreted())"
    assert run_here(code) == "triton is not installed False\n"


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """Every kernel, with the arguments a DeepSeek-V3 step and a tiny one launch it with; no GPU is needed."""
    code = "import test_triton_mla as t; t.compile_for_hopper()"
    lines = run_here(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == [
        *["_copy_rows", "_write_rows", "_attend", "_merge"] * 3,
        "_write_rows",
        "_attend",
    ], lines
    attends = [line.split() for line in lines if line.startswith("_attend")]
    assert [mma for *_, mma in attends] == ["wgmma", "mma", "wgmma", "wgmma"], lines
    assert all(int(shared) <= H100.shared_bytes for _, shared, _ in attends), lines


class Recorder:
    """Stands in for a kernel: prints how the compiler takes a launch instead of launching."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
        built = built_for_hopper(self.kernel, arguments, constants, num_warps)
        mma = next((m for m in ("wgmma", "mma") if f"{m}." in built.asm["ptx"]), "-")
        print(self.kernel.__name__, built.metadata.shared, mma)


def built_for_hopper(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], num_warps: int) -> Any:
    """What the compiler makes of a launch, which its assembler takes."""
    compiler, targets = import_module("triton.compiler"), import_module("triton.backends.compiler")
    dtypes = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int64": "*i64"}
    dtypes |= {"float8_e4m3fn": "*fp8e4nv"}
    dtypes |= {"uint8": "*u8", "int8": "*i8"}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = arguments[i]
        if isinstance(value, int) and value == 1:  # the launcher makes a constant of it
            signature[name], constants[name] = "constexpr", 1
            continue
        tensor = isinstance(value, Tensor)
        scalar = "fp32" if isinstance(value, float) else "i32"
        signature[name] = dtypes[str(value.dtype).removeprefix("torch.")] if tensor else scalar
        if tensor or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = compiler.ASTSource(kernel, signature, constants, attributes)
    target = targets.GPUTarget("cuda", 90, 32)
    return kernels.triton.compile(source, target=target, options={"num_warps": num_warps})


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    here: Any = kernels
    for name in ("_copy_rows", "_write_rows", "_attend", "_merge"):
        setattr(here, name, Recorder(getattr(here, name)))
    here.unavailable = lambda: None
    here.interpreted = lambda: False
    here.processors_of = lambda device: H100
    here.gluon_mla.refuses = lambda device: "another test compiles it"
    deepseek = MLAShape(128, 128, 64, 128, 512, 0.1, True, 1e-6)
    for shape, n, page, dtype, fp8 in (
        (deepseek, 1, 64, torch.bfloat16, False),
        (SHAPE, 2, 16, torch.float16, False),
        (deepseek, 1, 16, torch.bfloat16, True),
    ):
        width = shape.lora + shape.rope
        step = make_step([(2000, 1)] * n, width, page, dtype)
        if fp8:
            step = replace(step, pool=torch.zeros(*step.pool.shape[:2], width + shape.rope, dtype=torch.uint8))
        kernels.latent_append(*step.cache, randn(n, width, dtype=dtype))
        q_rope, angle = randn(n, shape.heads, shape.rope, dtype=dtype), randn(n, shape.rope, dtype=dtype)
        norm, kv = randn(shape.lora, dtype=dtype), randn(n, width, dtype=dtype)
        kernels.latent_write(kv, q_rope, norm, angle, angle, shape, *step.cache)
        q_latent = randn(n, shape.heads, shape.lora, dtype=dtype)
        kernels.mla_attend(q_latent, q_rope, *step.cache, shape.scale, max_queries=1)
    lite = replace(deepseek, heads=16, in_place=True)
    rotation = torch.view_as_complex(randn(3, lite.rope // 2, 2))
    step = make_step([(20, 3)], 576, 64, torch.bfloat16)
    kv, q_rope = randn(3, 576, dtype=torch.bfloat16), randn(3, 16, 64, dtype=torch.bfloat16)
    norm = randn(512, dtype=torch.bfloat16)
    kernels.latent_write(kv, q_rope, norm, *parts_of(rotation, rotation), lite, *step.cache)
    step = make_step([(0, 300)], 576, 64, torch.bfloat16, torch.int64)
    queries = randn(300, 20, 512, dtype=torch.bfloat16), randn(300, 20, 64, dtype=torch.bfloat16)
    kernels.mla_attend(*queries, *step.cache, 0.1)
