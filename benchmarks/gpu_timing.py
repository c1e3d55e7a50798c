"""Times of GPU work next to the bandwidth of a copy: replays of a CUDA graph, the L2 cache overwritten before each."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

REPEATS = 50
EVENT: Any = torch.cuda.Event  # untyped in torch


def graph_us(step: Callable[[], None], scratch: torch.Tensor) -> float:
    """Median time of one replay of the captured step with a cold L2, in microseconds."""
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return median_us(graph.replay, scratch)


def copy_gb_s(scratch: torch.Tensor) -> float:
    """Bytes read and written by a copy of 1 GiB, per second."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_us(lambda: target.copy_(source), scratch) / 1e3


def median_us(run: Callable[[], object], scratch: torch.Tensor) -> float:
    times = []
    for i in range(REPEATS + 5):
        scratch.fill_(i)
        begin, end = EVENT(enable_timing=True), EVENT(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3)
    return median(times[5:])
