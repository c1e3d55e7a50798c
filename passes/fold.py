"""fold: one region a module call."""

from dataclasses import dataclass

from torch.fx import GraphModule

from ktcompile import OPS, Context, Pass, bind, regions
from ktcompile import fold as fold_graph
from ktcompile.verify import wrong_binding


@dataclass(frozen=True)
class Fold(Pass):
    """Fold each outermost module call that an op knows into one region, and what remains into glue.

    What an op is said to mean is checked on random inputs; a region that differs keeps its captured code. A norm is
    then any norm, and a router one whose rule is unknown: both stay what they are.
    Assumes a captured graph: module paths, types and weight names on its nodes.
    """

    name = "fold"
    establishes = ("folded",)

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        folded, refusals = fold_graph(gm, bind)
        for path, told in refusals:
            ctx.skip(path, told)
        checked: dict[tuple[int, object], str | None] = {}
        for region in regions(folded):
            if region.binding is None or OPS[region.op].define is None:
                continue
            key = id(region.body), region.binding.shape
            if key not in checked:
                checked[key] = wrong_binding(region)
            if (why := checked[key]) is not None:
                region.unbind(OPS[region.op].undefined(region.binding))
                ctx.skip(region, why)
        return folded
