"""mla: a whole multi-head latent attention block over a paged latent cache."""
import operator

import torch
from torch import Tensor, fx

from ktcompile.graph import Site, value_of
from ktcompile.mla_reference import MLAShape, mla_reference
from ktcompile.ops.base import LIBRARY, Binding, Bound, Op, calls, roles_of


def _mla(hidden: Tensor, cos: Tensor, sin: Tensor, pool: Tensor, page_table: Tensor, seq_len: Tensor,
         query_start: Tensor, weights: list[Tensor], names: list[str], sizes: list[int], scale: float,
         interleaved: bool, eps: float) -> Tensor:
    shape = MLAShape(*sizes, scale=scale, interleaved=interleaved, eps=eps)
    return mla_reference(hidden, cos, sin, dict(zip(names, weights, strict=True)), shape, pool, page_table, seq_len,
                         query_start)


LIBRARY.define("mla(Tensor hidden, Tensor cos, Tensor sin, Tensor(a!) pool, Tensor page_table, Tensor seq_len, "
               "Tensor query_start, Tensor[] weights, str[] names, int[] sizes, float scale, bool interleaved, "
               "float eps) -> Tensor")
LIBRARY.impl("mla", _mla, "CompositeExplicitAutograd")
torch.library.register_fake("ktrans::mla", lambda hidden, *_: torch.empty_like(hidden), lib=LIBRARY)

_LORA_Q = {"q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"}
_ALWAYS = {"kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight"}
_BIASES = {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}


def role(leaf: str) -> str:
    """A weight's name in the definition: `q_a_proj.weight` is `q_a_proj`, a bias keeps its suffix."""
    return leaf.removesuffix(".weight")


def _named(site: Site, name: str) -> list[fx.Node]:
    return [n for n in site.nodes if str(getattr(n.target, "__name__", n.target)).split(".")[0] == name]


def _bind(site: Site) -> Bound | None:
    have = set(site.weights)
    if not {"kv_a_proj_with_mqa.weight", "kv_b_proj.weight"} <= have:
        return None

    def no(why: str) -> Bound:
        return Bound("attention", why=f"not mla: {why}")

    if not _ALWAYS <= have or have - _ALWAYS - _BIASES not in ({"q_proj.weight"}, _LORA_Q):
        return no(f"its weights are {', '.join(sorted(have))}")
    appends = [n for n in site.nodes if calls(n, "cache_append")]
    if len(appends) != 1:
        return no("it does not write a PagedCache (kernels need its pages; DynamicCache and StaticCache hand keys "
                  "and values out)")
    if len(site.outputs) != 1:
        return no(f"{len(site.outputs)} of its values are read outside, wanted 1")
    pool, page_table, seq_len, query_start = appends[0].args[:4]
    if not all(n in site.inputs for n in (pool, page_table, seq_len, query_start)):
        return no("the cache is not ragged (rectangular batches run the captured code)")
    if set(site.written) != {pool}:
        return no("it writes more than its page pool")
    rest = [n for n in site.tensors if n not in (pool, page_table, seq_len, query_start)]
    projection = next(n for n in site.nodes if site.weights["kv_a_proj_with_mqa.weight"] in n.all_input_nodes)
    hidden = projection.args[0]
    rotary = [n for n in rest if any(cls.endswith("RotaryEmbedding") for _, cls in n.meta["stack"])]
    masks = [n for n in rest if n is not hidden and n not in rotary]
    if hidden not in rest or len(rotary) != 2:
        return no("its hidden states, cosines and sines cannot be told apart")
    if any(not calls(m, "ragged_mask") or m.args[:3] != (page_table, seq_len, query_start) for m in masks):
        return no("its mask is not proven causal")
    attends = _named(site, "scaled_dot_product_attention")
    if len(attends) != 1:
        return no("it does not call scaled_dot_product_attention exactly once")
    sin = next((n for n in rotary if "sin" in n.name), None)
    cos = next((n for n in rotary if n is not sin), None)
    if sin is None or cos is None:
        return no("cosines and sines cannot be told apart")
    shape = _shape(site, attends[0])
    if shape is None:
        return no("no epsilon of its norms was found")
    roles = roles_of(site, hidden=hidden, cos=cos, sin=sin, pool=pool, page_table=page_table, seq_len=seq_len,
                     query_start=query_start)
    return Bound("mla", Binding(roles, shape))


def _shape(site: Site, attend: fx.Node) -> MLAShape | None:
    rows = {leaf: value_of(w).shape for leaf, w in site.weights.items()}
    query = value_of(attend.args[0]).shape  # [B, heads, S, nope + rope]
    lora = int(rows["kv_a_layernorm.weight"][0])
    rope = int(rows["kv_a_proj_with_mqa.weight"][0]) - lora
    heads, nope = int(query[1]), int(query[3]) - rope
    value = int(rows["kv_b_proj.weight"][0]) // heads - nope
    eps = [n.args[1] for n in site.nodes if n.target is operator.add and isinstance(n.args[1], float)]
    scale = attend.kwargs.get("scale")
    if not eps:
        return None
    # Interleaved pairs are un-interleaved by a view to [..., rope / 2, 2] and a transpose of the last two axes.
    interleaved = any(n.args[1:] == (4, 3) for n in site.nodes if n.target == "transpose")
    return MLAShape(heads, nope, rope, value, lora, float(scale) if scale is not None else float(query[3]) ** -0.5,
                    interleaved, float(eps[0]))


def _define(binding: Binding, leaves: tuple[str, ...]) -> fx.Graph:
    graph, s = fx.Graph(), binding.shape
    inputs = [graph.placeholder(r) for r in OP.roles]
    weights = [graph.placeholder(leaf.replace(".", "_")) for leaf in leaves]
    graph.output(graph.call_function(torch.ops.ktrans.mla.default, (
        *inputs, weights, [role(leaf) for leaf in leaves], [s.heads, s.nope, s.rope, s.v, s.lora], s.scale,
        s.interleaved, s.eps)))
    return graph


OP = Op("mla", _bind, "multi-head latent attention over a paged latent cache",
        ("hidden", "cos", "sin", "pool", "page_table", "seq_len", "query_start"), _define)
