"""Ops that run from their captured body until a kernel knows better: norm, linear, embed, rope, mlp, attention.

Of these RMSNorm has a definition, `ktrans::rms_norm`:

    y = x / sqrt(mean(x * x) + eps) * (weight + offset),  the mean over the last axis

and so has the sum before it, `ktrans::add_rms_norm`: x + r, and y of that. The pass fuse-norms makes regions of it.
A linear has one, `ktrans::linear`, where its result is of another type than x. The pass widen makes these.
"""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ktcompile.folding import Site
from ktcompile.graph import Region, value_of
from ktcompile.ops.base import Binding, Bound, Op, activation_of, register, roles_of
from ktcompile.ops.terms import Term, both_ways, terms_of, type_of, uncast


@dataclass(frozen=True)
class NormShape:
    """Attributes of an RMSNorm. `late`: it is rounded once, after the product with the weight, not before it.

    `dtype`: of its result, which is `late`, where a sum before it is float32; None: that of its input.
    """

    eps: float
    offset: float = 0.0
    late: bool = False
    dtype: torch.dtype | None = None


def norm_type(x: torch.dtype, weight: torch.dtype, late: bool, dtype: torch.dtype | None) -> torch.dtype:
    """The type of an RMSNorm's result, from those of x and of the weight."""
    return (dtype or x) if late else torch.promote_types(x, weight)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, late: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """The definition. `x [..., H]`, `weight [H]`; computed in float32.

    The result is of the type of `x`, or `dtype`, where `late`, else of the product of x with the weight. Source:
    `LlamaRMSNorm` in transformers; with `late`, `GptOssRMSNorm`; with an `offset` of 1 too, `GemmaRMSNorm`.
    """
    v = x.float()
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
    if late:
        return (v * (weight.float() + offset)).to(dtype or x.dtype)
    return (weight + offset) * v.to(x.dtype)


register(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool late, ScalarType? dtype=None) -> Tensor",
    rms_norm,
    lambda x, weight, eps, offset, late, dtype=None: torch.empty_like(
        x, dtype=norm_type(x.dtype, weight.dtype, late, dtype)
    ),
)


def add_rms_norm(
    x: Tensor, r: Tensor, weight: Tensor, eps: float, offset: float, late: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: `x + r`, both `[..., H]`, and `rms_norm` of it. With a `dtype` the sum is float32."""
    total = x + r if dtype is None else x.float() + r.float()
    return total, rms_norm(total, weight, eps, offset, late, dtype)


def sum_type(x: torch.dtype, r: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The type of the sum of `add_rms_norm`."""
    return torch.promote_types(x, r) if dtype is None else torch.float32


def _add_rms_norm_types(
    x: Tensor, r: Tensor, weight: Tensor, eps: float, offset: float, late: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    total = sum_type(x.dtype, r.dtype, dtype)
    made = torch.empty_like(x, dtype=total)
    return made, torch.empty_like(x, dtype=norm_type(total, weight.dtype, late, dtype))


register(
    "add_rms_norm(Tensor x, Tensor r, Tensor weight, float eps, float offset, bool late, ScalarType? dtype=None) "
    "-> (Tensor, Tensor)",
    add_rms_norm,
    _add_rms_norm_types,
)


@dataclass(frozen=True)
class LinearShape:
    """Attributes of a linear whose result is of another type than x: `dtype`."""

    dtype: torch.dtype


_BLOCK = 1 << 20  # values of a weight that are float32 at a time: they stay in a cache


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The definition: `x [..., K] @ weight [N, K].T + bias [N]`, summed in float32 and rounded once, to `dtype`."""
    if dtype == x.dtype:
        return functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and dtype == torch.float32 and x.dtype == weight.dtype:
        out = torch.mm(rows, weight.T, out_dtype=dtype)
    else:  # torch has no such product on a CPU
        wide, step = rows.float(), max(1, _BLOCK // max(1, weight.shape[1]))
        out = torch.empty(rows.shape[0], weight.shape[0], device=x.device)
        for at in range(0, weight.shape[0], step):
            out[:, at : at + step] = wide @ weight[at : at + step].float().T
    if bias is not None:
        out += bias
    return out.to(dtype).view(*x.shape[:-1], weight.shape[0])


register(
    "linear(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor",
    linear,
    lambda x, weight, bias, dtype: x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype),
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
    graph.output(graph.call_function(op, (*given, shape.eps, shape.offset, shape.late, shape.dtype)))
    return graph


def added(region: Region) -> bool:
    """Whether glue is `x + r`, both of the shape of the result and of its type, or its sum in float32."""
    nodes = list(region.body.graph.nodes)
    given, (result,) = [n for n in nodes if n.op == "placeholder"], nodes[-1].all_input_nodes
    term = terms_of([n for n in nodes if n.op not in ("placeholder", "output")]).get(result)
    values = [value_of(n) for n in (*given, result)]
    if region.effects or len(given) != 2 or not all(isinstance(v, Tensor) for v in values):
        return False
    if len({str(v.shape) for v in values}) != 1:  # as text: no guards on symbols
        return False
    dtype = values[-1].dtype
    if {v.dtype for v in values} == {dtype}:
        return bool(term == Term("add", tuple(given), dtype))
    return dtype == torch.float32 and bool(term == Term("add", (Term("to", (given[0],), dtype), given[1]), dtype))


def widen_sum(region: Region) -> None:
    """Let glue that is `x + r` add in float32: one launch where one of the two is float32, as of the second sum on."""
    graph = fx.Graph()
    x, r = graph.placeholder("x0"), graph.placeholder("x1")
    wide = graph.call_method("float", (x,))
    total = graph.call_function(operator.add, (wide, r))
    x.meta["val"], r.meta["val"] = map(value_of, region.inputs)
    wide.meta["val"] = total.meta["val"] = value_of(region.inputs[0]).float()
    graph.output(total)
    region.replace_body(fx.GraphModule(torch.nn.Module(), graph))


def _bind_linear(site: Site) -> Bound | None:
    if not (site.cls == "Linear" and set(site.weights) <= {"weight", "bias"} and _one_to_one(site)):
        return None
    return Bound("linear", Binding(roles_of(site, x=site.tensors[0])))


def _define_linear(binding: Binding, leaves: tuple[str, ...]) -> fx.Graph | None:
    shape: LinearShape | None = binding.shape
    if shape is None:
        return None
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in ("x", *leaves)}
    args = given["x"], given["weight"], given.get("bias"), shape.dtype
    graph.output(graph.call_function(torch.ops.ktrans.linear.default, args))
    return graph


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
    Op("linear", _bind_linear, "x @ weight.T + bias", ("x",), _define_linear),
    Op("mlp", _bind_mlp, "down(act(gate x) * up x)", ("x",)),
    Op("attention", _bind_attention, "any other attention block, as captured"),
)
