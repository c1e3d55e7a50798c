"""Triton kernels of multi-head latent attention (MLA) over a paged latent cache, for a GPU.

The op, its ragged rows and the cache are defined in `ktcompile/ops/mla.py`. Three kernels and a merge:

    latent_append   one program a row: copy it to its slot
    latent_write    the same, fused with RMSNorm and the rotation of key and queries
    mla_attend      one kernel for decode, prefill and any mix of both, and the merge of its splits; on Hopper
                    GPUs the kernel of `gluon_mla` does the same work faster

In the absorbed form all heads of a query read the same cache row, so (query, head) pairs are simply the rows of one
matrix: a program takes `Tiles.rows` consecutive rows of one request, whether these are heads of one query (decode) or
of several (prefill), and streams the cache past them with an online softmax (FlashAttention, arXiv 2205.14135). The
context is cut into `Tiles.splits` parts (Flash-Decoding); each leaves a partial result and its log-sum-exp.

Nothing here waits for the device or reads a length on the host, so a step can be captured in a CUDA graph.
Without Triton this module still imports; `unavailable()` says why nothing in it can run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ktcompile.backends import gluon_mla
from ktcompile.backends.triton_language import constexpr, jit, tensor, tl, triton
from ktcompile.ops.mla import MLAShape, parts_of, unpacked


def interpreted() -> bool:
    """Whether Triton was imported under TRITON_INTERPRET=1: the kernels then run on a CPU, slowly, for tests."""
    return triton is not None and not isinstance(_attend, triton.runtime.JITFunction)


def unavailable() -> str | None:
    """Why these kernels cannot run here, or None if they can."""
    if triton is None:
        return "triton is not installed"
    if interpreted() or torch.cuda.is_available():
        return None
    return "there is no GPU that torch can use"


# ---------------------------------------------------------------------------------------------------------- kernels
# `..._PAD` is the next power of two: Triton's blocks need one. UPCAST: the interpreter computes bfloat16 on bit
# patterns, silently wrong, so there every load becomes float32.


@jit
def _owner(query_start: tensor, requests: tensor, row: tensor, REQUESTS_PAD: constexpr) -> tensor:
    """The request that owns a row of this step; `requests` if none does."""
    i = tl.arange(0, REQUESTS_PAD)
    start = tl.load(query_start + i, mask=i <= requests, other=0)
    return tl.sum(((i <= requests) & (start <= row)).to(tl.int32), 0) - 1


@jit
def _slot(
    page_table: tensor,
    table_stride: tensor,
    seq_len: tensor,
    query_start: tensor,
    request: tensor,
    row: tensor,
    PAGE: constexpr,
) -> tensor:
    """The pool row (int64) at which a row of this step is stored."""
    position = tl.load(seq_len + request) + row - tl.load(query_start + request)
    page = tl.load(page_table + request * table_stride + position // PAGE).to(tl.int64)
    return page * PAGE + position % PAGE


@jit
def _nearest(x: tensor, DROPPED: constexpr) -> tensor:
    """float32 without the last bits of its mantissa, to nearest even: where casts of the interpreter cut them off."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)) >> DROPPED << DROPPED
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@jit
def _kept(x: tensor, pool: tensor, UPCAST: constexpr) -> tensor:
    """float32 as a pool keeps it; FP8 takes its largest value for all beyond, NaN stays."""
    if pool.dtype.element_ty == tl.float8e4nv:
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
        if UPCAST:  # below 2^-6 its values are multiples of 2^-9
            x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, _nearest(x, 20))
    elif UPCAST and pool.dtype.element_ty == tl.bfloat16:
        x = _nearest(x, 16)
    return x.to(pool.dtype.element_ty)


