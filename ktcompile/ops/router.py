"""router: hidden states to the top-k experts of every token: scores `[T, k]` and ids `[T, k]`.

Most routers follow a rule of one form, which is the op `ktrans::router`; those of any other form run as captured.
"""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional

from ktcompile.folding import Site
from ktcompile.graph import value_of
from ktcompile.ops.base import Binding, Bound, Op, calls, register, roles_of
from ktcompile.ops.terms import Term, both_ways, terms_of, type_of, uncast


@dataclass(frozen=True)
class Rule:
    """How a router gets from logits to scores and ids, in the terms of `router`; `bias` is the name of a weight."""

    scoring: Literal["sigmoid", "softmax"]
    bias: str | None = None
    groups: int = 1
    groups_kept: int = 1
    group_score: Literal["max", "top2"] = "max"
    fill: float = -math.inf
    eps: float = 0.0
    scaling: float = 1.0
    logits: torch.dtype = torch.float32  # that the product with the weight is computed in
    dtype: torch.dtype = torch.float32  # of the scores returned


@dataclass(frozen=True)
class RouterShape:
    """Attributes of a router; `scores` and `ids` are positions in its outputs, `normalised`: scores have one sum.

    `rule` is None where the captured code follows none that is understood.
    """

    experts: int
    top_k: int
    scores: int
    ids: int
    normalised: bool
    rule: Rule | None = None


def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    normalised: bool,
    scoring: str,
    groups: int,
    groups_kept: int,
    group_score: str,
    fill: float,
    eps: float,
    scaling: float,
    logits: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The definition: scores [T, k] and ids [T, k] int64 of `x [..., H]`, with `weight [E, H]` and `bias [E]`.

        score = scoring(x @ weight.T),  choice = score + bias
        of `groups` equal groups of experts, the choice outside the `groups_kept` with the best group score is `fill`
        ids = the k largest of choice;  scores = score[ids], or choice[ids] if there is no bias
        scores = scores / (sum of scores + eps) if normalised;  scores = scores * scaling

    A group's score is the largest of its choices (`max`), or the sum of the two largest (`top2`). The product is in
    type `logits`, all else in float32. Experts come in any order. Source: DeepSeek-V3 (arXiv 2412.19437, section
    2.1.2), DeepSeek-V2 (2405.04434, section 2.2) and their code, Mixtral's and Qwen3-MoE's in transformers.
    """
    product = functional.linear(x.reshape(-1, x.shape[-1]).to(logits), weight.to(logits)).float()  # [T, E]
    score = product.sigmoid() if scoring == "sigmoid" else product.softmax(-1)
    choice = score if bias is None else score + bias
    if groups > 1:
        grouped = choice.unflatten(1, (groups, -1))  # [T, groups, E / groups]
        best = grouped.amax(-1) if group_score == "max" else grouped.topk(2, -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(groups_kept, -1)[1], 1).bool()
        choice = grouped.masked_fill(~kept[..., None], fill).flatten(1)
    scores, ids = choice.topk(top_k, -1)
    if bias is not None:
        scores = score.gather(1, ids)
    if normalised:
        scores = scores / (scores.sum(-1, keepdim=True) + eps)
    return (scores * scaling).to(dtype), ids


def _types(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    size = math.prod(x.shape[:-1]), top_k
    return x.new_empty(size, dtype=rest[-1]), x.new_empty(size, dtype=torch.int64)


register(
    "router(Tensor x, Tensor weight, Tensor? bias, int top_k, bool normalised, str scoring, int groups, "
    "int groups_kept, str group_score, float fill, float eps, float scaling, ScalarType logits, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    router,
    _types,
)


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
    rule = _rule(site, shape) if len(values) == 2 else None
    return Bound("router", Binding(roles_of(site, x=site.tensors[0]), replace(shape, rule=rule)))


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


# ------------------------------------------------------------------------------------------------ rules


def _rule(site: Site, shape: RouterShape) -> Rule | None:
    """The rule that the captured code follows, read from its results back to its logits.

    Each step takes off what it knows. What it does not know stays, and is nothing that the last one knows.
    """
    terms = terms_of(site.nodes)
    scores, ids = terms[site.outputs[shape.scores]], terms[site.outputs[shape.ids]]
    match ids:
        case Term("getitem", (Term("topk", (choice, shape.top_k, -1, True)) as top, 1)):
            pass
        case _:
            return None
    found, scaling = _unscaled(uncast(scores))
    found, eps = _undivided(found)
    base, groups = _ungrouped(choice, shape)
    score, bias = _unbiased(base, site, shape.experts)
    logits, scoring = _unscored(score)
    if type_of(logits) == torch.float32 and not _is_product(logits, site):
        logits = uncast(logits)
    by_score, by_choice = (Term("gather", (t, -1, ids), torch.float32) for t in (score, choice))
    chosen = [by_score] if bias else [by_score, by_choice, Term("getitem", (top, 0), torch.float32)]
    if scoring is None or not _is_product(logits, site) or found not in chosen or (eps is not None) != shape.normalised:
        return None
    return Rule(scoring, bias, *groups, eps or 0.0, scaling, logits.dtype, scores.dtype)


def _unscaled(scores: Any) -> tuple[Any, float]:
    """Scores before they were multiplied by a number, and the number."""
    match scores:
        case Term("mul", (inner, float(factor) | int(factor)), torch.float32):
            return inner, float(factor)
    return scores, 1.0


def _undivided(scores: Any) -> tuple[Any, float | None]:
    """Scores before they were divided by their sum, and what was added to that; None if they were not."""
    match scores:
        case Term("div", (found, Term("add", (Term("sum", (summed, -1, True, None)), float(eps)))), torch.float32):
            return (found, eps) if found == summed else (scores, None)
        case Term("div", (found, Term("sum", (summed, -1, True, None))), torch.float32):
            return (found, 0.0) if found == summed else (scores, None)
    return scores, None


_Groups = tuple[int, int, Literal["max", "top2"], float]
_ONE_GROUP: _Groups = (1, 1, "max", -math.inf)


def _ungrouped(choice: Any, shape: RouterShape) -> tuple[Any, _Groups]:
    """The choice before groups were filled, and the number of groups, of those kept, their score and what fills."""
    match choice:
        case Term("masked_fill", (base, Term("not", (Term("to", (mask,), torch.bool),)), float(fill) | int(fill))):
            pass
        case _:
            return choice, _ONE_GROUP
    match mask:
        case Term("view", (Term("expand", (Term("view", (marked, int(n), 1)), n2, int(size))), all_experts)):
            pass
        case _:
            return choice, _ONE_GROUP
    match marked:
        case Term("scatter", (Term("zeros_like", (best,)), -1, Term("getitem", (top, 1)), 1)):
            pass
        case _:
            return choice, _ONE_GROUP
    match top:
        case Term("topk", (scored, int(kept), -1, True)) if scored == best:
            pass
        case _:
            return choice, _ONE_GROUP
    sizes_fit = n == n2 and n * size == all_experts == shape.experts and shape.top_k <= kept * size
    grouped = Term("view", (base, n, size), torch.float32)
    group_score = _group_score(best, grouped)
    if group_score is None or not sizes_fit or fill > 0:
        return choice, _ONE_GROUP
    return base, _ONE_GROUP if kept == n else (n, kept, group_score, float(fill))


def _group_score(best: Any, grouped: Term) -> Literal["max", "top2"] | None:
    match best:
        case Term("sum", (Term("getitem", (Term("topk", (values, 2, -1, True)), 0)), -1, False, None)):
            return "top2" if values == grouped else None
        case Term("amax", (values, -1, False)) | Term("getitem", (Term("max", (values, -1, False)), 0)):
            return "max" if values == grouped else None
    return None


def _unbiased(choice: Any, site: Site, experts: int) -> tuple[Any, str | None]:
    """The choice before a weight [E] was added, and the weight's name."""
    if isinstance(choice, Term) and choice.name == "add":
        for leaf, weight in site.weights.items():
            for score, bias in both_ways(choice.args):
                is_weight = bias is weight or (type_of(bias) == torch.float32 and uncast(bias) is weight)
                if is_weight and tuple(value_of(weight).shape) == (experts,):
                    return score, leaf
    return choice, None


