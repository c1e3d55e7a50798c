"""mla: a whole block of multi-head latent attention over a paged latent cache, defined in plain torch.

The op is ragged. One step brings `tokens` rows of several requests, packed one after the other: request `r` owns the
rows `query_start[r]:query_start[r + 1]`, none, one (decode) or many (prefill). Rows at or past `query_start[-1]` are
padding: they are not stored, and attend to nothing (zeros).

    pool         [pages, page, lora + rope]   one layer; a row is the normalised latent, then the rotated key
                 or uint8 [pages, page, lora + 2 * rope]: see `packed`
    page_table   [requests, P]                the pages of each request, in order; int32 or int64
    seq_len      [requests]                   tokens each request had stored before this step
    query_start  [requests + 1]               cumulative token counts of this step

All arithmetic is float32, nothing is read back to the host, and every device works. Kernels are compared with this
file. Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1) and `DeepseekV3Attention` in Hugging Face transformers.
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
from ktcompile.ops.paged import cache_of, cos_and_sin, named, rotary_of


@dataclass(frozen=True)
class MLAShape:
    """Attributes of one attention block; sizes in elements, `scale` with YaRN's correction already in it."""

    heads: int
    nope: int  # part of a query or key head that is not rotated
    rope: int  # part that is rotated; the key's is shared by all heads
    v: int  # value head
    lora: int  # latent
    scale: float
    interleaved: bool  # rotary pairs are (0, 1), (2, 3) ... as DeepSeek stores them; else (0, rope / 2) ...
    eps: float  # of both RMSNorms
    in_place: bool = False  # a rotated pair stays where it was, as in DeepSeek-V2; else all first elements come first
    absorb: bool = False  # prompts too in the absorbed form, where a kernel has another one


E4M3_MAX = 448.0
"""The largest value of float8_e4m3fn."""


