"""gqa: a whole block of grouped-query attention over a paged cache of keys and values, defined in plain torch.

The op is ragged, with the same tables as `mla`: see there for `page_table`, `seq_len`, `query_start` and padding.

    pool  [pages, page, 2 * kv_heads * dim]   one layer; a row is the rotated keys of all heads, then their values

All arithmetic is float32, nothing is read back to the host, and every device works. Kernels are compared with this
file. Source: GQA (arXiv 2305.13245); `Qwen3MoeAttention` in Hugging Face transformers, with a part of the head rotated
`Glm4MoeAttention`, with norms of whole projections `OlmoeAttention`, with sinks `GptOssAttention`.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from ktcompile.folding import Site
from ktcompile.graph import argument, value_of
from ktcompile.ops.base import Binding, Bound, Op, calls, register, roles_of
from ktcompile.ops.mla import append_reference, owner_reference, role
from ktcompile.ops.paged import NO_PAGES, cache_of, cos_and_sin, name_of, named, rotary_of


@dataclass(frozen=True)
class GQAShape:
    """Attributes of one attention block; sizes in elements."""

    heads: int  # of queries
    kv_heads: int  # of keys and of values; query heads h * heads / kv_heads and following share head h
    dim: int  # of a head
    rope: int  # its first elements, which are rotated
    scale: float
    interleaved: bool  # rotary pairs are (0, 1), (2, 3) ...; else (0, rope / 2), (1, rope / 2 + 1) ...
    eps: float  # of the RMSNorms of queries and keys, if there are any
    window: int | None  # the last positions that a token sees, its own one counted; None: all


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, shape: GQAShape) -> Tensor:
    """Rotate the first `rope` elements of every head of `x [tokens, heads, dim]`, each where it is.

    `cos` and `sin` are `[tokens, rope]`, two equal halves, as most of Hugging Face has them, or one half.
    """
    turned, rest = x.split_with_sizes([shape.rope, shape.dim - shape.rope], -1)
    cos, sin = (t[:, None, : shape.rope // 2].float() for t in (cos, sin))
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1) if shape.interleaved else turned.chunk(2, -1)
    pair = first * cos - second * sin, second * cos + first * sin
    done = torch.stack(pair, -1).flatten(-2) if shape.interleaved else torch.cat(pair, -1)
    return torch.cat([done, rest], -1)


def attend_reference(
    query: Tensor,  # [tokens, heads, dim]
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
    shape: GQAShape,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """Attention of query `i` of request `r` over the positions up to `seq_len[r] + i`, `[tokens, heads, dim]`.

    With a window these are the last `window` ones. A sink is a score that takes part in the softmax of its head and
    has no value. The step's own rows are already in the pool. Slots past a position are never used, whatever they hold.
    """
    tokens = query.shape[0]
    if seq_len.numel() == 0 or tokens == 0:
        return torch.zeros_like(query)
    owner = owner_reference(query_start, tokens)
    request = owner.clamp(max=seq_len.shape[0] - 1)
    index = torch.arange(tokens, device=pool.device) - query_start[request]
    limit = torch.where(owner < seq_len.shape[0], seq_len[request] + index + 1, 0)  # [tokens]

    cached = pool[page_table.long()].flatten(1, 2)[request].float()  # [tokens, S, 2 * kv_heads * dim]
    position = torch.arange(cached.shape[1], device=pool.device)
    seen = position < limit[:, None]
    if shape.window is not None:
        seen &= position >= limit[:, None] - shape.window
    cached = torch.where(seen[..., None], cached, 0)  # 0 * NaN is NaN
    keys, values = cached.unflatten(-1, (2, shape.kv_heads, shape.dim)).unbind(-3)
    grouped = query.float().unflatten(1, (shape.kv_heads, -1))  # [tokens, kv_heads, group, dim]
    scores = torch.einsum("tkgd,tskd->tkgs", grouped, keys) * shape.scale
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, shape.kv_heads, -1, 1).expand(tokens, -1, -1, -1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : seen.shape[1]]
    weights = torch.where(seen[:, None, None], weights, 0)  # a row that sees nothing is 0 / 0
    return torch.einsum("tkgs,tskd->tkgd", weights, values).flatten(1, 2).to(query.dtype)


def gqa_reference(
    hidden: Tensor,  # [..., H], flattened to [tokens, H]
    cos: Tensor,  # [..., rope] or [..., rope / 2]
    sin: Tensor,
    weights: Mapping[str, Tensor],
    shape: GQAShape,
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
) -> Tensor:
    """The whole attention block: projections, norms, rotation, append, attention, output; shaped like `hidden`.

    `weights` is keyed by the names of the model without `.weight`: `q_proj`, `k_proj`, `v_proj`, `o_proj`, biases as
    `q_proj.bias`, and if the model has them `sinks [heads]`, `q_norm` and `k_norm`. A norm is over the head where it
    has `dim` elements, else over the whole projection.
    """

    def project(x: Tensor, role: str) -> Tensor:
        bias = weights.get(f"{role}_proj.bias")
        return functional.linear(x, weights[f"{role}_proj"].float(), None if bias is None else bias.float())

    def heads(x: Tensor, role: str) -> Tensor:
        weight = weights.get(f"{role}_norm")
        if weight is not None:
            x = x.unflatten(-1, (-1, weight.numel()))
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.eps) * weight.float()
        return x.reshape(x.shape[0], -1, shape.dim)

    x = hidden.reshape(-1, hidden.shape[-1]).float()
    cos, sin = cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])
    query, key = (rotate_reference(heads(project(x, r), r), cos, sin, shape) for r in "qk")
    rows = torch.cat([key.flatten(1), project(x, "v")], -1)
    append_reference(pool, page_table, seq_len, query_start, rows)
    mixed = attend_reference(query, pool, page_table, seq_len, query_start, shape, weights.get("sinks"))
    return project(mixed.flatten(1), "o").view(hidden.shape).to(hidden.dtype)


def _gqa(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
    weights: list[Tensor],
    names: list[str],
    sizes: list[int],
    scale: float,
    interleaved: bool,
    eps: float,
    window: int | None,
) -> Tensor:
    heads, kv_heads, dim, rope = sizes
    shape = GQAShape(heads, kv_heads, dim, rope, scale, interleaved, eps, window)
    return gqa_reference(
        hidden, cos, sin, dict(zip(names, weights, strict=True)), shape, pool, page_table, seq_len, query_start
    )


register(
    "gqa(Tensor hidden, Tensor cos, Tensor sin, Tensor(a!) pool, Tensor page_table, Tensor seq_len, "
    "Tensor query_start, Tensor[] weights, str[] names, int[] sizes, float scale, bool interleaved, float eps, "
    "int? window) -> Tensor",
    _gqa,
    lambda hidden, *_: torch.empty_like(hidden),
)

# ------------------------------------------------------------------------------------------------ bind

_PROJECTIONS = {f"{role}_proj.weight" for role in "qkvo"}
_BIASES = {f"{role}_proj.bias" for role in "qkvo"}
_NORMS = {"q_norm.weight", "k_norm.weight"}
_OPERATIONS = {
    *("linear", "to", "pow", "mean", "rsqrt", "add", "mul", "sub", "neg", "matmul", "softmax", "max"),
    *("view", "reshape", "transpose", "unsqueeze", "getitem", "expand", "flatten", "contiguous", "float"),
    *("cat", "stack", "chunk", "repeat_interleave", "scaled_dot_product_attention", "dropout"),
    *("cache_append", "cache_gather"),
}
"""What the code may call. A clamp or a soft cap may change nothing on made-up inputs: no proof would find it."""


def _bind(site: Site) -> Bound | None:
    have = set(site.weights)
    if not (site.cls.endswith("Attention") and have >= _PROJECTIONS):
        return None

    def no(why: str) -> Bound:
        return Bound("attention", why=f"not gqa: {why}")

    if have - _PROJECTIONS - _BIASES - {"sinks"} not in (set(), _NORMS):
        return no(f"its weights are {', '.join(sorted(have))}")
    gathers = named(site, "cache_gather")
    cache = cache_of(site) if len(gathers) == 1 else NO_PAGES
    if isinstance(cache, str):
        return no(cache)
    if unknown := next((name_of(n) for n in site.nodes if name_of(n) not in _OPERATIONS), None):
        return no(f"it calls {unknown}, which is no part of gqa")
    projections = [n for r in "qkv" for n in site.weights[f"{r}_proj.weight"].users if n in site.nodes]
    read = {argument(n, 0) for n in projections}
    hidden = next(iter(read))
    rotary = rotary_of(site)
    if len(projections) != 3 or len(read) != 1 or hidden not in site.tensors or len(rotary) != 2:
        return no("its hidden states, cosines and sines cannot be told apart")
    masks = [n for n in site.tensors if n not in (hidden, *rotary, *cache)]
    seen = _seen(masks[0], cache[1:]) if len(masks) == 1 else None
    if seen is None:
        return no("its mask is not proven causal")
    both = cos_and_sin(rotary)
    if both is None:
        return no("cosines and sines cannot be told apart")
    shape = _shape(site, both[0], gathers[0], seen is masks[0], _window(seen))
    if isinstance(shape, str):
        return no(shape)
    nodes = dict(zip(OP.roles, (hidden, *both, *cache), strict=True))
    return Bound("gqa", Binding(roles_of(site, **nodes, mask=masks[0]), shape))


def _seen(mask: fx.Node, tables: list[fx.Node]) -> fx.Node | None:
    """The boolean mask of these tables that a mask is, or that it was made of to be added to scores."""
    node = mask
    if name_of(mask) == "masked_fill":
        zeros, hidden, value = mask.args
        if not isinstance(zeros, fx.Node) or not isinstance(hidden, fx.Node) or not isinstance(value, float):
            return None
        if name_of(zeros) != "zeros_like" or hidden.target is not operator.invert or value > -1e4:
            return None
        node = argument(hidden, 0)
    known = calls(node, "ragged_mask") or calls(node, "ragged_window_mask")
    return node if known and list(node.args[:3]) == tables else None


def _window(seen: fx.Node) -> int | None:
    window = seen.args[5] if calls(seen, "ragged_window_mask") else None
    return window if isinstance(window, int) else None


def _shape(site: Site, cos: fx.Node, gather: fx.Node, is_boolean: bool, window: int | None) -> GQAShape | str:
    """The attributes of a site, or why it has none that fit."""
    rows = {leaf: [int(n) for n in value_of(w).shape] for leaf, w in site.weights.items()}
    kv_heads, dim, v_dim = gather.args[2:5]
    if not isinstance(kv_heads, int) or not isinstance(dim, int) or dim != v_dim:
        return "its keys and values are not of one size"
    heads = rows["q_proj.weight"][0] // dim
    sizes = {"q_proj.weight": heads * dim, "k_proj.weight": kv_heads * dim, "v_proj.weight": kv_heads * dim}
    if any(rows[leaf][0] != n for leaf, n in sizes.items()) or rows["o_proj.weight"][1] != heads * dim:
        return "its projections are not queries, keys and values of the cache's heads, and nothing else"
    if heads % kv_heads:
        return f"{heads} heads of queries do not share {kv_heads} of keys evenly"
    for leaf, whole in (("q_norm.weight", heads * dim), ("k_norm.weight", kv_heads * dim)):
        if leaf in rows and rows[leaf] not in ([dim], [whole]):
            return f"{leaf} has {rows[leaf]} elements: of no head and no projection"
    scale = _scale(site, dim, is_boolean)
    if scale is None:
        return "its scores are not one product, scaled, masked and put through one softmax"
    found = {n.args[1] for n in site.nodes if n.target is operator.add and isinstance(n.args[1], float)}
    if len(found) != ("q_norm.weight" in rows):
        return f"its norms have {len(found)} epsilons, wanted 1"
    width = int(value_of(cos).shape[-1])
    rope = width if named(site, "neg") else 2 * width  # as rotate_half does it; else by halves, with half the cosines
    if rope > dim:
        return f"{rope} elements of a head of {dim} are rotated"
    return GQAShape(heads, kv_heads, dim, rope, scale, _has_pairs(site), next(iter(found), 0.0), window)


def _scale(site: Site, dim: int, is_boolean: bool) -> float | None:
    """What scores are multiplied with, for torch's attention with a boolean mask and eager code with one to add."""
    attends, softmaxes = named(site, "scaled_dot_product_attention"), named(site, "softmax")
    if is_boolean and len(attends) == 1 and not softmaxes:
        if attends[0].kwargs.get("dropout_p") or attends[0].kwargs.get("is_causal"):
            return None
        scale = attends[0].kwargs.get("scale")
        return float(scale) if isinstance(scale, int | float) else dim**-0.5
    if is_boolean or attends or len(softmaxes) != 1:
        return None
    scaled = [n for m in named(site, "matmul") for n in m.users if n.target is operator.mul]
    scale = scaled[0].args[1] if len(scaled) == 1 else None
    return float(scale) if isinstance(scale, int | float) else None


def _has_pairs(site: Site) -> bool:
    """Whether the code takes interleaved pairs apart: `x[..., 0::2]`."""
    indices = (n.args[1] for n in named(site, "getitem") if len(n.args) > 1)
    return any(isinstance(i, slice) and i.step == 2 for index in indices if isinstance(index, tuple) for i in index)


def _define(binding: Binding, leaves: tuple[str, ...]) -> fx.Graph:
    graph, s = fx.Graph(), binding.shape
    inputs = [graph.placeholder(r) for r in OP.roles]
    weights = [graph.placeholder(leaf.replace(".", "_")) for leaf in leaves]
    sizes = [s.heads, s.kv_heads, s.dim, s.rope]
    attributes = sizes, s.scale, s.interleaved, s.eps, s.window
    names = [role(leaf) for leaf in leaves]
    graph.output(graph.call_function(torch.ops.ktrans.gqa.default, (*inputs, weights, names, *attributes)))
    return graph


OP = Op(
    "gqa",
    _bind,
    "grouped-query attention over a paged cache of keys and values",
    ("hidden", "cos", "sin", "pool", "page_table", "seq_len", "query_start"),
    _define,
)
