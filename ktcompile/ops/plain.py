"""Ops that run from their captured body until a kernel knows better: norm, linear, embed, rope, mlp, attention."""

from ktcompile.folding import Site
from ktcompile.ops.base import Binding, Bound, Op, activation_of, roles_of


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
    return Bound("norm", Binding(roles_of(site, x=site.tensors[0])))


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
    Op("norm", _bind_norm, "RMSNorm or LayerNorm over the last axis", ("x",)),
    Op("linear", _bind_linear, "x @ weight.T + bias", ("x",)),
    Op("mlp", _bind_mlp, "down(act(gate x) * up x)", ("x",)),
    Op("attention", _bind_attention, "any other attention block, as captured"),
)
