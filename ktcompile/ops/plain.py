"""Ops that run from their captured body until a kernel knows better: norm, linear, embed, rope, mlp, attention.

Of these RMSNorm has a definition, `ktrans::rms_norm`:

    y = x / sqrt(mean(x * x) + eps) * (weight + offset),  the mean over the last axis

and so has the sum before it, `ktrans::add_rms_norm`: x + r, and y of that. The pass fuse-norms makes regions of it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ktcompile.folding import Site
from ktcompile.graph import value_of
from ktcompile.ops.base import Binding, Bound, Op, activation_of, register, roles_of
from ktcompile.ops.terms import Term, both_ways, terms_of, type_of, uncast


@dataclass(frozen=True)
class NormShape:
    """Attributes of an RMSNorm. `late`: it is rounded once, after the product with the weight, not before it."""

    eps: float
    offset: float = 0.0
    late: bool = False


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> Tensor:
    """The definition. `x [..., H]`, `weight [H]`; computed in float32.

    The result is of the type of `x` where `late`, else of its product with the weight. Source: `LlamaRMSNorm` in
    transformers; with `late`, `GptOssRMSNorm`; with an `offset` of 1 too, `GemmaRMSNorm`.
    """
    v = x.float()
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
    if late:
        return (v * (weight.float() + offset)).to(x.dtype)
    return (weight + offset) * v.to(x.dtype)


register(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool late) -> Tensor",
    rms_norm,
    lambda x, weight, eps, offset, late: torch.empty_like(
        x, dtype=x.dtype if late else torch.promote_types(x.dtype, weight.dtype)
    ),
)


def add_rms_norm(x: Tensor, r: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> tuple[Tensor, Tensor]:
    """The definition: `x + r`, both `[..., H]` of one type, and `rms_norm` of it."""
    total = x + r
    return total, rms_norm(total, weight, eps, offset, late)


register(
    "add_rms_norm(Tensor x, Tensor r, Tensor weight, float eps, float offset, bool late) -> (Tensor, Tensor)",
    add_rms_norm,
    lambda x, r, weight, eps, offset, late: (
        torch.empty_like(x),
        torch.empty_like(x, dtype=x.dtype if late else torch.promote_types(x.dtype, weight.dtype)),
    ),
)


def _one_to_one(site: Site) -> bool:
    return len(site.tensors) == 1 and len(site.outputs) == 1 and not site.written


def _bind_embed(site: Site) -> Bound | None:
    if not (site.cls.endswith("Embedding") and set(site.weights) == {"weight"} and _one_to_one(site)):
        return None
    return Bound("embed", Binding(roles_of(site, ids=site.tensors[0])))


def _bind_rope(site: Site) -> Bound | None:
    if "RotaryEmbedding" not in site.cls or len(site.outputs) != 2:
        return None
    return Bound("rope", Binding({}))


def _bind_norm(site: Site) -> Bound | None:
    if not (site.cls.endswith("Norm") and set(site.weights) <= {"weight", "bias"} and _one_to_one(site)):
        return None
    return Bound("norm", Binding(roles_of(site, x=site.tensors[0]), _norm_shape(site)))


def _norm_shape(site: Site) -> NormShape | None:
    """The attributes of a site that computes an RMSNorm and nothing else; None where it is another norm."""
    x, weight = site.tensors[0], site.weights.get("weight")
    if weight is None or len(site.weights) > 1:
        return None
    if str(value_of(weight).shape) != str(value_of(x).shape[-1:]):  # as text: comparing symbols adds guards
        return None
    out = terms_of(site.nodes)[site.outputs[0]]
    rounded = isinstance(out, Term) and out.name == "to" and out.dtype == type_of(x)
    product = uncast(out) if rounded else out
    if not (isinstance(product, Term) and product.name == "mul"):
        return None
    for factor, scaled in both_ways(product.args):
        late = rounded and type_of(scaled) == torch.float32
        if not late and (rounded or type_of(scaled) != type_of(x)):
            continue
        offset, eps = _offset(factor, weight, late), _eps(scaled if late else uncast(scaled), x)
        if offset is not None and eps is not None:
            return NormShape(eps, offset, late)
    return None


def _offset(factor: Any, weight: fx.Node, late: bool) -> float | None:
    """What is added to the weight, if the factor is a weight: in float32 where `late`, else in its own type."""

    def is_weight(term: Any) -> bool:
        return term is weight or (late and type_of(term) == torch.float32 and uncast(term) is weight)

    if is_weight(factor):
        return 0.0
    if isinstance(factor, Term) and factor.name == "add" and (not late or factor.dtype == torch.float32):
        for offset, term in both_ways(factor.args):
            if isinstance(offset, int | float) and is_weight(term):
                return float(offset)
    return None


def _eps(scaled: Any, x: fx.Node) -> float | None:
    """The epsilon, if this is x * rsqrt(mean(x * x) + eps) in float32."""
    match scaled:
        case Term("mul", (a, Term("rsqrt", (Term("add", (Term("mean", (square, -1, True, None)), float(eps))),)))):
            known = Term("pow", (a, 2), torch.float32), Term("mul", (a, a), torch.float32)
            return eps if square in known and type_of(a) == torch.float32 and uncast(a) is x else None
    return None


def _define_norm(binding: Binding, leaves: tuple[str, ...]) -> fx.Graph | None:
    return _defined(binding, ("x", "weight"), torch.ops.ktrans.rms_norm.default)


def _define_add_norm(binding: Binding, leaves: tuple[str, ...]) -> fx.Graph | None:
    return _defined(binding, ("x", "r", "weight"), torch.ops.ktrans.add_rms_norm.default)


def _defined(binding: Binding, tensors: tuple[str, ...], op: Any) -> fx.Graph | None:
    shape: NormShape | None = binding.shape
    if shape is None:
        return None
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in tensors]
    graph.output(graph.call_function(op, (*given, shape.eps, shape.offset, shape.late)))
    return graph


def _bind_linear(site: Site) -> Bound | None:
    if not (site.cls == "Linear" and set(site.weights) <= {"weight", "bias"} and _one_to_one(site)):
        return None
    return Bound("linear", Binding(roles_of(site, x=site.tensors[0])))


def _bind_mlp(site: Site) -> Bound | None:
    gated = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    if set(site.weights) != gated or not _one_to_one(site):
        return None
    return Bound("mlp", Binding(roles_of(site, x=site.tensors[0]), activation_of(site)))


def _bind_attention(site: Site) -> Bound | None:
    if not (site.cls.endswith("Attention") and site.path.rsplit(".", 1)[-1] in ("self_attn", "attention")):
        return None
    return Bound("attention")


OPS = (
    Op("embed", _bind_embed, "rows of a table, by token id", ("ids",)),
    Op("rope", _bind_rope, "cosines and sines of the positions"),
    Op(
        "norm",
        _bind_norm,
        "RMSNorm or LayerNorm over the last axis",
        ("x",),
        _define_norm,
        lambda binding: replace(binding, shape=None),
    ),
    Op("add_norm", lambda site: None, "x + r, and the RMSNorm of it", ("x", "r"), _define_add_norm),
    Op("linear", _bind_linear, "x @ weight.T + bias", ("x",)),
    Op("mlp", _bind_mlp, "down(act(gate x) * up x)", ("x",)),
    Op("attention", _bind_attention, "any other attention block, as captured"),
)
