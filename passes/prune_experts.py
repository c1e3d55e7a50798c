"""prune-experts: fewer experts a token than the model was trained with."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ktcompile import OPS, Context, OptionError, Pass, Region, regions
from ktcompile.ops.base import Binding
from ktcompile.ops.router import RouterShape, top_k_node


@dataclass(frozen=True)
class PruneExperts(Pass):
    """Keep `keep` of a router's top-k experts. Lossy.

    `choice` lets the router choose `keep` from the start: the same as `num_experts_per_tok = keep`. `weight` lets it
    choose k, then keeps those with the largest scores (another set where a correction bias is in the choice). Scores
    are renormalised where the model does it. Assumes that the experts read their ids and scores from the router.
    """

    name = "prune-experts"
    requires = ("folded",)
    keep: int | None = None
    ranking: Literal["choice", "weight"] = "choice"

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        if self.keep is None:
            ctx.skip("", "off: every expert that the router chooses runs")
            return gm
        routers = list(regions(gm, op="router"))
        if not routers:
            ctx.skip("", "this graph has no router that is understood")
        for router in routers:
            shape: RouterShape = router.binding.shape
            if not 1 <= self.keep <= shape.top_k:
                raise OptionError(
                    "keep",
                    f"keep = {self.keep}; {router.path} has {shape.experts} experts "
                    f"and uses {shape.top_k}: allowed is 1 to {shape.top_k}",
                )
            if self.keep == shape.top_k:
                ctx.skip(router, f"uses {shape.top_k} experts, all of them are kept: nothing to prune")
                continue
            readers = [Region(u) for out in router.node.users for u in out.users if u.op == "call_module"]
            experts = [r for r in readers if r.op == "moe" and r.binding is not None]
            if len({r.path for r in readers}) != 1 or len(experts) == 0:
                ctx.skip(router, "its scores are read by something else than one `moe` region")
                continue
            if self.ranking == "choice" and top_k_node(router.body, shape) is None:
                ctx.skip(router, "its final top-k was not found in the captured code")
                continue
            body = _choose(router, shape, self.keep) if self.ranking == "choice" else _drop(router, shape, self.keep)
            router.replace_body(body, _keeping(router.binding, self.keep))
            # The captured experts may have k in their shapes; the op's definition has not.
            moe = experts[0]
            moe.define(OPS["moe"], _keeping(moe.binding, self.keep))
            ctx.lossy(f"{self.keep} of {shape.top_k} experts a token, ranked by {self.ranking}")
        return gm


def _keeping(binding: Binding, keep: int) -> Binding:
    """The binding with `keep` experts a token: what costs are predicted from."""
    return replace(binding, shape=replace(binding.shape, top_k=keep))


def _choose(router: Region, shape: RouterShape, keep: int) -> GraphModule:
    body = _copy(router.body)
    node = top_k_node(body, shape)
    assert node is not None
    if "k" in node.kwargs:
        node.kwargs = {**node.kwargs, "k": keep}
    else:
        node.args = (node.args[0], keep, *node.args[2:])
    body.recompile()
    return body


def _drop(router: Region, shape: RouterShape, keep: int) -> GraphModule:
    body = _copy(router.body)
    output = next(n for n in body.graph.nodes if n.op == "output")
    outs: list[Node] = list(output.args[0])
    with body.graph.inserting_before(output):
        kept = body.graph.call_function(keep_largest, (outs[shape.scores], outs[shape.ids], keep, shape.normalised))
        pair = [body.graph.call_function(_item, (kept, i)) for i in range(2)]
    outs[shape.scores], outs[shape.ids] = pair
    output.args = (tuple(outs),)
    body.recompile()
    return body


def keep_largest(scores: Tensor, ids: Tensor, keep: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """The `keep` largest of `scores [T, k]` and their ids; the scores' sum is kept where `normalised`."""
    best, at = torch.topk(scores, keep, dim=-1)
    if normalised:
        best = best * (scores.sum(-1, keepdim=True) / best.sum(-1, keepdim=True))
    return best, ids.gather(-1, at)


def _item(values: tuple[Tensor, Tensor], index: int) -> Tensor:
    return values[index]


def _copy(body: GraphModule) -> GraphModule:
    return GraphModule(body, deepcopy(body.graph))
