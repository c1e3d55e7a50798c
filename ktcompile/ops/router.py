"""router: hidden states to the top-k experts of every token: scores `[T, k]` and ids `[T, k]`."""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ktcompile.folding import Site
from ktcompile.graph import value_of
from ktcompile.ops.base import Binding, Bound, Op, roles_of


@dataclass(frozen=True)
class RouterShape:
    """Attributes of a router; `scores` and `ids` are positions in its outputs, `normalised`: scores have one sum."""

    experts: int
    top_k: int
    scores: int
    ids: int
    normalised: bool


def _bind(site: Site) -> Bound | None:
    leaf = site.path.rsplit(".", 1)[-1]
    if not ("Router" in site.cls or leaf in ("gate", "router")) or "weight" not in site.weights:
        return None
    values = [value_of(o) for o in site.outputs]
    ids = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.dtype == torch.int64]
    scores = [i for i, v in enumerate(values) if ids and i not in ids and v.shape == values[ids[0]].shape]
    if len(ids) != 1 or len(scores) != 1 or len(site.tensors) != 1:
        return None
    top_k = int(values[ids[0]].shape[-1])
    experts = int(value_of(site.weights["weight"]).shape[0])
    shape = RouterShape(experts, top_k, scores[0], ids[0], _normalised(site.outputs[scores[0]], site, top_k))
    return Bound("router", Binding(roles_of(site, x=site.tensors[0]), shape))


def _normalised(scores: fx.Node, site: Site, top_k: int) -> bool:
    """Whether a division by the sum over the chosen, or a softmax over them, lies on the way to the scores."""
    inside, seen, todo = set(site.nodes), set[fx.Node](), [scores]
    while todo:
        node = todo.pop()
        if node in seen or node not in inside:
            continue
        seen.add(node)
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[-1] not in (1, top_k):
            continue
        if name in ("itruediv", "truediv", "div") or (name == "softmax" and value.shape[-1] == top_k):
            return True
        todo += node.all_input_nodes
    return False


def top_k_node(body: fx.GraphModule, shape: RouterShape) -> fx.Node | None:
    """The `topk` of a router's body whose indices are the chosen experts, or None where the body has another form."""
    output = next(n for n in body.graph.nodes if n.op == "output")
    ids = output.args[0][shape.ids]
    while ids.target not in (operator.getitem, "topk", torch.topk) and len(ids.all_input_nodes) == 1:
        ids = ids.all_input_nodes[0]
    node = ids.args[0] if ids.target is operator.getitem else ids
    if not isinstance(node, fx.Node) or node.target not in ("topk", torch.topk):
        return None
    k = node.kwargs.get("k", node.args[1] if len(node.args) > 1 else None)
    return node if k == shape.top_k else None


OP = Op("router", _bind, "top-k experts of every token", ("x",))