@jit
def _copy_rows(
    rows: tensor,  # [tokens, LORA + ROPE]
    row_stride: tensor,
    latents: tensor,  # [pages, PAGE, LORA], rows apart by LATENT_STRIDE
    keys: tensor,  # [pages, PAGE, ROPE], by KEY_STRIDE
    page_table: tensor,
    table_stride: tensor,
    seq_len: tensor,
    query_start: tensor,
    requests: tensor,
    LORA: constexpr,
    LORA_PAD: constexpr,
    ROPE: constexpr,
    ROPE_PAD: constexpr,
    LATENT_STRIDE: constexpr,
    KEY_STRIDE: constexpr,
    PAGE: constexpr,
    REQUESTS_PAD: constexpr,
    UPCAST: constexpr,
) -> None:
    row = tl.program_id(0)
    request = _owner(query_start, requests, row, REQUESTS_PAD)
    if request == requests:
        return
    slot = _slot(page_table, table_stride, seq_len, query_start, request, row, PAGE)
    source = rows + row.to(tl.int64) * row_stride
    d = tl.arange(0, LORA_PAD)
    x = tl.load(source + d, mask=d < LORA, other=0.0).to(tl.float32)
    tl.store(latents + slot * LATENT_STRIDE + d, _kept(x, latents, UPCAST), mask=d < LORA)
    e = tl.arange(0, ROPE_PAD)
    x = tl.load(source + LORA + e, mask=e < ROPE, other=0.0).to(tl.float32)
    tl.store(keys + slot * KEY_STRIDE + e, _kept(x, keys, UPCAST), mask=e < ROPE)


