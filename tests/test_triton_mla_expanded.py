"""The expanded form of latent attention agrees with the definition, which `mla_attend` agrees with too.

Runs on a GPU if there is one, else in Triton's interpreter; see `test_triton_mla.py`.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_triton_mla import (
    CACHE,
    DEVICE,
    H100,
    HERE,
    REQUESTS,
    SHAPE,
    Step,
    bits,
    built_for_hopper,
    close,
    make_step,
    make_weights,
    randn,
    run_here,
)
from torch import Tensor

from ktcompile.backends import triton_mla, triton_mla_expanded
from ktcompile.backends.mla import TritonMLA
from ktcompile.backends.triton_mla import Processors
from ktcompile.backends.triton_mla_expanded import (
    GRAIN,
    MOST_REQUESTS,
    POSITIONS,
    Blocks,
    attend_expanded,
    choose_blocks,
    expanded_bytes,
    expands,
    piece_of,
)
from ktcompile.fake import allocated
from ktcompile.kernel import Call, Packed
from ktcompile.ops.mla import MLAShape, append_reference, attend_reference, mla_reference, packed

DEEPSEEK = MLAShape(128, 128, 64, 128, 512, 192**-0.5, True, 1e-6)
TINY = (16, 32, 24, 64)  # nope, rope, v, lora
BLOCKS = st.none() | st.builds(
    Blocks,
    rows=st.sampled_from([16, 32, 128]),
    keys=st.sampled_from([16, 64, 128]),
    warps=st.just(4),
    stages=st.sampled_from([1, 2]),
)


def reference(q_nope: Tensor, q_rope: Tensor, w_uk: Tensor, w_uv: Tensor, step: Step, scale: float) -> Tensor:
    """`attend_reference` between the two products that the absorbed form takes."""
    q_latent = torch.einsum("thn,hnl->thl", q_nope.float(), w_uk.float())
    mixed = attend_reference(q_latent, q_rope.float(), *step.cache, scale)
    return torch.einsum("thl,hvl->thv", mixed, w_uv.float()).to(q_nope.dtype)


def operands(step: Step, heads: int, nope: int, rope: int, v: int, lora: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, a part of a wider matrix as projections leave them, and the parts of kv_b, views of it."""
    query = randn(step.tokens, heads, nope + rope, dtype=dtype)
    kv_b = randn(heads, nope + v, lora, dtype=dtype) / lora**0.5
    return query[..., :nope], query[..., nope:], *kv_b.split([nope, v], 1)


def fp8(step: Step, lora: int) -> Step:
    return replace(step, pool=packed(step.pool[..., :lora], step.pool[..., lora:], torch.uint8).contiguous())


@HERE
@settings(max_examples=20, deadline=None)
@given(
    requests=REQUESTS,
    heads=st.sampled_from([1, 3, 8]),
    sizes=st.sampled_from([TINY, (40, 16, 32, 48)]),
    blocks=BLOCKS,
    seed=st.integers(0, 99),
    bytes_kept=st.booleans(),
    **CACHE,
)
@example([(300, 17), (0, 5), (129, 1), (64, 0)], 3, TINY, None, 0, False, 16, torch.bfloat16, torch.int32, 2)
@example([(255, 2), (127, 130), (128, 0)], 1, TINY, Blocks(128, 64, 4, 1), 1, True, 64, torch.float16, torch.int64, 1)
@example([(600, 33)], 3, (40, 16, 32, 48), Blocks(16, 128, 4, 1), 0, False, 16, torch.float32, torch.int64, 3)
def test_attend(
    requests: list[tuple[int, int]],
    heads: int,
    sizes: tuple[int, int, int, int],
    blocks: Blocks | None,
    seed: int,
    bytes_kept: bool,
    page: int,
    dtype: torch.dtype,
    index: torch.dtype,
    padding: int,
) -> None:
    """In pieces of 128 positions: those of a request are several, one, or none."""
    torch.manual_seed(seed)
    nope, rope, v, lora = sizes
    step = make_step(requests, lora + rope, page, dtype, index, padding, spare=seed % 2)
    step = fp8(step, lora) if bytes_kept else step
    append_reference(*step.cache, randn(step.tokens, lora + rope, dtype=dtype))
    before = step.pool.clone()
    given = operands(step, heads, nope, rope, v, lora, dtype)
    got = attend_expanded(*given, *step.cache, 0.2, piece=GRAIN, blocks=blocks)
    close(got, reference(*given, step, 0.2), dtype)
    assert not got[step.tokens - padding :].any()
    assert torch.equal(step.pool if bytes_kept else bits(step.pool), before if bytes_kept else bits(before))


