"""What one step holds on each device beside weights and cache: its values, and what its kernels need."""

import operator
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktcompile.errors import CapacityError
from ktcompile.graph import Region, argument, device_of, is_copy, is_region, regions, value_of
from ktcompile.kernel import available
from ktcompile.symbols import Sizes, nbytes
from ktcompile.target import CONTEXT_BYTES, Target


@dataclass(frozen=True)
class Held:
    """Bytes that a loaded model holds on a device: packed weights, page pools of the caches that exist.

    `peak`: the most that torch's allocator had given out there at once, by this process; None where it is no GPU.
    """

    weights: int
    cache: int
    peak: int | None


def workspace(gm: fx.GraphModule, sizes: Sizes) -> dict[str, int]:
    """Bytes by device: the most that one step allocates at once.

    A value lives from the region that makes it to the last one that reads it, as in the code that runs. While a region
    runs there is also what its kernel says it needs. Before kernels are chosen nothing of this is known: 0.
    """
    if any(r.kernel is None for r in regions(gm)):
        return {}
    kernels, bytes_of = available(), _Sizer(sizes)
    live: dict[str, int] = {}
    peak: dict[str, int] = {}
    ends: dict[int, list[fx.Node]] = {}
    for value, index in _last_readers(gm).items():
        ends.setdefault(index, []).append(value)
    for i, node in enumerate(gm.graph.nodes):
        if is_copy(node) or is_region(node):
            device, size = str(device_of(node)), bytes_of(value_of(node))
            kernel = kernels.get(str(node.meta.get("kernel")))
            needs = size if kernel is None else kernel.workspace_bytes(Region(node), sizes)
            live.setdefault(device, 0)
            peak[device] = max(peak.get(device, 0), live[device] + needs)
            live[device] += size
        for value in ends.get(i, ()):
            live[str(device_of(value))] -= bytes_of(value_of(value))
    return peak


def _last_readers(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """The values of regions and copies, and the position of the node after which each is let go."""
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(gm.graph.nodes):
        if is_copy(node) or is_region(node):
            last[node] = i
        for value in node.all_input_nodes:
            base = value
            while base.target is operator.getitem:
                base = argument(base, 0)
            if base in last:
                last[base] = i
    return last


class _Sizer:
    """Bytes of values; equal types are worked out once, since symbolic sizes take a millisecond."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.known: dict[str, int] = {}

    def __call__(self, value: Any) -> int:
        if isinstance(value, (tuple, list)):
            return sum(map(self, value))
        if not isinstance(value, torch.Tensor):
            return 0
        key = f"{value.dtype}{tuple(map(str, value.shape))}"
        if key not in self.known:
            self.known[key] = nbytes(value, self.sizes)
        return self.known[key]


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch's allocator had given out at once on a GPU; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def keep_to(target: Target) -> None:
    """Have torch's allocator raise rather than take more of a GPU than its capacity in the target."""
    for device in target.devices:
        if device.torch.type == "cuda":
            total = torch.cuda.get_device_properties(device.torch).total_memory
            torch.cuda.set_per_process_memory_fraction((device.capacity - CONTEXT_BYTES) / total, device.torch)


@contextmanager
def out_of_memory(asked: str, free: Callable[[], None]) -> Iterator[None]:
    """Raise CapacityError where CUDA has no memory left for what was `asked`; the values of that call are let go first.

    `free` gives back what else it may have left.
    """
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the values that were computed so far
        told = re.findall(r"Tried to allocate ([\d.]+ \w+)|GPU (\d+) has", str(error))
    sizes, gpus = [size for size, _ in told if size], [gpu for _, gpu in told if gpu]
    free()
    raise CapacityError(
        f"cuda:{gpus[0] if gpus else 0} is out of memory{f' for {sizes[0]} more' if sizes else ''}: asked was {asked}. "
        "Ask for fewer tokens at once, load with a shorter context, or end what else uses this GPU"
    )