@jit
def _write_rows(
    kv: tensor,  # [tokens, LORA + ROPE], as projected
    kv_stride: tensor,
    q_rope: tensor,  # [tokens, HEADS, ROPE], as projected
    q_token_stride: tensor,
    q_head_stride: tensor,
    q_rotated: tensor,  # [tokens, HEADS, ROPE], contiguous
    norm: tensor,  # [LORA]
    cos: tensor,  # [tokens, ROPE] or [tokens, ROPE / 2]
    sin: tensor,
    cos_stride: tensor,
    sin_stride: tensor,
    cos_step: tensor,  # from one to the next of a token: 2 where complex numbers hold them
    sin_step: tensor,
    eps: tensor,
    latents: tensor,  # [pages, PAGE, LORA], rows apart by LATENT_STRIDE
    keys: tensor,  # [pages, PAGE, ROPE], by KEY_STRIDE
    page_table: tensor,
    table_stride: tensor,
    seq_len: tensor,
    query_start: tensor,
    requests: tensor,
    HEADS: constexpr,
    LORA: constexpr,
    LORA_PAD: constexpr,
    ROPE: constexpr,
    HALF_PAD: constexpr,
    LATENT_STRIDE: constexpr,
    KEY_STRIDE: constexpr,
    PAGE: constexpr,
    REQUESTS_PAD: constexpr,
    INTERLEAVED: constexpr,
    IN_PLACE: constexpr,
    HEAD_BLOCK: constexpr,
    UPCAST: constexpr,
) -> None:
    """Program (row, 0) stores the latent and the key of a row; program (row, 1 + b) rotates block b of its heads."""
    row = tl.program_id(0)
    half = ROPE // 2
    i = tl.arange(0, HALF_PAD)
    pair = i < half
    first = 2 * i if INTERLEAVED else i
    second = 2 * i + 1 if INTERLEAVED else i + half
    to_first = first if IN_PLACE else i
    to_second = second if IN_PLACE else i + half
    # The second half of cos and sin, if there is one, repeats the first.
    c = tl.load(cos + row.to(tl.int64) * cos_stride + i * cos_step, mask=pair, other=0.0).to(tl.float32)
    s = tl.load(sin + row.to(tl.int64) * sin_stride + i * sin_step, mask=pair, other=0.0).to(tl.float32)

    if tl.program_id(1) > 0:
        head = (tl.program_id(1) - 1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
        mask = (head < HEADS)[:, None] & pair[None, :]
        source = q_rope + row.to(tl.int64) * q_token_stride + head[:, None] * q_head_stride
        a = tl.load(source + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + second[None, :], mask=mask, other=0.0).to(tl.float32)
        to = q_rotated + (row.to(tl.int64) * HEADS + head)[:, None] * ROPE
        kept = q_rotated.dtype.element_ty
        tl.store(to + to_first[None, :], (a * c[None, :] - b * s[None, :]).to(kept), mask=mask)
        tl.store(to + to_second[None, :], (b * c[None, :] + a * s[None, :]).to(kept), mask=mask)
        return

    request = _owner(query_start, requests, row, REQUESTS_PAD)
    if request == requests:
        return
    slot = _slot(page_table, table_stride, seq_len, query_start, request, row, PAGE)
    source = kv + row.to(tl.int64) * kv_stride
    d = tl.arange(0, LORA_PAD)
    x = tl.load(source + d, mask=d < LORA, other=0.0).to(tl.float32)
    w = tl.load(norm + d, mask=d < LORA, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / LORA + eps) * w
    tl.store(latents + slot * LATENT_STRIDE + d, _kept(x, latents, UPCAST), mask=d < LORA)
    a = tl.load(source + LORA + first, mask=pair, other=0.0).to(tl.float32)
    b = tl.load(source + LORA + second, mask=pair, other=0.0).to(tl.float32)
    to = keys + slot * KEY_STRIDE
    tl.store(to + to_first, _kept(a * c - b * s, keys, UPCAST), mask=pair)
    tl.store(to + to_second, _kept(b * c + a * s, keys, UPCAST), mask=pair)


@jit
def _attend(
    q_latent: tensor,  # [tokens, HEADS, LORA]
    q_latent_token_stride: tensor,
    q_latent_head_stride: tensor,
    q_rope: tensor,  # [tokens, HEADS, ROPE]
    q_rope_token_stride: tensor,
    q_rope_head_stride: tensor,
    latents: tensor,  # [pages, PAGE, LORA], rows apart by LATENT_STRIDE
    keys: tensor,  # [pages, PAGE, ROPE], by KEY_STRIDE
    page_table: tensor,
    table_stride: tensor,
    seq_len: tensor,
    query_start: tensor,
    out: tensor,  # [tokens, HEADS, LORA]; unused if SPLITS > 1
    partial: tensor,  # [SPLITS, tokens, HEADS, LORA] float32; unused if SPLITS == 1
    lse: tensor,  # [SPLITS, tokens, HEADS] float32, base 2; likewise
    scale_log2: tensor,  # scale * log2(e)
    tokens: tensor,
    requests: tensor,
    HEADS: constexpr,
    LORA: constexpr,
    LORA_PAD: constexpr,
    ROPE: constexpr,
    ROPE_PAD: constexpr,
    LATENT_STRIDE: constexpr,
    KEY_STRIDE: constexpr,
    PAGE: constexpr,
    REQUESTS_PAD: constexpr,
    ROWS: constexpr,
    KEYS: constexpr,
    SPLITS: constexpr,
    STAGES: constexpr,
    UPCAST: constexpr,
    PRECISION: constexpr,
) -> None:
    """Program (b, split): block b of the rows, over one part of its request's context.

    A block holds rows of one request only. Blocks are numbered without a host loop: request r begins at block
    `query_start[r] * HEADS // ROWS + r`, which leaves each enough of them; spare ones return. If ROWS divides HEADS no
    request begins inside a block, and the `+ r` falls away. Padding rows are the last, virtual request, with context 0.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    i = tl.arange(0, REQUESTS_PAD)
    begin = tl.load(query_start + i, mask=i <= requests, other=0) * HEADS // ROWS
    if HEADS % ROWS != 0:
        begin += i
    request = tl.sum(((i <= requests) & (begin <= block)).to(tl.int32), 0) - 1

    owned = request < requests
    start = tl.load(query_start + request)
    end = tl.load(query_start + request + 1, mask=owned, other=tokens)
    stored = tl.load(seq_len + request, mask=owned, other=0)
    own_begin = start * HEADS // ROWS
    if HEADS % ROWS != 0:
        own_begin += request
    row = (block - own_begin) * ROWS + tl.arange(0, ROWS)
    query = row // HEADS
    head = row % HEADS
    live = query < end - start
    if (block - own_begin) * ROWS >= (end - start) * HEADS:
        return
    limit = tl.where(live & owned, stored + query + 1, 0)  # [ROWS] positions each row may see
    context = tl.max(limit, 0)

    d = tl.arange(0, LORA_PAD)
    e = tl.arange(0, ROPE_PAD)
    d_ok = (d < LORA)[None, :]
    e_ok = (e < ROPE)[None, :]
    token = (start + query).to(tl.int64)
    at = q_latent + (token * q_latent_token_stride + head * q_latent_head_stride)[:, None] + d[None, :]
    ql = tl.load(at, mask=live[:, None] & d_ok, other=0.0)
    at = q_rope + (token * q_rope_token_stride + head * q_rope_head_stride)[:, None] + e[None, :]
    qr = tl.load(at, mask=live[:, None] & e_ok, other=0.0)
    if UPCAST:
        ql = ql.to(tl.float32)
        qr = qr.to(tl.float32)

    top = tl.full([ROWS], float("-inf"), tl.float32)  # running maximum
    total = tl.zeros([ROWS], tl.float32)  # running sum of exp2(score - top)
    mixed = tl.zeros([ROWS, LORA_PAD], tl.float32)
    part = tl.cdiv(tl.cdiv(context, KEYS), SPLITS) * KEYS  # whole key blocks, so that none straddles two pages
    lo = split * part
    hi = tl.minimum(lo + part, context)
    for base in tl.range(lo, hi, KEYS, num_stages=STAGES):
        position = base + tl.arange(0, KEYS)
        inside = position < hi
        if PAGE % KEYS == 0:
            page = tl.load(page_table + request * table_stride + base // PAGE).to(tl.int64)
            slot = page * PAGE + base % PAGE + tl.arange(0, KEYS)
        else:
            page = tl.load(page_table + request * table_stride + position // PAGE, mask=inside, other=0).to(tl.int64)
            slot = page * PAGE + position % PAGE
        cached = latents + (slot * LATENT_STRIDE)[:, None] + d[None, :]
        latent = tl.load(cached, mask=inside[:, None] & d_ok, other=0.0).to(ql.dtype)  # [KEYS, LORA_PAD]
        own = keys + (slot * KEY_STRIDE)[:, None] + e[None, :]
        key = tl.load(own, mask=inside[:, None] & e_ok, other=0.0).to(ql.dtype)
        scores = tl.dot(ql, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(qr, tl.trans(key), acc=scores, input_precision=PRECISION) * scale_log2
        scores = tl.where(position[None, :] < limit[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet: no inf - inf
        weight = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(latent.dtype), latent, acc=mixed * fade[:, None], input_precision=PRECISION)
        top = new_top

    seen = total > 0
    mixed = mixed / tl.where(seen, total, 1.0)[:, None]
    flat = token * HEADS + head
    if SPLITS == 1:
        tl.store(out + flat[:, None] * LORA + d[None, :], mixed.to(out.dtype.element_ty), mask=live[:, None] & d_ok)
    else:
        flat += split.to(tl.int64) * tokens * HEADS
        tl.store(lse + flat, tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf")), mask=live)
        # A part without a visible key leaves no partial: its weight in the merge is zero.
        tl.store(partial + flat[:, None] * LORA + d[None, :], mixed, mask=(live & seen)[:, None] & d_ok)


@jit
def _merge(
    partial: tensor,
    lse: tensor,
    out: tensor,
    rows: tensor,  # tokens * heads
    LORA: constexpr,
    COLUMNS: constexpr,
    SPLITS: constexpr,
    SPLITS_PAD: constexpr,
) -> None:
    """Program (row, block of columns): the partial results weighted by exp2(lse); zeros if all are empty."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, SPLITS_PAD).to(tl.int64) * rows + row
    inside = tl.arange(0, SPLITS_PAD) < SPLITS
    score = tl.load(lse + at, mask=inside, other=float("-inf"))
    x = tl.load(partial + at[:, None] * LORA + d[None, :], mask=inside[:, None] & (d < LORA)[None, :], other=0.0)
    top = tl.max(score, 0)
    weight = tl.exp2(score - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total > 0, total, 1.0)
    x = tl.where((weight > 0)[:, None], x, 0.0)  # of a part that has seen nothing, nothing was written
    tl.store(out + row * LORA + d, tl.sum(x * weight[:, None], 0).to(out.dtype.element_ty), mask=d < LORA)


# --------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Tiles:
    """How `mla_attend` cuts its work; any choice gives the same answer, at another speed."""

    rows: int  # (query, head) pairs a program; a power of two, at least 16 (the tensor cores' smallest)
    keys: int  # cache rows a step of its loop; likewise
    splits: int  # parts of the context; at least 1
    warps: int
    stages: int  # of the software pipeline over the cache: shared memory holds `stages` blocks of keys
    gluon: bool = False  # the kernel of `gluon_mla`, which takes 64 rows, 64 keys and `gluon_mla.WARPS`


@dataclass(frozen=True)
class Processors:
    """What the choice of tiles needs to know of a GPU."""

    count: int  # multiprocessors
    shared_bytes: int  # largest shared memory of one block


def choose_tiles(
    tokens: int,
    requests: int,
    heads: int,
    width: int,
    itemsize: int,
    max_context: int,
    max_queries: int,
    processors: Processors,
    gluon: bool = False,
) -> Tiles:
    """Tiles for a step, from what the host knows without waiting: shapes and bounds, never a length.

    `width` is lora + rope, each rounded up to a power of two; `itemsize` the queries' bytes an element. `gluon`:
    `gluon_mla` takes the step, if it has enough rows.
    """
    rows = min(64, max(16, _power_of_two(max_queries * heads)))
    gluon = gluon and rows == gluon_mla.ROWS
    keys, stages = (64 if rows == 64 else 32), 2
    if itemsize > 2:  # float32 is for tests: no tensor core, twice the bytes
        rows, keys, stages = 16, 16, 1
    # The queries and the pipeline's keys share it: on Hopper 64 + 2 x 64 rows of 576 just fit, on Ada 32 + 2 x 16 do.
    free_bytes = processors.shared_bytes - 8192
    while (rows + keys * stages) * width * itemsize > free_bytes and max(rows, keys) > 16:
        rows, keys = (rows, keys // 2) if keys >= rows else (rows // 2, keys)
    blocks = max(1, min(tokens * heads // rows + requests, tokens * -(-heads // rows)))
    # One wave of programs, each with at least two steps; a power of two, so that few variants are compiled.
    splits = max(1, min(processors.count // blocks, max_context // (2 * keys), 128))
    warps = gluon_mla.WARPS if gluon else 4 if rows == 16 else 8
    return Tiles(rows, keys, 1 << (splits.bit_length() - 1), warps, stages, gluon)


def latent_append(pool: Tensor, page_table: Tensor, seq_len: Tensor, query_start: Tensor, rows: Tensor) -> None:
    """Write row `i` of request `r` at position `seq_len[r] + i`; `rows` is `[tokens, lora + rope]`."""
    _check_cache(pool, page_table, seq_len, query_start)
    # The width of a pool of bytes says where keys begin; in any other, all values are alike.
    rope = pool.shape[2] - rows.shape[-1]
    lora = rows.shape[-1] - rope
    if rows.dim() != 2 or rows.stride(1) != 1 or _width(pool, lora, rope) != pool.shape[2] or min(lora, rope) < 0:
        width = f"{pool.shape[2]}" if pool.dtype != torch.uint8 else "lora + rope"
        raise ValueError(f"rows must be [tokens, {width}] with contiguous rows, not {_describe(rows)}")
    latents, keys = unpacked(pool, lora)
    if rows.shape[0] == 0 or seq_len.shape[0] == 0:
        return
    with torch.cuda.device(pool.get_device()):
        _copy_rows[(rows.shape[0],)](
            rows, rows.stride(0), latents, keys, page_table, page_table.stride(0), seq_len, query_start,
            seq_len.shape[0], LORA=lora, LORA_PAD=_power_of_two(lora), ROPE=rope, ROPE_PAD=_power_of_two(rope),
            LATENT_STRIDE=latents.stride(1), KEY_STRIDE=keys.stride(1), PAGE=pool.shape[1],
            REQUESTS_PAD=_power_of_two(seq_len.shape[0] + 1), UPCAST=interpreted(),
        )  # fmt: skip


def latent_write(
    kv: Tensor,  # [tokens, lora + rope]: kv_a_proj_with_mqa of the hidden state
    q_rope: Tensor,  # [tokens, heads, rope]
    norm: Tensor,  # [lora]: kv_a_layernorm
    cos: Tensor,  # [tokens, rope]: two equal halves; or [tokens, rope / 2], any strides
    sin: Tensor,
    shape: MLAShape,
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
) -> Tensor:
    """Normalise the latents, rotate keys and queries, append latents and keys; returns the rotated queries."""
    _check_cache(pool, page_table, seq_len, query_start)
    tokens, heads, rope = q_rope.shape
    width = shape.lora + rope
    if pool.shape[2] != _width(pool, shape.lora, rope) or kv.shape != (tokens, width) or rope != shape.rope:
        raise ValueError(f"{shape} does not fit kv {_describe(kv)}, q_rope {_describe(q_rope)}, pool {_describe(pool)}")
    if cos.shape not in ((tokens, rope), (tokens, rope // 2)) or sin.shape != cos.shape or cos.is_complex():
        raise ValueError(
            f"cos and sin must be real [{tokens}, {rope} or {rope // 2}], not {_describe(cos)} and {_describe(sin)}"
        )
    if kv.stride(1) != 1 or q_rope.stride(2) != 1:
        raise ValueError("the last dimension of kv and q_rope must be contiguous")
    rotated = torch.empty_like(q_rope, memory_format=torch.contiguous_format)
    if tokens == 0 or seq_len.shape[0] == 0:
        return rotated.zero_()
    latents, keys = unpacked(pool, shape.lora)
    head_block = min(32, _power_of_two(heads))
    with torch.cuda.device(pool.get_device()):
        _write_rows[(tokens, 1 + -(-heads // head_block))](
            kv, kv.stride(0), q_rope, q_rope.stride(0), q_rope.stride(1), rotated, norm, cos, sin,
            cos.stride(0), sin.stride(0), cos.stride(1), sin.stride(1), shape.eps,
            latents, keys, page_table, page_table.stride(0), seq_len, query_start, seq_len.shape[0],
            HEADS=heads, LORA=shape.lora, LORA_PAD=_power_of_two(shape.lora), ROPE=rope,
            LATENT_STRIDE=latents.stride(1), KEY_STRIDE=keys.stride(1),
            HALF_PAD=_power_of_two(rope // 2), PAGE=pool.shape[1], REQUESTS_PAD=_power_of_two(seq_len.shape[0] + 1),
            INTERLEAVED=shape.interleaved, IN_PLACE=shape.in_place, HEAD_BLOCK=head_block, UPCAST=interpreted(),
        )  # fmt: skip
    return rotated


def mla_attend(
    q_latent: Tensor,  # [tokens, heads, lora]
    q_rope: Tensor,  # [tokens, heads, rope]
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
    scale: float,
    out: Tensor | None = None,
    *,
    max_queries: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attention of query `i` of request `r` over the positions `0 .. seq_len[r] + i`, `[tokens, heads, lora]`.

    The step's own rows are already in the pool. `max_queries` (1 in decode; default: all tokens may be one request's)
    only chooses the tiles: a wrong value costs time, never correctness.
    """
    _check_cache(pool, page_table, seq_len, query_start)
    tokens, heads, lora = q_latent.shape
    rope = q_rope.shape[2]
    requests = seq_len.shape[0]
    if q_rope.shape[:2] != (tokens, heads) or pool.shape[2] != _width(pool, lora, rope):
        raise ValueError(f"q_latent {_describe(q_latent)}, q_rope {_describe(q_rope)}: not of pool {_describe(pool)}")
    if q_rope.dtype != q_latent.dtype or pool.dtype not in (q_latent.dtype, torch.uint8):
        raise ValueError(f"queries are {q_latent.dtype} and {q_rope.dtype}, the pool is {pool.dtype}: must be equal")
    if q_latent.stride(2) != 1 or q_rope.stride(2) != 1:
        raise ValueError("the last dimension of q_latent and q_rope must be contiguous")
    if out is None:
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    if out.shape != q_latent.shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous [{tokens}, {heads}, {lora}], not {_describe(out)}")
    if tokens == 0 or requests == 0:
        return out.zero_()
    if tiles is None:
        context = page_table.shape[1] * pool.shape[1]
        most = tokens if max_queries is None else max_queries
        width = _power_of_two(lora) + _power_of_two(rope)
        device = pool.get_device()
        gluon = gluon_mla.fits(q_latent, q_rope, pool) and gluon_mla.refuses(device) is None
        here = processors_of(device)
        tiles = choose_tiles(tokens, requests, heads, width, q_latent.itemsize, context, most, here, gluon)

    latents, keys = unpacked(pool, lora)
    blocks = tokens * heads // tiles.rows + (requests + 1 if heads % tiles.rows else 0)
    kept = (tiles.splits, tokens, heads) if tiles.splits > 1 else (0, 0, 0)
    partial = torch.empty(*kept, lora, dtype=torch.float32, device=pool.device)
    lse = torch.empty(kept, dtype=torch.float32, device=pool.device)
    queries = q_latent, q_latent.stride(0), q_latent.stride(1), q_rope, q_rope.stride(0), q_rope.stride(1)
    arguments = (
        page_table, page_table.stride(0), seq_len, query_start, out, partial, lse, scale * 1.4426950408889634, tokens,
        requests,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "HEADS": heads, "LORA": lora, "ROPE": rope, "PAGE": pool.shape[1], "REQUESTS_PAD": _power_of_two(requests + 1),
        "ROWS": tiles.rows, "KEYS": tiles.keys, "SPLITS": tiles.splits, "num_warps": tiles.warps,
    }  # fmt: skip
    with torch.cuda.device(pool.get_device()):
        if tiles.gluon:
            cache = gluon_mla.rows(latents), gluon_mla.rows(keys)
            gluon_mla.attend[(blocks, tiles.splits)](*queries, *cache, *arguments, **constants)
        else:
            _attend[(blocks, tiles.splits)](
                *queries, latents, keys, *arguments, **constants, LATENT_STRIDE=latents.stride(1),
                KEY_STRIDE=keys.stride(1), LORA_PAD=_power_of_two(lora), ROPE_PAD=_power_of_two(rope),
                STAGES=tiles.stages, UPCAST=interpreted(), PRECISION="ieee",
            )  # fmt: skip
        if tiles.splits == 1:
            return out
        padded = max(2, _power_of_two(tiles.splits))
        columns = max(16, min(_power_of_two(lora), 8192 // padded))
        _merge[(tokens * heads, -(-lora // columns))](
            partial, lse, out, tokens * heads, LORA=lora, COLUMNS=columns, SPLITS=tiles.splits, SPLITS_PAD=padded
        )
    return out


def absorb(kv_b: Tensor, shape: MLAShape) -> tuple[Tensor, Tensor]:
    """Split kv_b_proj `[heads * (nope + v), lora]` into w_uk `[heads, nope, lora]` and w_uv `[heads, v, lora]`.

    Views: a batched product reads them as they lie, so the weight is stored once.
    """
    w_uk, w_uv = kv_b.view(shape.heads, shape.nope + shape.v, shape.lora).split_with_sizes([shape.nope, shape.v], 1)
    return w_uk, w_uv


def mla(
    hidden: Tensor,  # [..., H], flattened to [tokens, H]
    cos: Tensor,  # [..., rope]
    sin: Tensor,
    weights: Mapping[str, Any],
    shape: MLAShape,
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
    *,
    max_queries: int | None = None,
    project: Callable[[Any, Any, Tensor | None], Tensor] = functional.linear,
    share: Callable[[Tensor], Any] = torch.Tensor.detach,
    attend: Callable[..., Tensor] = mla_attend,
    expanded: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The whole attention block; arguments as of `mla_reference`, result shaped like `hidden`.

    `project(x, weight, bias)` computes the projections from weights of its own kind; those of norms, biases and
    `kv_b_proj` are tensors. `share(x)` is what `project` takes for an x that meets several weights. Instead of
    `kv_b_proj`, `weights` may hold its two parts as `w_uk` and `w_uv`. `attend` takes the arguments of `mla_attend`.
    `expanded`, where it is given, takes those of `triton_mla_expanded.attend_expanded` instead.
    """
    x = hidden.reshape(-1, hidden.shape[-1])
    cos, sin = parts_of(cos, sin)

    def linear(x: Any, role: str) -> Tensor:
        return project(x, weights[role], weights.get(f"{role}.bias"))

    both = share(x)
    if "q_proj" in weights:
        query = linear(both, "q_proj")
    else:
        norm = weights["q_a_layernorm"]
        query = linear(functional.rms_norm(linear(both, "q_a_proj"), norm.shape, norm, shape.eps), "q_b_proj")
    q_nope, q_rope = query.view(x.shape[0], shape.heads, -1).split_with_sizes([shape.nope, shape.rope], -1)
    kv = linear(both, "kv_a_proj_with_mqa")
    cache = (pool, page_table, seq_len, query_start)
    q_rope = latent_write(kv, q_rope, weights["kv_a_layernorm"], cos, sin, shape, *cache)

    absorbed = "w_uk" in weights
    w_uk, w_uv = (weights["w_uk"], weights["w_uv"]) if absorbed else absorb(weights["kv_b_proj"], shape)
    if expanded is not None:
        values = expanded(q_nope, q_rope, w_uk, w_uv, *cache, shape.scale)
        return linear(values.reshape(x.shape[0], -1), "o_proj").view(hidden.shape)
    q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)  # [tokens, heads, lora]
    mixed = attend(q_latent, q_rope, *cache, shape.scale, max_queries=max_queries)
    values = torch.bmm(mixed.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)  # [tokens, heads, v]
    return linear(values.reshape(x.shape[0], -1), "o_proj").view(hidden.shape)


def _width(pool: Tensor, lora: int, rope: int) -> int:
    """Elements of a row of this pool: a pool of bytes has two for each of a key."""
    return lora + rope * (2 if pool.dtype == torch.uint8 else 1)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@cache
def processors_of(device: int) -> Processors:
    """Of the CUDA device with this index."""
    if device < 0:  # the interpreter: any numbers do
        return Processors(8, 227 << 10)
    found = torch.cuda.get_device_properties(device)
    return Processors(found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", 99 << 10))


def _describe(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} with strides {list(t.stride())}"


def _check_cache(pool: Tensor, page_table: Tensor, seq_len: Tensor, query_start: Tensor) -> None:
    why = unavailable()
    if why is not None:
        raise RuntimeError(f"Triton MLA kernels cannot run: {why}")
    if pool.dim() != 3 or not pool.is_contiguous():
        raise ValueError(f"pool must be contiguous [pages, page, lora + rope], not {_describe(pool)}")
    if page_table.dim() != 2 or page_table.shape[0] != seq_len.shape[0] or page_table.stride(1) != 1:
        raise ValueError(f"page_table must be [{seq_len.shape[0]}, P], not {_describe(page_table)}")
    if query_start.shape != (seq_len.shape[0] + 1,):
        raise ValueError(f"query_start must be [{seq_len.shape[0] + 1}], not {_describe(query_start)}")
