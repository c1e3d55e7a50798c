"""stream-experts: in steps of many tokens, let a GPU compute some of the experts that lie in RAM."""

from dataclasses import dataclass, replace

from torch.fx import GraphModule

from ktcompile import Context, OptionError, Pass, Region, device_of, regions, value_of
from ktcompile.graph import add_results, beside, remove
from ktcompile.kernel import available, refusal
from ktcompile.ops.moe import MoeShape, Share
from ktcompile.target import Target

READ_SHARE = 0.66
"""Of a CPU's memory bandwidth that its experts reach while every expert has a few tokens (docs/performance.md)."""


@dataclass(frozen=True)
class StreamExperts(Pass):
    """Share each layer's experts between the CPU that holds them and the first GPU, in graphs of any number of tokens.

    The GPU's part crosses the link at every step; how many experts that are is said by the number of tokens, so that
    both are done together (`Share.streamed`), at most the part `most` of them; 0 is off. Nothing is held twice, and
    results stay the same but for the order of one sum. A graph of one token is left alone: it needs few experts, and
    memory is faster than any link.
    """

    name = "stream-experts"
    requires = ("placed",)
    most: float = 1.0
    kernel: str = "triton_streamed"

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        if not 0 <= self.most <= 1:
            raise OptionError("most", f"most = {self.most}; a part of a layer's experts is 0 (off) to 1")
        gpu = ctx.target.main
        if gpu.kind != "cuda" or not self.most:
            ctx.skip("", "off: most is 0" if gpu.kind == "cuda" else "there is no GPU")
            return gm
        experts = list(regions(gm, op="moe"))
        if all(ctx.target[r.device or ""].kind != "cpu" for r in experts):
            ctx.skip("", "no experts lie in RAM")
        for region in experts:
            shape = region.binding.shape if region.binding else None
            if shape is None or ctx.target[region.device or ""].kind != "cpu" or shape.share is not None:
                continue
            tokens = value_of(region.inputs[region.binding.roles["ids"]]).shape[0]
            if isinstance(tokens, int):
                ctx.skip("", f"off in steps of {tokens} token{'s' * (tokens != 1)}: they need few experts of a layer")
                break
            at = device_of(region.inputs[region.binding.roles["x"]])
            near = at if at is not None and ctx.target[at].kind == "cuda" else gpu.name
            self._share(region, shape, near, ctx)
        return gm

    def _share(self, region: Region, shape: MoeShape, gpu: str, ctx: Context) -> None:
        host = str(region.device)
        costs = _seconds(region, shape, ctx.target, host, gpu)
        path = region.path
        streamed = beside(region, f"{path}.streamed")
        streamed.unbind(replace(region.binding, shape=replace(shape, share=Share(True, *costs, self.most))))
        streamed.place(gpu, host)
        why = refusal(available()[self.kernel], streamed, ctx.target)
        if why is not None:
            remove(streamed)
            ctx.skip(region, f"{self.kernel}: {why}")
            return
        region.unbind(replace(region.binding, shape=replace(shape, share=Share(False, *costs, self.most))))
        add_results(region, streamed, f"{path}.sum").place(gpu)


def _seconds(region: Region, shape: MoeShape, target: Target, host: str, gpu: str) -> tuple[float, float, float]:
    """`across_s`, `read_s` and `token_s` of a `Share`."""
    cpu = target[host]
    flops = 2 * 3 * shape.hidden * shape.width * shape.top_k  # of a token
    across_s = region.nbytes / target.link(host, gpu).bandwidth
    return across_s, region.nbytes / (READ_SHARE * cpu.bandwidth), flops / cpu.flops
