"""Time MLA decode of the Triton kernels next to the bandwidth of a device copy; one JSON object a line.

    python benchmarks/bench_mla.py            DeepSeek-V3: 128 heads, 512 + 64, pages of 64, bfloat16
    python benchmarks/bench_mla.py --sweep    the same for a range of tiles: is `choose_tiles` right?

A call is captured in a CUDA graph and replayed, so launches cost what they cost in the engine; before each replay the
L2 cache is overwritten. `GB/s` counts the cache once (1152 bytes a token), whatever the kernel reads again. `error` is
|got - want| / |want| against the float32 reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

import torch
from gpu_timing import copy_gb_s, graph_us

from ktcompile.backends import triton_mla
from ktcompile.backends.triton_mla import Tiles, choose_tiles, mla_attend, processors_of
from ktcompile.ops.mla import attend_reference

HEADS, LORA, ROPE, PAGE, DTYPE = 128, 512, 64, 64, torch.bfloat16
SCALE = (128 + ROPE) ** -0.5
CASES = ((1, 1024), (1, 8192), (32, 1024), (32, 8192), (32, 32768))  # requests, context
OUT_OF_RESOURCES = () if triton_mla.triton is None else triton_mla.triton.runtime.OutOfResources


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
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
    for requests, context in CASES:
        width, processors = LORA + ROPE, processors_of(torch.cuda.current_device())
        chosen = choose_tiles(requests, requests, HEADS, width, DTYPE.itemsize, context, 1, processors)
        for tiles in (chosen, *(others(chosen) if arguments.sweep else ())):
            print(json.dumps(decode(requests, context, tiles, copy, scratch)), flush=True)
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


if __name__ == "__main__":
    sys.exit(main())
