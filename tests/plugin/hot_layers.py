"""hot-layers: the experts of the first layers move to a device while a budget lasts."""

from dataclasses import dataclass

from torch.fx import GraphModule

from ktcompile import Context, Pass, regions


@dataclass(frozen=True)
class HotLayers(Pass):
    """Move experts, first layers first, to `device` until `budget` bytes of it are used. Assumes placed regions."""

    name = "hot-layers"
    requires = ("placed",)
    device: str = "gpu"
    budget: int = 8 << 30

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        left = self.budget
        for region in regions(gm, op="moe"):
            if region.nbytes > left:
                ctx.skip(region, f"needs {region.nbytes} bytes, {left} are left on {self.device}")
                continue
            region.place(ctx.target[self.device].name)
            left -= region.nbytes
        return gm
