"""insert-copies: make every region read values of its own device only."""

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ktcompile import Context, Pass, PassError, Region, Target, device_of, insert_copy, is_scalar, regions, value_of


@dataclass(frozen=True)
class InsertCopies(Pass):
    """Copy each value once to every other device that reads it, just before its first use there.

    The copy back from the CPU is also the wait for it: the later its first use, the more can overlap.
    Results go back to the device that the caller gave the inputs on.
    """

    name = "insert-copies"
    requires = ("placed",)
    establishes = ("local",)

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        made: dict[tuple[Node, str], Node] = {}
        for region in regions(gm):
            for value in region.inputs:
                _bring(value, str(region.device), region.node, made)
        output = next(n for n in gm.graph.nodes if n.op == "output")
        for value in output.all_input_nodes:
            if isinstance(value_of(value), torch.Tensor):
                _bring(value, _caller(value, ctx.target), output, made)
        if not made:
            ctx.skip("", "every value is already where it is read")
        return gm


def _caller(value: Node, target: Target) -> str:
    """The device that the caller expects a result on: the one it was captured on."""
    return target.main.name if value_of(value).device.type == "cuda" else target.host.name


def _bring(value: Node, device: str, user: Node, made: dict[tuple[Node, str], Node]) -> None:
    at = device_of(value)
    if at in (None, device) or is_scalar(value):
        return
    if value.meta.get("state"):
        raise PassError(
            f"{Region(user).path} on {device} writes {value.meta.get('input', value.name)}, which is on {at}; "
            "one page pool cannot be on two devices"
        )
    if (value, device) not in made:
        made[value, device] = insert_copy(value, device, user)
    user.replace_input_with(value, made[value, device])
