"""fuse-norms: a residual sum and the RMSNorm that reads it in one launch."""

from dataclasses import dataclass, replace

from torch.fx import GraphModule

from ktcompile import Context, OptionError, Pass, Region, regions
from ktcompile.graph import GLUE, is_region, join, remove, take_over
from ktcompile.kernel import Kernel, available, refusal
from ktcompile.ops.plain import added
from ktcompile.pipeline import near
from ktcompile.verify import wrong_binding


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Make of a sum of two values and an RMSNorm of it one region, which returns both, where `kernel` takes it.

    A launch less for every norm of every layer, and the sum is not read again. On a CPU, which launches nothing, and
    across devices all stays as it is. What the new region is said to mean is checked on random inputs, as by fold.
    """

    name = "fuse-norms"
    requires = ("placed",)
    kernel: str = "triton_add_norm"

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        kernels = available()
        if self.kernel not in kernels:
            raise OptionError("kernel", f"no kernel {self.kernel!r}; {near(self.kernel, kernels)}")
        if ctx.target.main.kind != "cuda":
            ctx.skip("", "there is no GPU")
            return gm
        checked: dict[tuple[object, object], str | None] = {}
        for norm in list(regions(gm, op="norm")):
            node = norm.inputs[0]
            if not is_region(node) or Region(node).op != GLUE:
                continue
            why = _fuse(Region(node), norm, kernels[self.kernel], ctx, checked)
            if why is not None:
                ctx.skip(norm, why)
        return gm


def _fuse(
    total: Region, norm: Region, kernel: Kernel, ctx: Context, checked: dict[tuple[object, object], str | None]
) -> str | None:
    """Replace both by one region, or say why not."""
    if norm.device != total.device:
        return f"reads a sum made on {total.device}"
    if not added(total):
        return f"{total.name} is not a sum of two values"
    fused = join(total, norm, "add_norm", replace(norm.binding, roles={"x": 0, "r": 1}))
    why = refusal(kernel, fused, ctx.target)
    key = fused.node.target, fused.binding.shape
    if why is None and key not in checked:
        checked[key] = wrong_binding(fused)
    why = why or checked[key]
    if why is not None:
        remove(fused)
        return f"{kernel.name}: {why}"
    take_over(fused, total, norm)
    return None
