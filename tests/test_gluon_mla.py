"""The Gluon kernel gives what `attend_reference` gives, where there is a Hopper GPU; it compiles for one anywhere.

Gluon has no interpreter: on other machines only its compilation and what is said in its place are tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_triton_mla import H100, make_step, randn

from ktcompile.backends import gluon_mla, triton_mla
from ktcompile.ops.mla import attend_reference

WIDTH = gluon_mla.LORA + gluon_mla.ROPE
WHY = gluon_mla.refuses(torch.cuda.current_device() if triton_mla.unavailable() is None and not triton_mla.interpreted()
                        else -1)  # fmt: skip
HERE = pytest.mark.skipif(WHY is not None, reason=str(WHY))


@HERE
@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5)), min_size=1, max_size=5),
    heads=st.sampled_from([1, 16, 20, 64, 96, 128]),
    page=st.sampled_from([8, 16, 32, 64, 128]),
    padding=st.integers(0, 3),
    splits=st.sampled_from([1, 2, 4, 16]),
    index=st.sampled_from([torch.int32, torch.int64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    growth=st.sampled_from([0.0, 0.01, -0.003]),
)
@example([(8000, 1)], 128, 16, 0, 64, torch.int64, torch.bfloat16, 0.0)
@example([(0, 0), (63, 1), (64, 1), (65, 1)], 128, 16, 2, 2, torch.int32, torch.bfloat16, 0.0)
@example([(63, 1), (127, 1), (128, 1), (200, 1)], 128, 16, 0, 1, torch.int64, torch.bfloat16, 0.01)
def test_attend(
    requests: list[tuple[int, int]],
    heads: int,
    page: int,
    padding: int,
    splits: int,
    index: torch.dtype,
    dtype: torch.dtype,
    growth: float,
) -> None:
    """`growth`: of the cache's rows with their position, so that the largest score rises or falls by blocks."""
    step = make_step(requests, WIDTH, page, dtype, index, padding, spare=1)
    if step.tokens == 0:
        return
    cache = step.cache
    for stored, queries, pages in zip(*zip(*requests, strict=True), cache[1], strict=True):
        for position in range(stored, stored + queries):  # the step's own rows are stored already
            cache[0][int(pages[position // page]), position % page] = randn(WIDTH, dtype=dtype)
        at = torch.arange(stored + queries, device=pages.device)
        cache[0][pages[at // page].long(), at % page] *= (1 + growth * at)[:, None].to(dtype)
    latent = randn(heads, step.tokens, gluon_mla.LORA, dtype=dtype).transpose(0, 1)
    rope = randn(step.tokens, heads, gluon_mla.ROPE, dtype=dtype)
    tiles = triton_mla.Tiles(gluon_mla.ROWS, gluon_mla.KEYS, splits, gluon_mla.WARPS, 2, True)
    got = triton_mla.mla_attend(latent, rope, *cache, 0.07, tiles=tiles).float()
    want = attend_reference(latent.float(), rope.float(), cache[0].float(), *cache[1:], 0.07)
    assert not got.isnan().any()
    assert float((got - want).norm()) <= 1e-2 * float(want.norm())


@HERE
def test_it_is_chosen() -> None:
    step = make_step([(500, 1)], WIDTH, 16, torch.bfloat16)
    latent, rope = randn(1, 128, gluon_mla.LORA, dtype=torch.bfloat16), randn(1, 128, 64, dtype=torch.bfloat16)
    assert gluon_mla.fits(latent, rope, step.pool)


def test_too_few_rows_or_other_types_are_triton_s() -> None:
    few = triton_mla.choose_tiles(1, 1, 16, WIDTH, 2, 8192, 1, H100, gluon=True)
    many = triton_mla.choose_tiles(1, 1, 128, WIDTH, 2, 8192, 1, H100, gluon=True)
    assert not few.gluon and many.gluon
    assert (many.rows, many.keys, many.warps) == (gluon_mla.ROWS, gluon_mla.KEYS, gluon_mla.WARPS)
    latent, rope = torch.empty(1, 128, 512, dtype=torch.bfloat16), torch.empty(1, 128, 64, dtype=torch.bfloat16)
    assert gluon_mla.fits(latent, rope, torch.empty(1, 16, WIDTH, dtype=torch.bfloat16))
    assert not gluon_mla.fits(latent, rope, torch.empty(1, 16, WIDTH + 64, dtype=torch.uint8))
    assert not gluon_mla.fits(latent.float(), rope.float(), torch.empty(1, 16, WIDTH))
    assert not gluon_mla.fits(latent[..., :256], rope, torch.empty(1, 16, 320, dtype=torch.bfloat16))
    for page in (4, 12, 48, 96):
        assert not gluon_mla.fits(latent, rope, torch.empty(1, page, WIDTH, dtype=torch.bfloat16))


@pytest.mark.skipif(not triton_mla.interpreted(), reason="where there is a GPU, it is asked")
def test_the_interpreter_is_told_why() -> None:
    assert gluon_mla.refuses(-1) == "the interpreter does not know Gluon"


@pytest.mark.skipif(gluon_mla.gl is None, reason="there is no Gluon")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """As DeepSeek-V3 launches it, whole and in parts, and with 20 heads."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import test_gluon_mla as t; t.compile_for_hopper()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for shared, products in lines:
        assert int(shared) <= H100.shared_bytes
        # Scores 4 and a tile 4, an own block 4, the other's 4; the first block and the last stand apart.
        assert int(products) == 2 * (8 + 4 + 4 + 4) + (8 + 4)


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    compiler, targets = import_module("triton.compiler"), import_module("triton.backends.compiler")
    source = import_module("triton.experimental.gluon._runtime").GluonASTSource
    kernel = gluon_mla.attend
    pointers = {"q_latent": "*bf16", "q_rope": "*bf16", "out": "*bf16"}
    pointers |= {"partial": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    box = f"tensordesc<bf16[16, 64],{gluon_mla.gl.NVMMASharedLayout(128, 16, 2)!r}>"
    pointers |= {"latents": box, "keys": box}
    for heads, splits, index in ((128, 1, "*i64"), (128, 4, "*i32"), (20, 4, "*i64")):
        constants = {
            "HEADS": heads, "LORA": 512, "ROPE": 64, "PAGE": 16, "REQUESTS_PAD": 4, "ROWS": gluon_mla.ROWS,
            "KEYS": gluon_mla.KEYS, "SPLITS": splits,
        }  # fmt: skip
        types = pointers | dict.fromkeys(("page_table", "seq_len", "query_start"), index)
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        aligned = [n for n in kernel.arg_names if signature[n].startswith("*") or n.endswith("_stride")]
        attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        built = compiler.compile(
            source(kernel, signature, constants, attributes),
            target=targets.GPUTarget("cuda", 90, 32),
            options={"num_warps": gluon_mla.WARPS},
        )
        print(built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async"))