@HERE
@pytest.mark.parametrize("piece", [None, GRAIN, 2 * GRAIN])
def test_attend_deepseek(piece: int | None) -> None:
    """lora 512, rope 64, heads of 128: as the absorbed form has it, a decode row beside two prompts."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    step = make_step([(300, 20), (63, 1), (0, 150)], 576, 16, dtype)
    append_reference(*step.cache, randn(step.tokens, 576, dtype=dtype))
    given = q_nope, q_rope, w_uk, w_uv = operands(step, 2, 128, 64, 128, 512, dtype)
    got = attend_expanded(*given, *step.cache, DEEPSEEK.scale, piece=piece)
    close(got, reference(*given, step, DEEPSEEK.scale), dtype)
    q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
    mixed = triton_mla.mla_attend(q_latent, q_rope, *step.cache, DEEPSEEK.scale)
    close(got, torch.bmm(mixed.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1), dtype)


@HERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absorb", [False, True])
def test_kernel(dtype: torch.dtype, absorb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a prompt, a decode row and padding through the kernel of the op, in the form that it should be in."""
    torch.manual_seed(0)
    shape = replace(SHAPE, heads=3, absorb=absorb)
    step = make_step([(150, 125), (40, 1)], shape.lora + shape.rope, 16, dtype, padding=2)
    weights = make_weights(shape, 80, 40, dtype)
    hidden = randn(1, step.tokens, 80, dtype=dtype)
    angle = randn(1, step.tokens, shape.rope // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    mine, theirs = step.pool.clone(), step.pool.clone()
    want = mla_reference(hidden, cos, sin, weights, shape, theirs, *step.cache[1:])
    forms = []
    for name in ("mla_attend", "attend_expanded"):
        plain: Any = getattr(import_module("ktcompile.backends.mla"), name)
        seen = lambda *a, plain=plain, name=name, **k: (forms.append(name), plain(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(f"ktcompile.backends.mla.{name}", seen)
    call = Call("", "mla", shape, None, tuple(weights))
    got = TritonMLA()(Packed("plain", weights), call, hidden, cos, sin, mine, *step.cache[1:])
    close(got, want, dtype)
    assert forms == ["mla_attend" if absorb else "attend_expanded"]


@HERE
def test_refusals() -> None:
    step = make_step([(3, 2)], 96, 16)
    given = operands(step, 2, 16, 32, 24, 64, torch.float32)
    with pytest.raises(ValueError, match="piece is 100; it must be a multiple of 128"):
        attend_expanded(*given, *step.cache, 1.0, piece=100)
    with pytest.raises(ValueError, match="do not fit each other"):
        attend_expanded(given[0], given[1], given[3], given[2], *step.cache, 1.0)
    with pytest.raises(
        ValueError, match=r"pool \[4, 16, 96\] torch\.float32 is not one of 64 and 32 in torch\.float16"
    ):
        attend_expanded(*(t.half() for t in given), *step.cache, 1.0)
    with pytest.raises(ValueError, match=r"q_nope is torch\.float32; q_rope, w_uk, w_uv are torch\.float16"):
        attend_expanded(given[0], given[1].half(), *given[2:], *step.cache, 1.0)


# ------------------------------------------------------------------------------------------------ form and memory


def test_which_form() -> None:
    """Of DeepSeek-V3: prompts, also behind a long context; not decode, however many requests."""

    def pays(counts: list[int], context: int) -> bool:
        return expands(sum(counts), len(counts), context + max(counts), DEEPSEEK)

    assert pays([2048], 0) and pays([2048], 8192) and pays([512], 32768) and pays([200], 131072) and pays([64], 0)
    assert not pays([128], 8192) and not pays([1], 0) and not pays([2], 8192)
    assert not any(pays([1] * requests, context) for requests in (1, 8, 16, 256) for context in (0, 1024, 131072))
    assert pays([2048, 1, 1, 1], 8192) and not pays([256, 1, 1, 1], 8192)
    assert not pays([1024] * (MOST_REQUESTS + 1), 0)
    assert not expands(2048, 1, 8192, replace(DEEPSEEK, absorb=True))


@given(tokens=st.integers(1, 4096), requests=st.integers(1, MOST_REQUESTS), context=st.integers(1, 1 << 18))
def test_memory_is_bounded(tokens: int, requests: int, context: int) -> None:
    piece = piece_of(requests, context)
    assert piece % GRAIN == 0 and requests * piece <= max(POSITIONS, requests * GRAIN)
    assert expanded_bytes(tokens, requests, context, DEEPSEEK, 2) < tokens * 128 * 800 + POSITIONS * 67000


@HERE
@pytest.mark.parametrize(("stored", "piece"), [(0, GRAIN), (500, GRAIN), (500, None)])
def test_it_allocates_what_it_says(stored: int, piece: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly where the GPU is one: the interpreter copies what a kernel reads."""
    if piece is not None:
        monkeypatch.setattr(triton_mla_expanded, "POSITIONS", piece)
    step = make_step([(stored, 40)], 96, 16, spare=1)
    append_reference(*step.cache, randn(step.tokens, 96))
    given = operands(step, 3, 16, 32, 24, 64, torch.float32)
    took = allocated(lambda: attend_expanded(*given, *step.cache, 1.0))
    context = step.page_table.shape[1] * 16
    most = expanded_bytes(step.tokens, 1, context, replace(SHAPE, heads=3), 4)
    assert took == most if DEVICE == "cuda" else took <= most + step.pool.nbytes + sum(t.nbytes for t in given) + 4096


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 8192),
    key=st.sampled_from([48, 192, 288]),
    value=st.sampled_from([32, 128, 256]),
    itemsize=st.sampled_from([2, 4]),
    shared=st.sampled_from([99 << 10, 163 << 10, 227 << 10]),
)
def test_blocks_fit(tokens: int, key: int, value: int, itemsize: int, shared: int) -> None:
    b = choose_blocks(tokens, key, value, itemsize, Processors(100, shared))
    for size in (b.rows, b.keys):
        assert size & (size - 1) == 0 and 16 <= size <= GRAIN
    assert (b.rows * key + b.stages * b.keys * (key + value)) * itemsize <= shared


# ------------------------------------------------------------------------------------------------ the compiler


@pytest.mark.skipif(triton_mla.triton is None, reason="triton is not installed")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """Both kernels as a step of DeepSeek-V3 and a tiny one launch them: no spilled register; no GPU is needed."""
    code = "import test_triton_mla_expanded as t; t.compile_for_hopper()"
    lines = run_here(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    found = [line.split() for line in lines]
    assert [name for name, *_ in found] == ["_gather", "_flash"] * 3, lines
    assert all(int(shared) <= H100.shared_bytes for _, shared, *_ in found), lines
    assert [mma for name, _, mma, *_ in found if name == "_flash"] == ["wgmma"] * 3, lines
    assert not any(int(spilled) for *_, spilled in found), lines


class Recorder:
    """Stands in for a kernel: prints how the compiler takes a launch instead of launching."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
        built = built_for_hopper(self.kernel, arguments, constants, num_warps)
        mma = next((m for m in ("wgmma", "mma") if f"{m}." in built.asm["ptx"]), "-")
        print(self.kernel.__name__, built.metadata.shared, mma, *registers(built))


def registers(built: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which holds what was spilled."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(built.asm["cubin"])
        reader = import_module("triton.knobs").nvidia.cuobjdump.path
        told = subprocess.run([reader, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    ((used, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return int(used), int(stack)


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    here: Any = triton_mla_expanded
    for name in ("_gather", "_flash"):
        setattr(here, name, Recorder(getattr(here, name)))
    here._check_cache = lambda *_: None
    here.interpreted = lambda: False
    here.processors_of = lambda device: H100
    for shape, tokens, dtype, index, bytes_kept in (
        (DEEPSEEK, 256, torch.bfloat16, torch.int64, False),
        (SHAPE, 40, torch.float16, torch.int32, False),
        (DEEPSEEK, 2048, torch.bfloat16, torch.int64, True),
    ):
        shape = replace(shape, heads=2)
        width = shape.lora + (2 if bytes_kept else 1) * shape.rope
        kept = torch.uint8 if bytes_kept else dtype
        step = make_step([(0, tokens)], width, 16, kept if not bytes_kept else torch.float32, index)
        step = replace(step, pool=step.pool.nan_to_num().to(kept))
        given = operands(step, shape.heads, shape.nope, shape.rope, shape.v, shape.lora, dtype)
        attend_expanded(*given, *step.cache, shape.scale)
