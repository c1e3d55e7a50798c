"""Time quantised linears on a GPU next to the bandwidth of a device copy; one JSON object a line.

    python benchmarks/bench_linear.py             the shapes of DeepSeek-V3, 1 to 16 tokens
    python benchmarks/bench_linear.py --sweep     a range of tiles: are `dot_tiles` and `gluon_dot.choose_tiles` right?

`us` is of one of several matrices in one CUDA graph, more than the caches hold, making integers of x included (not in
a sweep); `GB/s` counts the planes once. `error` is
|got - want| / |want| against the product of decoded weights in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
from gpu_timing import copy_gb_s, graph_us

from ktcompile.backends import gluon_dot
from ktcompile.backends.planes import FORMATS, Planes
from ktcompile.backends.triton_dot import DotTiles, Vector, dot, dot_tiles, most_tokens, tensor_cores
from ktcompile.backends.triton_linear import dequantize, linear
from ktcompile.backends.triton_mla import interpreted, processors_of, unavailable

SHAPES = (  # name, rows, columns, encoding
    ("o_proj", 7168, 16384, "q4_k"),
    ("q_b_proj", 24576, 1536, "q4_k"),
    ("q_a_proj", 1536, 7168, "q4_k"),
    ("kv_a_proj", 576, 7168, "q6_k"),
    ("dense gate", 18432, 7168, "q4_k"),
    ("dense down", 7168, 18432, "q6_k"),
    ("shared gate", 2048, 7168, "q4_k"),
    ("shared down", 7168, 2048, "q6_k"),
    ("lm_head", 129280, 7168, "q6_k"),
    ("o_proj q8_0", 7168, 16384, "q8_0"),
    ("o_proj int4", 7168, 16384, "int4_group32"),
    ("o_proj fp8", 7168, 16384, "fp8_block128"),
)
TILES = [DotTiles(r, w, u) for r, w, u in product((1, 2), (1, 2, 4), (32, 64, 128))]
NARROW = [DotTiles(r, w, 16) for r, w in product((1, 2), (2, 4, 8))]
GLUON_TILES = [
    gluon_dot.Tiles(r, c, s)
    for r, c, s in ((1, 2, 3), (1, 4, 2), (1, 4, 3), (1, 8, 2), (2, 2, 2), (2, 2, 3), (2, 4, 2), (2, 4, 3), (4, 2, 2))
]
TOKENS = (1, 2, 4, 8, 16, 32)
COLD_BYTES = 240 << 20
"""So many bytes of matrices are multiplied one after the other: several times the second-level cache."""


def make(rows: int, cols: int, encoding: str) -> Planes:
    """A matrix of random bits in planes, with small scales."""
    tensors = {}
    for name, (size, dtype) in FORMATS[encoding].shapes(rows, cols).items():
        if dtype.is_floating_point:
            tensors[name] = torch.rand(size, device="cuda").to(dtype) / 64
        else:
            tensors[name] = torch.randint(0, 127, (size[0], size[1] * dtype.itemsize), dtype=torch.uint8, device="cuda")
            tensors[name] = tensors[name].view(dtype)
    return Planes(encoding, rows, cols, tensors)


Tiles = DotTiles | gluon_dot.Tiles


def tiles_of(rows: int, p: Planes, tokens: int) -> list[Tiles]:
    """What a sweep tries: of the kernel that takes so many tokens times this matrix, the tiles of its choice first."""
    processors = processors_of(torch.cuda.current_device())
    if gluon_dot.fits(p) and tensor_cores(torch.cuda.current_device()) is None:
        return [gluon_dot.choose_tiles(rows, p.cols, tokens, processors), *GLUON_TILES]
    units = -(-p.cols // 32)
    tried = [t for t in (NARROW if units % 32 and units <= 64 else TILES) if t.rows * t.warp_rows < rows]
    return [dot_tiles(rows, p.cols, processors.count), *tried]


def tiled(v: Vector, p: Planes, tiles: Tiles) -> torch.Tensor:
    """The product with these tiles."""
    if isinstance(tiles, DotTiles):
        return dot(v, p, tiles=tiles)
    return gluon_dot.dot(v.integers, p, v.x.dtype, processors_of(v.x.get_device()), tiles=tiles)


def compiled(case: tuple[int, int, str, int]) -> None:
    """Fill Triton's cache: compiling takes a second, and is done side by side."""
    rows, cols, encoding, tokens = case
    p, x = make(min(rows, 64), cols, encoding), torch.ones(tokens, cols, device="cuda", dtype=torch.bfloat16)
    for tiles in tiles_of(rows, p, tokens):
        tiled(Vector(x), p, tiles)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
    arguments = parser.parse_args()
    why = None if torch.cuda.is_available() else "no CUDA device here"
    why = why or unavailable() or ("TRITON_INTERPRET is set" if interpreted() else None)
    if why is not None:
        print(f"bench_linear: {why}, nothing to measure", file=sys.stderr)
        return 0
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    copy = copy_gb_s(scratch)
    print(json.dumps({"bench": "copy", "GB/s": round(copy), "device": torch.cuda.get_device_name()}), flush=True)
    shapes = [s for s in SHAPES if not arguments.sweep or not FORMATS[s[3]].float8]
    if arguments.sweep:
        cases = {(c, e, t): (r, c, e, t) for _, r, c, e in shapes for t in TOKENS}
        with ProcessPoolExecutor(14, get_context("spawn")) as workers:
            list(workers.map(compiled, cases.values()))
    for name, rows, cols, encoding in shapes:
        p = make(rows, cols, encoding)
        several = [p, *(make(rows, cols, encoding) for _ in range(COLD_BYTES // p.nbytes))]
        weights = dequantize(p, torch.float32)
        for tokens in TOKENS:
            x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
            want = x.float() @ weights.T
            ways: dict[str, Callable[[Planes], torch.Tensor]] = {"": partial(linear, x)}
            if arguments.sweep and tokens <= most_tokens(p, torch.cuda.current_device()):
                v = Vector(x)
                ways = {json.dumps(asdict(t)): partial(tiled, v, tiles=t) for t in tiles_of(rows, p, tokens)}
            rowsets = []
            for tiles, run in ways.items():

                def each(run: Callable[..., torch.Tensor] = run, matrices: list[Planes] = several) -> None:
                    for matrix in matrices:
                        run(matrix)

                us = graph_us(each, scratch) / len(several)
                off = float((run(p).float() - want).norm() / want.norm())
                gb_s = p.nbytes / us / 1e3
                measured = {"us": round(us, 1), "GB/s": round(gb_s), "of_copy": round(gb_s / copy, 3)}
                rowsets.append(
                    {"bench": name, "rows": rows, "cols": cols, "encoding": encoding, "tokens": tokens}
                    | measured | {"error": float(f"{off:.1e}")} | ({"tiles": tiles} if tiles else {})
                )  # fmt: skip
            for row in [rowsets[0], *sorted(rowsets[1:], key=lambda r: r["us"])[:3]]:
                print(json.dumps(row), flush=True)
        del p, several, weights
    return 0


if __name__ == "__main__":
    sys.exit(main())