def packed(latent: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `[..., width]` as a pool of this type keeps them.

    uint8: the latent in float8_e4m3fn, then the key in bfloat16, so `lora + 2 * rope` bytes. A normalised latent needs
    no scale: values beyond 448 become that. Keys are not normalised, and scores take their error times their size.
    """
    if dtype != torch.uint8:
        return torch.cat([latent, key], -1).to(dtype)
    latent = latent.clamp(-E4M3_MAX, E4M3_MAX)  # the cast alone makes NaN of more, or does not, by device and version
    return torch.cat([latent.to(torch.float8_e4m3fn).view(torch.uint8), key.bfloat16().view(torch.uint8)], -1)


def unpacked(rows: Tensor, lora: int) -> tuple[Tensor, Tensor]:
    """Latents and keys of a pool's rows, in the types that they are kept in."""
    latent, key = rows[..., :lora], rows[..., lora:]
    if rows.dtype != torch.uint8:
        return latent, key
    return latent.view(torch.float8_e4m3fn), key.view(torch.bfloat16)


def owner_reference(query_start: Tensor, tokens: int) -> Tensor:
    """The request of each row, `[tokens]` int64; `requests` (one past the last) for padding."""
    rows = torch.arange(tokens, device=query_start.device, dtype=query_start.dtype)
    return torch.searchsorted(query_start.contiguous(), rows, right=True) - 1


def append_reference(pool: Tensor, page_table: Tensor, seq_len: Tensor, query_start: Tensor, rows: Tensor) -> None:
    """Write row `i` of request `r` at position `seq_len[r] + i`; `rows` is `[tokens, lora + rope]`."""
    rope = pool.shape[2] - rows.shape[1]  # of a pool of bytes
    rows = packed(rows[:, : rows.shape[1] - rope], rows[:, rows.shape[1] - rope :], pool.dtype)
    if seq_len.numel() == 0 or rows.shape[0] == 0:
        return
    page = pool.shape[1]
    owner = owner_reference(query_start, rows.shape[0])
    owned = owner < seq_len.shape[0]
    request = owner.clamp(max=seq_len.shape[0] - 1)
    index = torch.arange(rows.shape[0], device=rows.device) - query_start[request]
    position = torch.where(owned, seq_len[request] + index, 0)
    slot = page_table[request, position // page].long() * page + position % page
    # Boolean indexing would wait for the device. Padding repeats the first row's write instead; if that is padding
    # too (padding comes last, so all rows are), slot 0 is written with what it holds.
    flat = pool.view(-1, pool.shape[2])
    first = torch.where(owned[0], rows[0], flat[0])
    slot = torch.where(owned, slot, torch.where(owned[0], slot[0], 0))
    flat[slot] = torch.where(owned[:, None], rows, first)


def attend_reference(
    q_latent: Tensor,  # [tokens, heads, lora]
    q_rope: Tensor,  # [tokens, heads, rope]
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
    scale: float,
) -> Tensor:
    """Attention of query `i` of request `r` over the positions `0 .. seq_len[r] + i`, `[tokens, heads, lora]`.

    The step's own rows are already in the pool. Slots past those positions are never used, whatever they hold.
    """
    tokens, _, lora = q_latent.shape
    if seq_len.numel() == 0 or tokens == 0:
        return torch.zeros_like(q_latent)
    owner = owner_reference(query_start, tokens)
    request = owner.clamp(max=seq_len.shape[0] - 1)
    index = torch.arange(tokens, device=pool.device) - query_start[request]
    limit = torch.where(owner < seq_len.shape[0], seq_len[request] + index + 1, 0)  # [tokens]

    rows = pool[page_table.long()].flatten(1, 2)[request]
    cached = torch.cat([part.float() for part in unpacked(rows, lora)], -1)  # [tokens, P * page, lora + rope]
    seen = torch.arange(cached.shape[1], device=pool.device) < limit[:, None]
    cached = torch.where(seen[..., None], cached, 0)  # 0 * NaN is NaN
    query = torch.cat([q_latent, q_rope], -1).float()
    scores = torch.einsum("thd,tsd->ths", query, cached) * scale
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    weights = torch.where(seen[:, None], weights, 0)  # a row that sees nothing is 0 / 0
    return torch.einsum("ths,tsl->thl", weights, cached[..., :lora]).to(q_latent.dtype)


def parts_of(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as `[tokens, rope]`, of two equal halves, or `[tokens, rope / 2]`, of one.

    A complex `cos [..., rope / 2]` is the whole rotation, and `sin` the same tensor: the parts are views of it.
    """
    if cos.is_complex():
        cos, sin = torch.view_as_real(cos).unbind(-1)
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, shape: MLAShape) -> Tensor:
    """Rotate `x [tokens, ..., rope]`; `cos` and `sin` as `parts_of` returns them.

    The result has all first elements of the pairs, then all second ones, unless interleaved ones stay in place.
    """
    half = x.shape[-1] // 2
    broadcast = (x.shape[0], *[1] * (x.dim() - 2), half)
    cos, sin = (t[..., :half].float().view(broadcast) for t in (cos, sin))
    first, second = (x[..., 0::2], x[..., 1::2]) if shape.interleaved else (x[..., :half], x[..., half:])
    first, second = first.float(), second.float()
    pair = first * cos - second * sin, second * cos + first * sin
    in_pairs = shape.interleaved and shape.in_place
    return (torch.stack(pair, -1).flatten(-2) if in_pairs else torch.cat(pair, -1)).to(x.dtype)


def mla_reference(
    hidden: Tensor,  # [..., H], flattened to [tokens, H]
    cos: Tensor,  # [..., rope], see `parts_of`
    sin: Tensor,
    weights: Mapping[str, Tensor],
    shape: MLAShape,
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
) -> Tensor:
    """The whole attention block: projections, norms, rotation, append, attention, output; shaped like `hidden`.

    `weights` is keyed by the names of the model without `.weight`: `q_proj`, or `q_a_proj`, `q_a_layernorm` and
    `q_b_proj`; `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`, `o_proj`; a bias is `q_a_proj.bias` and so on.
    """

    def linear(x: Tensor, role: str) -> Tensor:
        bias = weights.get(f"{role}.bias")
        return functional.linear(x, weights[role].float(), None if bias is None else bias.float())

    def norm(x: Tensor, role: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.eps) * weights[role].float()

    x = hidden.reshape(-1, hidden.shape[-1]).float()
    cos, sin = parts_of(cos, sin)
    tokens = x.shape[0]

    plain = "q_proj" in weights
    query = linear(x, "q_proj") if plain else linear(norm(linear(x, "q_a_proj"), "q_a_layernorm"), "q_b_proj")
    q_nope, q_rope = query.view(tokens, shape.heads, -1).split_with_sizes([shape.nope, shape.rope], -1)
    latent, k_rope = linear(x, "kv_a_proj_with_mqa").split_with_sizes([shape.lora, shape.rope], -1)
    rows = torch.cat([norm(latent, "kv_a_layernorm"), rope_reference(k_rope, cos, sin, shape)], -1)
    append_reference(pool, page_table, seq_len, query_start, rows)

    up = weights["kv_b_proj"].float().view(shape.heads, shape.nope + shape.v, shape.lora)
    w_uk, w_uv = up.split_with_sizes([shape.nope, shape.v], 1)
    q_latent = torch.einsum("thn,hnl->thl", q_nope, w_uk)
    q_rope = rope_reference(q_rope, cos, sin, shape)
    mixed = attend_reference(q_latent, q_rope, pool, page_table, seq_len, query_start, shape.scale)
    values = torch.einsum("thl,hvl->thv", mixed, w_uv)
    return linear(values.reshape(tokens, -1), "o_proj").view(hidden.shape).to(hidden.dtype)


def _mla(
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
    in_place: bool,
) -> Tensor:
    heads, nope, rope, v, lora = sizes
    shape = MLAShape(heads, nope, rope, v, lora, scale, interleaved, eps, in_place)
    return mla_reference(
        hidden, cos, sin, dict(zip(names, weights, strict=True)), shape, pool, page_table, seq_len, query_start
    )


register(
    "mla(Tensor hidden, Tensor cos, Tensor sin, Tensor(a!) pool, Tensor page_table, Tensor seq_len, "
    "Tensor query_start, Tensor[] weights, str[] names, int[] sizes, float scale, bool interleaved, "
    "float eps, bool in_place) -> Tensor",
    _mla,
    lambda hidden, *_: torch.empty_like(hidden),
)

_LORA_Q = {"q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"}
_ALWAYS = {"kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight"}
_BIASES = {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}


def role(leaf: str) -> str:
    """A weight's name in the definition: `q_a_proj.weight` is `q_a_proj`, a bias keeps its suffix."""
    return leaf.removesuffix(".weight")


def _bind(site: Site) -> Bound | None:
    have = set(site.weights)
    if not {"kv_a_proj_with_mqa.weight", "kv_b_proj.weight"} <= have:
        return None

    def no(why: str) -> Bound:
        return Bound("attention", why=f"not mla: {why}")

    if not have >= _ALWAYS or have - _ALWAYS - _BIASES not in ({"q_proj.weight"}, _LORA_Q):
        return no(f"its weights are {', '.join(sorted(have))}")
    cache = cache_of(site)
    if isinstance(cache, str):
        return no(cache)
    rest = [n for n in site.tensors if n not in cache]
    projection = next(n for n in site.nodes if site.weights["kv_a_proj_with_mqa.weight"] in n.all_input_nodes)
    hidden = argument(projection, 0)
    rotary = rotary_of(site)
    masks = [n for n in rest if n is not hidden and n not in rotary]
    as_complex = len(rotary) == 1 and value_of(rotary[0]).is_complex()
    if hidden not in rest or not (as_complex or len(rotary) == 2):
        return no("its hidden states, cosines and sines cannot be told apart")
    if any(not calls(m, "ragged_mask") or list(m.args[:3]) != cache[1:] for m in masks):
        return no("its mask is not proven causal")
    attends = named(site, "scaled_dot_product_attention")
    if len(attends) != 1:
        return no("it does not call scaled_dot_product_attention exactly once")
    both = (rotary[0], rotary[0]) if as_complex else cos_and_sin(rotary)
    if both is None:
        return no("cosines and sines cannot be told apart")
    shape = _shape(site, attends[0])
    if shape is None:
        return no("no epsilon of its norms was found")
    nodes = dict(zip(OP.roles, (hidden, *both, *cache), strict=True))
    return Bound("mla", Binding(roles_of(site, **nodes), shape))


def _shape(site: Site, attend: fx.Node) -> MLAShape | None:
    rows = {leaf: value_of(w).shape for leaf, w in site.weights.items()}
    query = value_of(argument(attend, 0)).shape  # [B, heads, S, nope + rope]
    lora = int(rows["kv_a_layernorm.weight"][0])
    rope = int(rows["kv_a_proj_with_mqa.weight"][0]) - lora
    heads, nope = int(query[1]), int(query[3]) - rope
    value = int(rows["kv_b_proj.weight"][0]) // heads - nope
    eps = [n.args[1] for n in site.nodes if n.target is operator.add and isinstance(n.args[1], float)]
    scale = attend.kwargs.get("scale")
    if not eps:
        return None
    as_complex = bool(named(site, "view_as_complex"))  # takes pairs as they lie, and leaves them there
    interleaved = as_complex or any(_parts_pairs(n) for n in site.nodes)
    return MLAShape(
        heads,
        nope,
        rope,
        value,
        lora,
        float(scale) if isinstance(scale, (int, float)) else float(query[3]) ** -0.5,
        interleaved,
        float(eps[0]),
        as_complex,
    )


def _parts_pairs(node: fx.Node) -> bool:
    """Whether a node takes interleaved pairs apart: `x[..., 0::2]`, or a view to pairs and `transpose(4, 3)`."""
    if node.target == "transpose":
        return node.args[1:] == (4, 3)
    index = node.args[1] if node.target is operator.getitem and len(node.args) > 1 else None
    return isinstance(index, tuple) and any(isinstance(i, slice) and i.step == 2 for i in index)


def _define(binding: Binding, leaves: tuple[str, ...]) -> fx.Graph:
    graph, s = fx.Graph(), binding.shape
    inputs = [graph.placeholder(r) for r in OP.roles]
    weights = [graph.placeholder(leaf.replace(".", "_")) for leaf in leaves]
    graph.output(
        graph.call_function(
            torch.ops.ktrans.mla.default,
            (
                *inputs,
                weights,
                [role(leaf) for leaf in leaves],
                [s.heads, s.nope, s.rope, s.v, s.lora],
                s.scale,
                s.interleaved,
                s.eps,
                s.in_place,
            ),
        )
    )
    return graph


OP = Op(
    "mla",
    _bind,
    "multi-head latent attention over a paged latent cache",
    ("hidden", "cos", "sin", "pool", "page_table", "seq_len", "query_start"),
    _define,
)