def _unscored(score: Any) -> tuple[Any, Literal["sigmoid", "softmax"] | None]:
    """The logits of a score in float32, and how it was made of them."""
    match score:
        case Term("sigmoid", (logits,), torch.float32):
            return logits, "sigmoid"
        case Term("softmax", (logits, -1, _), torch.float32):
            return logits, "softmax"
    return score, None


def _is_product(logits: Any, site: Site) -> bool:
    """Whether this is the product of the only input with the weight, both brought to its type."""
    match logits:
        case Term("linear", (x, weight, None)) if uncast(weight) is site.weights["weight"]:
            x = uncast(x)
            return (x.args[0] if isinstance(x, Term) and x.name == "view" else x) is site.tensors[0]
    return False


# ------------------------------------------------------------------------------------------------ bodies


def follows_rule(body: fx.GraphModule, shape: RouterShape) -> bool:
    """Whether a router's body still returns what its rule chooses: no pass has dropped some of these experts."""
    return any(calls(n, "router") for n in body.graph.nodes) or top_k_node(body, shape) is not None


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


def _define(binding: Binding, leaves: tuple[str, ...]) -> fx.Graph | None:
    shape: RouterShape = binding.shape
    rule = shape.rule
    if rule is None:
        return None
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = {leaf: graph.placeholder(leaf.replace(".", "_")) for leaf in leaves}
    bias = None if rule.bias is None else weights[rule.bias]
    how = rule.scoring, rule.groups, rule.groups_kept, rule.group_score, rule.fill, rule.eps, rule.scaling
    args = x, weights["weight"], bias, shape.top_k, shape.normalised, *how, rule.logits, rule.dtype
    made = graph.call_function(torch.ops.ktrans.router.default, args)
    scores, ids = (graph.call_function(operator.getitem, (made, i)) for i in range(2))
    graph.output((scores, ids) if shape.scores < shape.ids else (ids, scores))
    return graph


OP = Op(
    "router",
    _bind,
    "top-k experts of every token",
    ("x",),
    _define,
    lambda binding: replace(binding, shape=replace(binding.shape, rule=None)),
)
