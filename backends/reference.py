"""reference: any region, by its own captured body, with its weights decoded once."""

from typing import Any

import sympy

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.kernel import TOKENS
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
