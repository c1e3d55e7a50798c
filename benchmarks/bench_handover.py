"""What it costs to hand a token over from the GPU to the CPU and back, inside one CUDA graph: one JSON line a way.

    python benchmarks/bench_handover.py [--layers 58] [--hidden 7168]

The call is one of no tokens: the driver takes it, returns at once, and nothing but the hand-over is left.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from ktcompile.backends import native
from ktcompile.backends.handover import Flags, HostFunctions
from ktcompile.target import cpu_name

EXPERTS, TOP_K, WIDTH = 1, 1, 32


def weights(hidden: int) -> native.MoeWeights:
    """One small expert of zeros."""
    up, down = (native.packed_bytes("q8_0", *size) for size in ((WIDTH, hidden), (hidden, WIDTH)))
    tensors = [native.empty(EXPERTS * n).view(EXPERTS, n).zero_() for n in (up, up, down)]
    return native.MoeWeights(EXPERTS, hidden, WIDTH, "silu", *tensors, "q8_0", "q8_0", "q8_0", tile_tokens=0)


def prepare(pool: native.Pool, experts: native.MoeWeights, hidden: int) -> native.Submission:
    """One token's call on pinned tensors."""
    x, y = (torch.zeros(1, hidden, pin_memory=True) for _ in range(2))
    ids = torch.arange(TOP_K).view(1, TOP_K).pin_memory()
    scores = torch.zeros(1, TOP_K, pin_memory=True)
    isa = next(i for i in ("avx512_vnni", "avx2", "scalar") if native.isas()[i] is None)
    return native.Submission(pool, isa, experts, x, ids, scores, y)


def seconds(run: Callable[[], None], repeats: int = 50) -> tuple[float, float]:
    """Median, and the spread from the first to the last decile."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    deciles = statistics.quantiles(times, n=10)
    return statistics.median(times), deciles[-1] - deciles[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--hidden", type=int, default=7168)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"gpu": None, "why": "torch sees no CUDA device; nothing was measured"}))
        return 0
    pool, experts = native.Pool(1), weights(args.hidden)  # one thread: what is measured is not its barriers
    device = torch.device("cuda")
    x = torch.randn(1, args.hidden, device=device, dtype=torch.bfloat16)
    ids = torch.arange(TOP_K, device=device).view(1, TOP_K)
    scores = torch.ones(1, TOP_K, device=device)
    for way in (Flags, HostFunctions):
        if why := way.missing():
            print(json.dumps({"way": way.__name__, "missing": why}), flush=True)
            continue
        made = [prepare(pool, experts, args.hidden) for _ in range(args.layers)]
        ways = [way(m, device) for m in made]
        pool.rest(False)

        def layers(ways: list = ways) -> torch.Tensor:
            value = x
            for each in ways:
                each.submit(value, ids, scores)
                value = each.wait(value)
            return value

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layers()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            layers()
        for each in made:
            each.resize(0)  # what enqueued them said one
        graph.replay()
        median, spread = seconds(graph.replay)
        pool.rest(True)
        row = {
            "way": way.__name__,
            "gpu": torch.cuda.get_device_name(0),
            "cpu": cpu_name(),
            "layers": args.layers,
            "us_a_layer": round(median / args.layers * 1e6, 2),
            "spread_us_a_layer": round(spread / args.layers * 1e6, 2),
        }
        print(json.dumps(row), flush=True)
        for each in made:
            each.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
