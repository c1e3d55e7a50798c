"""Time MLA of the Triton kernels, decode next to the bandwidth of a device copy; one JSON object a line.

    python benchmarks/bench_mla.py            DeepSeek-V3: 128 heads, 512 + 64, pages of 16, bfloat16
    python benchmarks/bench_mla.py --sweep    the same for a range of tiles: is `choose_tiles` right, `choose_blocks`?
    python benchmarks/bench_mla.py --prompts  prompts alone

Prompts are timed in both forms, from queries to values, so with the products with kv_b. `TFLOP/s` counts what that form
computes, `flash_us` and `flash_TFLOP/s` are of the attention kernel of the expanded form alone, all pieces together.

A call is captured in a CUDA graph and replayed, so launches cost what they cost in the engine; before each replay the
L2 cache is overwritten. `GB/s` counts the cache once (1152 bytes a token), whatever the kernel reads again. `error` is
|got - want| / |want| against the float32 reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product

import torch
from gpu_timing import copy_gb_s, graph_us

from ktcompile.backends import gluon_mla, triton_mla
from ktcompile.backends.triton_mla import Tiles, absorb, choose_tiles, mla_attend, processors_of
from ktcompile.backends.triton_mla_expanded import Blocks, attend_expanded, choose_blocks, expands
from ktcompile.ops.mla import MLAShape, attend_reference
from ktcompile.symbols import PAGE

HEADS, LORA, ROPE, DTYPE = 128, 512, 64, torch.bfloat16
SCALE = (128 + ROPE) ** -0.5
CASES = ((1, 1024), (1, 8192), (32, 1024), (32, 8192), (32, 32768), (32, 65536))  # requests, context
PROMPTS = ((2048, 0), (2048, 8192), (512, 0), (512, 32768))  # tokens, stored before
NOPE = V = 128
SHAPE = MLAShape(HEADS, NOPE, ROPE, V, LORA, SCALE, True, 1e-6)
OUT_OF_RESOURCES = () if triton_mla.triton is None else triton_mla.triton.runtime.OutOfResources


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
    parser.add_argument("--prompts", action="store_true", help="no decode")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_mla: no CUDA device here, nothing to measure", file=sys.stderr)
        return 0
    why = triton_mla.unavailable()
    if why is not None or triton_mla.interpreted():
        print(f"bench_mla: {why or 'TRITON_INTERPRET is set'}, nothing to measure", file=sys.stderr)
        return 0

    scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    copy = copy_gb_s(scratch)
    versions = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton_mla.triton.__version__,
    }
    print(json.dumps({"bench": "copy", "GB/s": round(copy), **versions}), flush=True)
    width, processors = LORA + ROPE, processors_of(torch.cuda.current_device())
    for requests, context in () if arguments.prompts else CASES:
        gluon = gluon_mla.refuses(torch.cuda.current_device()) is None
        chosen = choose_tiles(requests, requests, HEADS, width, DTYPE.itemsize, context, 1, processors, gluon)
        for tiles in (chosen, *(others(chosen) if arguments.sweep else ())):
            print(json.dumps(decode(requests, context, tiles, copy, scratch)), flush=True)
    for tokens, stored in PROMPTS:
        best = choose_blocks(tokens, NOPE + ROPE, V, DTYPE.itemsize, processors)
        tried = [Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 3), Blocks(64, 64, 4, 2)]
        for blocks in (None, best, *(tried if arguments.sweep else ())):
            print(json.dumps(prompt(tokens, stored, blocks, scratch)), flush=True)
    return 0


def others(chosen: Tiles) -> Iterator[Tiles]:
    most = max(2, chosen.splits)
    for rows, keys, stages, splits in product((16, 64), (32, 64), (2, 3), (most // 2, most, most * 2)):
        tiles = Tiles(rows, keys, splits, 4 if rows == 16 else 8, stages)
        if tiles != chosen:
            yield tiles


def decode(requests: int, context: int, tiles: Tiles, copy: float, scratch: torch.Tensor) -> dict[str, object]:
    """One step of a token a request, whose row is already stored: the context counts it."""
    torch.manual_seed(0)
    per_request = context // PAGE
    pool = torch.randn(requests * per_request, PAGE, LORA + ROPE, device="cuda", dtype=DTYPE)
    order = torch.randperm(requests * per_request, device="cuda", dtype=torch.int32)
    lengths = torch.full((requests,), context - 1, device="cuda", dtype=torch.int32)
    query_start = torch.arange(requests + 1, device="cuda", dtype=torch.int32)
    cache = (pool, order.view(requests, per_request), lengths, query_start)
    q_latent = torch.randn(requests, HEADS, LORA, device="cuda", dtype=DTYPE)
    q_rope = torch.randn(requests, HEADS, ROPE, device="cuda", dtype=DTYPE)
    out = torch.empty_like(q_latent)
    case: dict[str, object] = {"bench": "decode", "requests": requests, "context": context, "tiles": asdict(tiles)}

    def step() -> None:
        mla_attend(q_latent, q_rope, *cache, SCALE, out, max_queries=1, tiles=tiles)

    try:
        us = graph_us(step, scratch)
    except OUT_OF_RESOURCES as error:  # of a sweep, not all fit the device
        return case | {"failed": str(error).splitlines()[0]}
    gb_s = pool.nbytes / us / 1e3
    tflop_s = 2 * requests * HEADS * (2 * LORA + ROPE) * context / us / 1e6
    off = 0.0
    for r in range(requests):  # one at a time: the reference copies the context to float32
        one = (pool, cache[1][r : r + 1], lengths[:1], query_start[:2])
        want = attend_reference(q_latent[r : r + 1], q_rope[r : r + 1], *one, SCALE).float()
        off = max(off, float((out[r : r + 1].float() - want).norm() / want.norm()))
    measured = {"us": round(us, 1), "GB/s": round(gb_s), "of_copy": round(gb_s / copy, 3), "TFLOP/s": round(tflop_s)}
    return case | measured | {"error": float(f"{off:.1e}")}


def prompt(tokens: int, stored: int, blocks: Blocks | None, scratch: torch.Tensor) -> dict[str, object]:
    """One step of one request, whose rows are already stored; without `blocks` in the absorbed form."""
    torch.manual_seed(0)
    context = stored + tokens
    pool = torch.randn(context // PAGE, PAGE, LORA + ROPE, device="cuda", dtype=DTYPE)
    table = torch.randperm(context // PAGE, device="cuda", dtype=torch.int32)[None]
    counts = torch.tensor([stored, 0, tokens], device="cuda", dtype=torch.int32)
    cache = (pool, table, counts[:1], counts[1:])
    query = torch.randn(tokens, HEADS, NOPE + ROPE, device="cuda", dtype=DTYPE)
    q_nope, q_rope = query.split([NOPE, ROPE], -1)
    w_uk, w_uv = absorb(torch.randn(HEADS * (NOPE + V), LORA, device="cuda", dtype=DTYPE) / LORA**0.5, SHAPE)
    case: dict[str, object] = {"bench": "prompt", "tokens": tokens, "stored": stored}
    case |= {"form": "absorbed"} if blocks is None else {"form": "expanded", "blocks": asdict(blocks)}
    case |= {"chosen": (blocks is not None) == expands(tokens, 1, context, SHAPE)}

    def step() -> torch.Tensor:
        if blocks is not None:
            return attend_expanded(q_nope, q_rope, w_uk, w_uv, *cache, SCALE, blocks=blocks)
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        mixed = mla_attend(q_latent, q_rope, *cache, SCALE)
        return torch.bmm(mixed.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    try:
        us = graph_us(step, scratch)
    except OUT_OF_RESOURCES as error:
        return case | {"failed": str(error).splitlines()[0]}
    pairs = tokens * stored + tokens * (tokens + 1) // 2
    pair, position = (2 * LORA + ROPE, tokens) if blocks is None else (NOPE + ROPE + V, context)
    flop = 2 * HEADS * (pairs * pair + position * LORA * (NOPE + V))
    case |= {"us": round(us, 1), "TFLOP/s": round(flop / us / 1e6)}
    if blocks is not None:
        flash_us = kernel_us(step, "_flash")
        flash_tflop_s = 2 * HEADS * pairs * pair / flash_us / 1e6
        case |= {"flash_us": round(flash_us, 1), "flash_TFLOP/s": round(flash_tflop_s)}
    last = torch.tensor([context - 8, 0, 8], device="cuda", dtype=torch.int32)  # the reference copies a context a row
    q_latent = torch.einsum("thn,hnl->thl", q_nope[-8:].float(), w_uk.float())
    mixed = attend_reference(q_latent, q_rope[-8:].float(), pool, table, last[:1], last[1:], SCALE)
    want = torch.einsum("thl,hvl->thv", mixed, w_uv.float())
    off = float((step()[-8:].float() - want).norm() / want.norm())
    return case | {"error": float(f"{off:.1e}")}


def kernel_us(step: Callable[[], object], name: str) -> float:
    """Time of all launches of one kernel in a step, in microseconds; mean of 10 steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    return sum(float(e.device_time_total) for e in profile.key_averages() if e.key == name) / 10


if __name__ == "__main__":
    sys.exit(main())
