"""widen: what 16 bits would round most stays in float32: the sums between layers, and logits."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx import GraphModule

from ktcompile import OPS, Context, Pass, Region, regions, value_of
from ktcompile.graph import GLUE, is_region, read_instead
from ktcompile.ops.plain import LinearShape, NormShape, added, widen_sum

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Widen(Pass):
    """Keep in float32 the sums that RMSNorms and other such sums read, and a linear that is made float32 anyway.

    The residual stream is rounded twice a layer, and each rounding is in all that follows. Norms of it still have 16
    bits, so kernels read what they did, and so has what a layer adds. Logits are float32 where the caller makes them
    so, as `load` does: of a size of 16 bf16 knows every eighth, and ties decide. A caller that takes 16 bits, as
    `torch.compile` does, gets these.
    """

    name = "widen"
    requires = ("folded",)

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        found = list(regions(gm))
        sums = dict.fromkeys(r.node for r in found if r.op == GLUE and _is_narrow(r.node) and _is_normed(r))
        casts = [r for r in found if r.op == GLUE and _is_cast(r)]
        if not sums and not casts:
            ctx.skip("", "no sum of layers, and no logits, of 16 bits")
            return gm
        while gone := {n: why for n in sums if (why := _unread(n, sums)) is not None}:
            for node, why in gone.items():
                ctx.skip(Region(node), why)
            sums = dict.fromkeys(n for n in sums if n not in gone)
        _rewrite(sums, widen_sum)
        _rewrite(dict.fromkeys(u for n in sums for u in n.users if u not in sums), _round_late)
        for cast in casts:
            why = _cast_inside(cast)
            if why is not None:
                ctx.skip(cast, why)
        return gm


def _is_normed(region: Region) -> bool:
    """Whether it is a sum that a norm reads."""
    return any(is_region(u) and Region(u).op == "norm" for u in region.node.users) and added(region)


def _is_narrow(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype in _NARROW


def _unread(node: fx.Node, sums: Collection[fx.Node]) -> str | None:
    """Why a sum has to stay as it is, or None."""
    for user in node.users:
        if user in sums:
            continue
        if not is_region(user):
            return "is a result, or read outside of regions"
        reader = Region(user)
        if reader.op != "norm" or reader.binding is None or reader.binding.shape is None:
            return f"is read by {reader.name}, which is no RMSNorm and no sum"
    return None


def _rewrite(nodes: Iterable[fx.Node], change: Callable[[Region], None]) -> None:
    """Change each region; those that shared one code share one again."""
    first: dict[tuple[object, object], Region] = {}
    for node in nodes:
        region = Region(node)
        binding = region.binding
        key = node.target, None if binding is None else binding.shape
        if key in first:
            region.take_body(first[key])
        else:
            change(region)
            first[key] = region


def _round_late(region: Region) -> None:
    """An RMSNorm of what is now float32: its result stays what it was, rounded once."""
    shape: NormShape = region.binding.shape
    dtype = value_of(region.node).dtype
    region.define(OPS["norm"], replace(region.binding, shape=replace(shape, late=True, dtype=dtype)))


def _is_cast(region: Region) -> bool:
    """Whether it makes a result of the graph in float32, of 16 bits."""
    value = value_of(region.node)
    is_result = any(u.op == "output" for u in region.node.users)
    return is_result and getattr(value, "dtype", None) == torch.float32 and any(map(_is_narrow, region.inputs))


def _cast_inside(cast: Region) -> str | None:
    """Let the linear before it return float32, or say why not."""
    nodes = [(n.op, n.target) for n in cast.body.graph.nodes if n.op not in ("placeholder", "output")]
    source = cast.inputs[0]
    if nodes != [("call_method", "float")] or not is_region(source) or Region(source).op != "linear":
        return "makes float32 of more than a linear's result"
    if len(source.users) > 1:
        return f"{Region(source).name} is read by others too"
    linear = Region(source)
    linear.define(OPS["linear"], replace(linear.binding, shape=LinearShape(torch.float32)))
    read_instead(cast, linear)
    return None
