"""reference: any region, by its own captured body, with its weights decoded once."""

from typing import Any

import sympy
import torch

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.fake import body_bytes
from ktcompile.graph import remembered
from ktcompile.kernel import TOKENS
from ktcompile.symbols import Sizes, concrete, nbytes
from ktcompile.weights import values


class Reference(Kernel):
    """Runs the captured code. Takes everything, everywhere."""

    name = "reference"
    op = "*"
    device = "*"
    layout = "plain"

    def refuses(self, region: Region, target: Target) -> str | None:
        return None

    def packed_bytes(self, region: Region) -> int:
        return region.decoded_bytes

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        return code_bytes(region, sizes)

    def cost(self, region: Region, target: Target) -> Cost:
        return plain_cost(region, self.packed_bytes(region))

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        device = target[region.home or target.main.name].torch
        nodes = region.weights
        return Packed(
            self.layout,
            {
                leaf: values(parts.source, key, value_of(nodes[leaf]).dtype).to(device)
                for leaf, key in parts.keys.items()
            },
        )

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Any:
        return region.body(*inputs, *(packed.tensors[leaf] for leaf in region.leaves))


def code_bytes(region: Region, sizes: Sizes) -> int:
    """Most bytes that the region's code allocates at once, from a run on fake tensors of these sizes.

    What an op of ours makes inside is not seen there: it counts as much again as the results. Only the results count
    where a size is not known.
    """
    results = nbytes(value_of(region.node), sizes)
    args = [_sized(value_of(n), sizes) for n in (*region.inputs, *region.weights.values())]
    if any(isinstance(d, str) for a in args for d in (a[0] if isinstance(a, tuple) else (a,))):
        return results
    memo = remembered(region.graph_module)
    key = "code", region.node.target, str(args)
    if key not in memo:
        memo[key] = body_bytes(region.body, args)
    return int(memo[key]) + results


def _sized(value: Any, sizes: Sizes) -> Any:
    """(shape, dtype) of a tensor, or a number; text for a size that is not known."""
    if isinstance(value, torch.Tensor):
        return tuple(concrete(d, sizes) for d in value.shape), value.dtype
    return concrete(value, sizes) if isinstance(value, (int, torch.SymInt)) else value


def plain_cost(region: Region, nbytes: int) -> Cost:
    """Cost of a region that reads all its weights once, with two operations a weight and token."""
    elements = sum(int(value_of(w).numel()) for w in region.weights.values() if value_of(w).dim() > 1)
    if region.op == "embed":  # reads one row a token
        row = next(iter(region.weights.values()))
        return Cost(TOKENS * int(value_of(row)[0].nbytes), sympy.Integer(0))
    if region.op in ("moe", "experts"):
        experts = int(value_of(next(iter(region.weights.values()))).shape[0])
        top_k = region.binding.shape.top_k if region.binding else experts
        touched = experts * (1 - (1 - sympy.Rational(top_k, experts)) ** TOKENS)
        return Cost(touched * nbytes / experts, 2 * TOKENS * elements * top_k / experts)
    return Cost(sympy.Integer(nbytes), 2 * TOKENS * elements)
