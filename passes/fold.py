"""fold: one region a module call."""
from dataclasses import dataclass

from torch.fx import GraphModule

from ktcompile import Context, Pass, bind
from ktcompile import fold as fold_graph


@dataclass(frozen=True)
class Fold(Pass):
    """Fold each outermost module call that an op knows into one region, and what remains into glue.

    Assumes a captured graph: module paths, types and weight names on its nodes.
    """

    name = "fold"
    establishes = ("folded",)

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        folded, refusals = fold_graph(gm, bind)
        for path, why in refusals:
            ctx.skip(path, why)
        return folded
