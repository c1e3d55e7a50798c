"""Times the routed experts: one JSON line a case. Run alone on the machine: python benchmarks/bench_moe.py --help"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from ktcompile.backends import native


def weights(type: str, experts: int, hidden: int, width: int) -> native.MoeWeights:
    """Random packed bytes whose float16 scales are small: q8_0, q5_0 and q4_k keep them first in a block."""

    def matrices(rows: int, cols: int) -> Tensor:
        if type in ("f32", "bf16"):
            dtype = torch.float32 if type == "f32" else torch.bfloat16
            return (torch.randn(experts, rows * cols) * cols**-0.5).to(dtype).view(torch.uint8)
        nbytes = native.packed_bytes(type, rows, cols)
        blocks = torch.randint(0, 256, (experts, nbytes), dtype=torch.uint8)
        size, fields = {"q8_0": (34, (0,)), "q5_0": (22, (0,)), "q4_k": (144, (0, 2)), "q6_k": (210, (208,))}[type]
        for field in fields:
            blocks.view(experts, -1, size)[:, :, field : field + 2] = torch.tensor([1e-3]).half().view(torch.uint8)
        return blocks

    gate, up, down = matrices(width, hidden), matrices(width, hidden), matrices(hidden, width)
    return native.MoeWeights(experts, hidden, width, "silu", gate, up, down, type, type, type)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else "unknown"


def median_us(pool: native.Pool, isa: str, made: native.MoeWeights, tokens: int, top_k: int, seconds: float) -> float:
    """Median of calls with new routings: in a model no two layers share weights, so caches are of little help."""
    x = torch.randn(tokens, made.hidden)
    scores = torch.full((tokens, top_k), 1 / top_k)
    out = torch.empty_like(x)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 4:
        ids = torch.rand(tokens, made.experts).topk(top_k).indices
        start = time.perf_counter()
        native.moe(pool, isa, made, x, ids, scores, out=out)
        times.append((time.perf_counter() - start) * 1e6)
    return sorted(times[1:])[len(times[1:]) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--types", nargs="+", default=["q4_k"], choices=native.TYPES)
    parser.add_argument("--isas", nargs="+", default=[isa for isa, reason in native.isas().items() if reason is None])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0, help="a case")
    options = parser.parse_args()
    pool = native.Pool(options.threads)
    for type in options.types:
        made = weights(type, options.experts, options.hidden, options.width)
        expert_bytes = made.gate[0].numel() + made.up[0].numel() + made.down[0].numel()
        for isa in options.isas:
            if native.refuses(isa, made.types):
                continue
            for tokens in options.tokens:
                us = median_us(pool, isa, made, tokens, options.top_k, options.seconds)
                used = options.experts * (1 - (1 - options.top_k / options.experts) ** tokens)
                flop = 6 * tokens * options.top_k * options.hidden * options.width
                print(
                    json.dumps(
                        {
                            "kernel": "moe",
                            "isa": isa,
                            "type": type,
                            "tokens": tokens,
                            "us": round(us, 1),
                            "weight_gb_s": round(used * expert_bytes / us / 1e3, 2),
                            "gflop_s": round(flop / us / 1e3, 1),
                            "hidden": options.hidden,
                            "width": options.width,
                            "experts": options.experts,
                            "top_k": options.top_k,
                            "threads": options.threads,
                            "cpu": cpu_name(),
                        }
                    )
                )
                sys.stdout.flush()
    pool.close()


if __name__ == "__main__":
    main()
