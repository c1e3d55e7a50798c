"""choose-kernels: give every region the first kernel on its op's list that takes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule

from ktcompile import OPS, Context, OptionError, Pass, RulesError, prune, regions
from ktcompile.kernel import available, choose
from ktcompile.pipeline import near


@dataclass(frozen=True)
class ChooseKernels(Pass):
    """Each region gets the first kernel on its op's list that does not refuse it; the page says why others did.

    `other` is the list of every op that has none of its own; `ops` holds lists for further ops by name; `streamed` is
    that of regions whose weights stay on another device (stream-experts). `absorb`: latent attention (mla) in the
    absorbed form for prompts too, where kernels would take the expanded one: slower from some 200 tokens on, but
    without the keys and values of each head that it makes.
    """

    name = "choose-kernels"
    requires = ("local",)
    establishes = ("lowered",)
    moe: tuple[str, ...] = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "scalar", "reference")
    mla: tuple[str, ...] = (
        "flashinfer_planes",
        "triton_planes",
        "flashinfer",
        "triton_encoded",
        "triton",
        "encoded",
        "torch_mla",
        "reference",
    )
    gqa: tuple[str, ...] = ("triton_gqa_planes", "triton_gqa", "encoded", "reference")
    linear: tuple[str, ...] = ("triton_linear", "encoded", "reference")
    mlp: tuple[str, ...] = ("triton_mlp", "encoded", "reference")
    norm: tuple[str, ...] = ("triton_norm", "reference")
    add_norm: tuple[str, ...] = ("triton_add_norm", "reference")
    router: tuple[str, ...] = ("triton_router", "reference")
    streamed: tuple[str, ...] = ("triton_streamed",)
    other: tuple[str, ...] = ("encoded", "reference")
    ops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absorb: bool = False

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        kernels = available()
        lists = {
            "moe": self.moe,
            "mla": self.mla,
            "gqa": self.gqa,
            "linear": self.linear,
            "mlp": self.mlp,
            "norm": self.norm,
            "add_norm": self.add_norm,
            "router": self.router,
            "streamed": self.streamed,
            "other": self.other,
            **self.ops,
        }
        on_gpu = ("linear", "mlp", "norm", "add_norm", "router")  # kernels of their own only there
        for key, names in lists.items():
            if unknown := [n for n in names if n not in kernels]:
                raise OptionError(key, f"no kernel {unknown[0]!r}; {near(unknown[0], kernels)}")
        for region in list(regions(gm)):
            if self.absorb and region.op == "mla" and region.binding is not None:
                region.unbind(replace(region.binding, shape=replace(region.binding.shape, absorb=True)))
            key = region.op if region.home == region.device else "streamed"
            kernel, refused = choose(region, lists.get(key, self.other), ctx.target, kernels)
            if kernel is None:
                way_out = "End the list with `reference`"
                if region.quantized:
                    way_out = "Quantise it to another type, or keep it"
                raise RulesError(
                    f"no kernel takes {region.path} ({region.op} on {region.device}): "
                    f"{'; '.join(f'{n}: {w}' for n, w in refused)}. {way_out}"
                )
            kind = ctx.target[region.device or ""].kind
            refused = [(n, w) for n, w in refused if kernels[n].device in ("*", kind)]  # of other devices goes unsaid
            is_told = region.op in lists and not (region.op in on_gpu and kind == "cpu")
            for why in dict.fromkeys(w for _, w in refused) if is_told else ():
                ctx.skip(region, f"{', '.join(n for n, w in refused if w == why)}: {why}")
            op = OPS.get(region.op)
            if kernel.op == region.op and op is not None and op.define is not None:
                region.define(op, region.binding)
            if kernel.lossy:
                ctx.lossy(kernel.lossy)
            region.choose(kernel.name, kernel.layout, kernel.packed_bytes(region))
        prune(gm)
        return gm
