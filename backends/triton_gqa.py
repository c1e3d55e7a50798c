"""Triton kernels of grouped-query attention (GQA) over a paged cache of keys and values, for a GPU.

The op, its ragged rows and the cache are defined in `ktcompile/ops/gqa.py`. Two kernels, and the merge of `triton_mla`:

    gqa_write    norm and rotation of queries and keys, keys and values to their slots: one launch
    gqa_attend   one kernel for decode, prefill and any mix of both, and the merge of its splits

All query heads of a group read the same keys and values. So the rows of one matrix are the (query, head) pairs of one
request and one group: a program takes `Tiles.rows` consecutive ones, whether these are heads of one query (decode) or
of several (prefill), and streams the cache past them with an online softmax (FlashAttention, arXiv 2205.14135). The
context is cut into `Tiles.splits` parts (Flash-Decoding); each leaves a partial result and its log-sum-exp. A window
makes the context shorter at its start; a sink is what the first part's softmax begins with.

Nothing here waits for the device or reads a length on the host, so a step can be captured in a CUDA graph.
Without Triton this module still imports; `unavailable()` of `triton_mla` says why nothing in it can run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ktcompile.backends.triton_language import constexpr, jit, tensor, tl
from ktcompile.backends.triton_mla import (
    Tiles,
    _check_cache,
    _describe,
    _merge,
    _owner,
    _power_of_two,
    _slot,
    choose_tiles,
    interpreted,
    processors_of,
)
from ktcompile.ops.gqa import GQAShape

# ---------------------------------------------------------------------------------------------------------- kernels
# `..._PAD` is the next power of two: Triton's blocks need one. UPCAST: the interpreter computes bfloat16 on bit
# patterns, silently wrong, so there every load becomes float32.


@jit
def _rotated(
    source: tensor,  # [HEAD_BLOCK, 1] pointers to heads
    ok: tensor,  # [HEAD_BLOCK, 1]
    norm: tensor,  # [DIM], or unused
    cos: tensor,  # of this token
    sin: tensor,
    eps: tensor,
    DIM: constexpr,
    DIM_PAD: constexpr,
    ROPE: constexpr,
    INTERLEAVED: constexpr,
    NORM: constexpr,
) -> tensor:
    """Some heads of one token, normalised and rotated: float32 [HEAD_BLOCK, DIM_PAD].

    Every element is loaded twice, as itself and as its partner's partner: the second time from the cache.
    """
    i = tl.arange(0, DIM_PAD)
    turned = i < ROPE
    if INTERLEAVED:
        pair = i // 2
        is_first = i % 2 == 0
        other = tl.where(is_first, i + 1, i - 1)
    else:
        pair = i % (ROPE // 2)
        is_first = i < ROPE // 2
        other = tl.where(is_first, i + ROPE // 2, i - ROPE // 2)
    other = tl.where(turned, other, i)
    c = tl.load(cos + pair, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + pair, mask=turned, other=0.0).to(tl.float32)
    s = tl.where(is_first, -s, s)
    mask = ok & (i < DIM)[None, :]
    x = tl.load(source + i[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source + other[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x *= factor * tl.load(norm + i, mask=i < DIM, other=0.0).to(tl.float32)[None, :]
        y *= factor * tl.load(norm + other, mask=i < DIM, other=0.0).to(tl.float32)[None, :]
    return x * c[None, :] + y * s[None, :]


@jit
def _write(
    query: tensor,  # [tokens, HEADS * DIM], as projected
    query_stride: tensor,
    key: tensor,  # [tokens, KV_HEADS * DIM], likewise
    key_stride: tensor,
    value: tensor,
    value_stride: tensor,
    rotated: tensor,  # [tokens, HEADS, DIM], contiguous
    q_norm: tensor,  # [DIM], or unused
    k_norm: tensor,
    cos: tensor,  # [tokens, at least ROPE / 2]
    cos_stride: tensor,
    sin: tensor,
    sin_stride: tensor,
    eps: tensor,
    pool: tensor,  # [pages, PAGE, 2 * KV_HEADS * DIM]
    page_table: tensor,
    table_stride: tensor,
    seq_len: tensor,
    query_start: tensor,
    requests: tensor,
    HEADS: constexpr,
    KV_HEADS: constexpr,
    DIM: constexpr,
    DIM_PAD: constexpr,
    ROPE: constexpr,
    PAGE: constexpr,
    REQUESTS_PAD: constexpr,
    INTERLEAVED: constexpr,
    NORM: constexpr,
    HEAD_BLOCK: constexpr,
) -> None:
    """Program (row, b): block b of the row's heads of queries; after these, blocks of its heads of keys and values."""
    row = tl.program_id(0)
    token = row.to(tl.int64)
    d = tl.arange(0, DIM_PAD)
    cos += token * cos_stride
    sin += token * sin_stride
    Q_BLOCKS: constexpr = (HEADS + HEAD_BLOCK - 1) // HEAD_BLOCK
    block = tl.program_id(1)
    if block < Q_BLOCKS:
        head = (block * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK))[:, None]
        source = query + token * query_stride + head * DIM
        x = _rotated(source, head < HEADS, q_norm, cos, sin, eps, DIM, DIM_PAD, ROPE, INTERLEAVED, NORM)
        to = rotated + (token * HEADS + head) * DIM + d[None, :]
        tl.store(to, x.to(rotated.dtype.element_ty), mask=(head < HEADS) & (d < DIM)[None, :])
        return

    request = _owner(query_start, requests, row, REQUESTS_PAD)
    if request == requests:
        return
    slot = _slot(page_table, table_stride, seq_len, query_start, request, row, PAGE)
    head = ((block - Q_BLOCKS) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK))[:, None]
    source = key + token * key_stride + head * DIM
    x = _rotated(source, head < KV_HEADS, k_norm, cos, sin, eps, DIM, DIM_PAD, ROPE, INTERLEAVED, NORM)
    ok = (head < KV_HEADS) & (d < DIM)[None, :]
    to = pool + slot * (2 * KV_HEADS * DIM) + head * DIM + d[None, :]
    tl.store(to, x.to(pool.dtype.element_ty), mask=ok)
    v = tl.load(value + token * value_stride + head * DIM + d[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(to + KV_HEADS * DIM, v.to(pool.dtype.element_ty), mask=ok)


@jit
def _attend(
    query: tensor,  # [tokens, HEADS, DIM], contiguous
    pool: tensor,  # [pages, PAGE, 2 * KV_HEADS * DIM]
    page_table: tensor,
    table_stride: tensor,
    seq_len: tensor,
    query_start: tensor,
    sinks: tensor,  # [HEADS], or unused
    out: tensor,  # [tokens, HEADS, DIM]; unused if SPLITS > 1
    partial: tensor,  # [SPLITS, tokens, HEADS, DIM] float32; unused if SPLITS == 1
    lse: tensor,  # [SPLITS, tokens, HEADS] float32, base 2; likewise
    scale_log2: tensor,  # scale * log2(e)
    tokens: tensor,
    requests: tensor,
    HEADS: constexpr,
    KV_HEADS: constexpr,
    DIM: constexpr,
    DIM_PAD: constexpr,
    WINDOW: constexpr,  # 0: none
    SINKS: constexpr,
    PAGE: constexpr,
    REQUESTS_PAD: constexpr,
    ROWS: constexpr,
    KEYS: constexpr,
    SPLITS: constexpr,
    STAGES: constexpr,
    UPCAST: constexpr,
    PRECISION: constexpr,
) -> None:
    """Program (b, h, split): block b of the rows of group h, over one part of its request's context.

    A block holds rows of one request only. Blocks are numbered without a host loop, as in `triton_mla`: request r
    begins at block `query_start[r] * GROUP // ROWS + r`, which leaves each enough of them; spare ones return. If ROWS
    divides GROUP no request begins inside a block, and the `+ r` falls away. Padding rows are the last, virtual
    request, with context 0.
    """
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: constexpr = HEADS // KV_HEADS
    WIDTH: constexpr = 2 * KV_HEADS * DIM
    i = tl.arange(0, REQUESTS_PAD)
    begin = tl.load(query_start + i, mask=i <= requests, other=0) * GROUP // ROWS
    if GROUP % ROWS != 0:
        begin += i
    request = tl.sum(((i <= requests) & (begin <= block)).to(tl.int32), 0) - 1

    owned = request < requests
    start = tl.load(query_start + request)
    end = tl.load(query_start + request + 1, mask=owned, other=tokens)
    stored = tl.load(seq_len + request, mask=owned, other=0)
    own_begin = start * GROUP // ROWS
    if GROUP % ROWS != 0:
        own_begin += request
    if (block - own_begin) * ROWS >= (end - start) * GROUP:
        return
    row = (block - own_begin) * ROWS + tl.arange(0, ROWS)
    local = row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = local < end - start
    limit = tl.where(live & owned, stored + local + 1, 0)  # [ROWS] the position after the last that each may see
    last = tl.max(limit, 0)
    first = last * 0
    if WINDOW > 0:
        first = tl.maximum(tl.min(tl.where(live & owned, limit, last), 0) - WINDOW, 0) // KEYS * KEYS

    d = tl.arange(0, DIM_PAD)
    d_ok = (d < DIM)[None, :]
    token = (start + local).to(tl.int64)
    flat = token * HEADS + head
    q = tl.load(query + flat[:, None] * DIM + d[None, :], mask=live[:, None] & d_ok, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)

    top = tl.full([ROWS], float("-inf"), tl.float32)  # running maximum
    total = tl.zeros([ROWS], tl.float32)  # running sum of exp2(score - top)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, 1.0, total)
    mixed = tl.zeros([ROWS, DIM_PAD], tl.float32)
    part = tl.cdiv(tl.cdiv(last - first, KEYS), SPLITS) * KEYS  # whole key blocks, so that none straddles two pages
    lo = first + split * part
    hi = tl.minimum(lo + part, last)
    for base in tl.range(lo, hi, KEYS, num_stages=STAGES):
        position = base + tl.arange(0, KEYS)
        inside = position < hi
        if PAGE % KEYS == 0:
            page = tl.load(page_table + request * table_stride + base // PAGE).to(tl.int64)
            slot = page * PAGE + base % PAGE + tl.arange(0, KEYS)
        else:
            page = tl.load(page_table + request * table_stride + position // PAGE, mask=inside, other=0).to(tl.int64)
            slot = page * PAGE + position % PAGE
        cached = pool + (slot * WIDTH + kv_head * DIM)[:, None] + d[None, :]
        key = tl.load(cached, mask=inside[:, None] & d_ok, other=0.0)  # [KEYS, DIM_PAD]
        value = tl.load(cached + KV_HEADS * DIM, mask=inside[:, None] & d_ok, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale_log2
        seen = position[None, :] < limit[:, None]
        if WINDOW > 0:
            seen &= position[None, :] >= limit[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet: no inf - inf
        weight = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(value.dtype), value, acc=mixed * fade[:, None], input_precision=PRECISION)
        top = new_top

    has_seen = total > 0
    mixed = mixed / tl.where(has_seen, total, 1.0)[:, None]
    if SPLITS == 1:
        tl.store(out + flat[:, None] * DIM + d[None, :], mixed.to(out.dtype.element_ty), mask=live[:, None] & d_ok)
    else:
        flat += split.to(tl.int64) * tokens * HEADS
        score = tl.where(has_seen, top + tl.log2(tl.where(has_seen, total, 1.0)), float("-inf"))
        tl.store(lse + flat, score, mask=live)
        # A part without a visible key leaves no partial: its weight in the merge is zero.
        tl.store(partial + flat[:, None] * DIM + d[None, :], mixed, mask=(live & has_seen)[:, None] & d_ok)


# --------------------------------------------------------------------------------------------------------- launches


def tiles_for(
    tokens: int,
    requests: int,
    shape: GQAShape,
    itemsize: int,
    max_context: int,
    max_queries: int | None,
    processors: Any,
) -> Tiles:
    """Tiles for a step, from what the host knows without waiting; see `choose_tiles` of `triton_mla`.

    `max_queries`: None takes every request to bring as many tokens as the others.
    """
    most = -(-tokens // max(1, requests)) if max_queries is None else max_queries
    if shape.window is not None:
        max_context = min(max_context, shape.window + most)
    each = replace(processors, count=max(1, processors.count // shape.kv_heads))  # groups run side by side
    width = 2 * _power_of_two(shape.dim)  # of a key and its value
    return choose_tiles(tokens, requests, shape.heads // shape.kv_heads, width, itemsize, max_context, most, each)


def gqa_write(
    query: Tensor,  # [tokens, heads * dim]: q_proj of the hidden state
    key: Tensor,  # [tokens, kv_heads * dim]
    value: Tensor,
    norms: tuple[Tensor, Tensor] | None,  # [dim]: q_norm and k_norm of a head, or none
    cos: Tensor,  # [tokens, rope] of two equal halves, or [tokens, rope / 2]
    sin: Tensor,
    shape: GQAShape,
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
) -> Tensor:
    """Normalise and rotate queries and keys, append keys and values; returns the queries `[tokens, heads, dim]`."""
    _check_pool(shape, pool, page_table, seq_len, query_start)
    tokens = query.shape[0]
    wide, narrow = (tokens, shape.heads * shape.dim), (tokens, shape.kv_heads * shape.dim)
    if query.shape != wide or key.shape != narrow or value.shape != narrow:
        raise ValueError(
            f"{shape} does not fit query {_describe(query)}, key {_describe(key)}, value {_describe(value)}"
        )
    if cos.dim() != 2 or len(cos) != tokens or cos.shape[1] < shape.rope // 2 or sin.shape != cos.shape:
        raise ValueError(f"cos and sin must be [{tokens}, {shape.rope}], not {_describe(cos)} and {_describe(sin)}")
    if any(t.stride(1) != 1 for t in (query, key, value, cos, sin)):
        raise ValueError("the last dimension of query, key, value, cos and sin must be contiguous")
    if norms is not None and any(n.shape != (shape.dim,) or not n.is_contiguous() for n in norms):
        raise ValueError(f"norms must be contiguous [{shape.dim}], not {' and '.join(map(_describe, norms))}")
    rotated = torch.empty(tokens, shape.heads, shape.dim, dtype=query.dtype, device=query.device)
    if tokens == 0 or seq_len.shape[0] == 0:
        return rotated.zero_()
    q_norm, k_norm = norms or (query, key)
    head_block = min(8, _power_of_two(shape.heads))
    blocks = -(-shape.heads // head_block) + -(-shape.kv_heads // head_block)
    with torch.cuda.device(pool.get_device()):
        _write[(tokens, blocks)](
            query, query.stride(0), key, key.stride(0), value, value.stride(0), rotated, q_norm, k_norm,
            cos, cos.stride(0), sin, sin.stride(0), shape.eps,
            pool, page_table, page_table.stride(0), seq_len, query_start, seq_len.shape[0],
            HEADS=shape.heads, KV_HEADS=shape.kv_heads, DIM=shape.dim, DIM_PAD=_power_of_two(shape.dim),
            ROPE=shape.rope, PAGE=pool.shape[1], REQUESTS_PAD=_power_of_two(seq_len.shape[0] + 1),
            INTERLEAVED=shape.interleaved, NORM=norms is not None, HEAD_BLOCK=head_block,
        )  # fmt: skip
    return rotated


def gqa_attend(
    query: Tensor,  # [tokens, heads, dim], contiguous
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
    shape: GQAShape,
    sinks: Tensor | None = None,  # [heads]
    out: Tensor | None = None,
    *,
    max_queries: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attention as `attend_reference` of the op, `[tokens, heads, dim]`; the step's own rows are already in the pool.

    `max_queries` (1 in decode) only chooses the tiles: a wrong value costs time, never correctness.
    """
    _check_pool(shape, pool, page_table, seq_len, query_start)
    tokens, requests = query.shape[0], seq_len.shape[0]
    if query.shape != (tokens, shape.heads, shape.dim) or not query.is_contiguous():
        raise ValueError(f"query must be contiguous [tokens, {shape.heads}, {shape.dim}], not {_describe(query)}")
    if query.dtype != pool.dtype:
        raise ValueError(f"queries are {query.dtype}, the pool is {pool.dtype}: must be equal")
    if sinks is not None and (sinks.shape != (shape.heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be contiguous [{shape.heads}], not {_describe(sinks)}")
    if out is None:
        out = torch.empty_like(query)
    if out.shape != query.shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {list(query.shape)}, not {_describe(out)}")
    if tokens == 0 or requests == 0:
        return out.zero_()
    if tiles is None:
        here, context = processors_of(pool.get_device()), page_table.shape[1] * pool.shape[1]
        tiles = tiles_for(tokens, requests, shape, pool.itemsize, context, max_queries, here)

    group = shape.heads // shape.kv_heads
    blocks = tokens * group // tiles.rows + (requests + 1 if group % tiles.rows else 0)
    kept = (tiles.splits, tokens, shape.heads) if tiles.splits > 1 else (0, 0, 0)
    partial = torch.empty(*kept, shape.dim, dtype=torch.float32, device=pool.device)
    lse = torch.empty(kept, dtype=torch.float32, device=pool.device)
    with torch.cuda.device(pool.get_device()):
        _attend[(blocks, shape.kv_heads, tiles.splits)](
            query, pool, page_table, page_table.stride(0), seq_len, query_start, query if sinks is None else sinks,
            out, partial, lse, shape.scale * 1.4426950408889634, tokens, requests,
            HEADS=shape.heads, KV_HEADS=shape.kv_heads, DIM=shape.dim, DIM_PAD=max(16, _power_of_two(shape.dim)),
            WINDOW=shape.window or 0, SINKS=sinks is not None, PAGE=pool.shape[1],
            REQUESTS_PAD=_power_of_two(requests + 1), ROWS=tiles.rows, KEYS=tiles.keys, SPLITS=tiles.splits,
            STAGES=tiles.stages, UPCAST=interpreted(), PRECISION="ieee", num_warps=tiles.warps,
        )  # fmt: skip
        if tiles.splits == 1:
            return out
        padded = max(2, _power_of_two(tiles.splits))
        columns = max(16, min(_power_of_two(shape.dim), 8192 // padded))
        _merge[(tokens * shape.heads, -(-shape.dim // columns))](
            partial, lse, out, tokens * shape.heads,
            LORA=shape.dim, COLUMNS=columns, SPLITS=tiles.splits, SPLITS_PAD=padded,
        )  # fmt: skip
    return out


def gqa(
    hidden: Tensor,  # [..., H], flattened to [tokens, H]
    cos: Tensor,  # [..., rope] or [..., rope / 2]
    sin: Tensor,
    weights: Mapping[str, Any],
    shape: GQAShape,
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
    *,
    max_queries: int | None = None,
    project: Callable[[Any, Any, Tensor | None], Tensor] = functional.linear,
    share: Callable[[Tensor], Any] = torch.Tensor.detach,
) -> Tensor:
    """The whole attention block; arguments as of `gqa_reference`, result shaped like `hidden`.

    `project(x, weight, bias)` computes the projections from weights of its own kind; all other weights are tensors.
    `share(x)` is what it takes for an x that meets several weights.
    """
    x = hidden.reshape(-1, hidden.shape[-1])
    # Of some models they are a product's transpose.
    cos, sin = (t.reshape(-1, t.shape[-1]).contiguous() for t in (cos, sin))

    def linear(x: Any, role: str) -> Tensor:
        return project(x, weights[role], weights.get(f"{role}.bias"))

    all_three = share(x)
    query, key, value = (linear(all_three, f"{role}_proj") for role in "qkv")
    norms = (weights["q_norm"], weights["k_norm"]) if "q_norm" in weights else None
    if norms is not None and any(n.shape != (shape.dim,) for n in norms):  # of whole projections
        query, key = (
            functional.rms_norm(t.unflatten(-1, (-1, len(n))), n.shape, n, shape.eps).flatten(-2)
            for t, n in zip((query, key), norms, strict=True)
        )
        norms = None
    cache = (pool, page_table, seq_len, query_start)
    query = gqa_write(query, key, value, norms, cos, sin, shape, *cache)
    mixed = gqa_attend(query, *cache, shape, weights.get("sinks"), max_queries=max_queries)
    return linear(mixed.flatten(1), "o_proj").view(hidden.shape)


def _check_pool(shape: GQAShape, pool: Tensor, page_table: Tensor, seq_len: Tensor, query_start: Tensor) -> None:
    _check_cache(pool, page_table, seq_len, query_start)
    if pool.shape[2] != 2 * shape.kv_heads * shape.dim:
        raise ValueError(f"{shape} needs rows of {2 * shape.kv_heads * shape.dim}, not of pool {_describe(pool)}")
