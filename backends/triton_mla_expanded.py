"""Latent attention of prompts in its expanded form: keys and values of each head, and flash attention over them.

Keys and values of each head are made from the latents by kv_b. A pair of positions then costs `nope + rope + v`
multiply-adds a head (DeepSeek-V3: 320), in the absorbed form of `triton_mla` `2 * lora + rope` (1088). In return every
position of the context is expanded in every step: `lora * (nope + v)` multiply-adds a head.
`expands` says when that is less work. Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1), FlashAttention-2
(arXiv 2307.08691).

The context is taken in pieces, so that memory is bounded: `POSITIONS` at a time, those of all requests together.

    _gather   latents and keys of a piece, from pages to rows that lie together, from FP8 to the queries' type
    bmm       with both parts of kv_b: keys [heads, positions, nope] and values [heads, positions, v]
    _flash    one block of queries of one head, over the piece; it goes on from the result and the log-sum-exp that the
              piece before left, and a block whose last piece this is writes what is final

Pieces are as long for every request as for the longest, so a step with many requests expands much that nobody reads:
`expands` counts it, and above `MOST_REQUESTS` requests nothing is expanded.

Nothing here waits for the device: lengths are read there, the host knows shapes alone. A page table of more pages than
are in use costs time (`PagedCache.begin` cuts it to those in use), never correctness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktcompile.backends.triton_language import constexpr, jit, tensor, tl
from ktcompile.backends.triton_mla import (
    Processors,
    _check_cache,
    _power_of_two,
    _width,
    interpreted,
    processors_of,
)
from ktcompile.ops.mla import MLAShape, unpacked

POSITIONS = 4096
"""Most positions that are expanded at once: 270 MB of keys and values of DeepSeek-V3 (66 KB each).

Each piece but the first reads the result so far, and each but the last writes it (float32; 64 KB a token): at 4096
positions that is 5 % of the time, and all of a prompt of 2048 tokens takes less memory than in the absorbed form.
"""

MOST_REQUESTS = 16
"""In a step of more, all attend in the absorbed form."""

GRAIN = 128
"""Pieces are multiples of this, and so of every block of keys: no load of keys or values needs a mask."""


def expands(tokens: int, requests: int, context: int, shape: MLAShape) -> bool:
    """Whether a step of `tokens` rows is less work in the expanded form, by what the host knows.

    `context`: the most positions a request may have (`page_table.shape[1]` pages). Multiply-adds a head:

        expanded   rows * context * (nope + rope + v)  +  requests * context * lora * (nope + v)
        absorbed   tokens * context * (2 * lora + rope)  +  tokens * lora * (nope + v)

    `rows` are tokens in whole blocks of queries. Causality takes the same part of the pairs in both forms. One request
    of DeepSeek-V3 is expanded from 167 to 196 tokens on, by its context; from 40 on, where nothing is stored.
    """
    if shape.absorb or tokens <= requests or requests > MOST_REQUESTS:
        return False
    up = shape.lora * (shape.nope + shape.v)
    block = min(128, max(16, _power_of_two(tokens)))
    rows = -(-tokens // block) * block
    expanded = rows * context * (shape.nope + shape.rope + shape.v) + requests * context * up
    return expanded < tokens * context * (2 * shape.lora + shape.rope) + tokens * up


def piece_of(requests: int, context: int) -> int:
    """Positions of each request that are expanded at once, a multiple of GRAIN."""
    return max(GRAIN, min(-(-context // GRAIN) * GRAIN, POSITIONS // requests // GRAIN * GRAIN))


def expanded_bytes(tokens: int, requests: int, context: int, shape: MLAShape, itemsize: int) -> int:
    """Most bytes that `attend_expanded` allocates, its result included."""
    piece = piece_of(requests, context)
    position = shape.lora + shape.rope + shape.heads * (shape.nope + shape.v)
    carried = 4 * (shape.v + 1) if piece < context else 0
    return requests * piece * position * itemsize + tokens * shape.heads * (shape.v * itemsize + carried)


# ---------------------------------------------------------------------------------------------------------- kernels


@jit
def _gather(
    latents: tensor,  # [pages, PAGE, LORA], rows apart by LATENT_STRIDE
    keys: tensor,  # [pages, PAGE, ROPE], by KEY_STRIDE
    page_table: tensor,
    table_stride: tensor,
    seq_len: tensor,
    query_start: tensor,
    out_latents: tensor,  # [requests, piece, LORA]
    out_keys: tensor,  # [requests, piece, ROPE]
    first: tensor,  # position of the piece
    piece: tensor,
    LORA: constexpr,
    LORA_PAD: constexpr,
    ROPE: constexpr,
    ROPE_PAD: constexpr,
    LATENT_STRIDE: constexpr,
    KEY_STRIDE: constexpr,
    PAGE: constexpr,
    BLOCK: constexpr,
) -> None:
    """Program (b, request): block b of the piece's positions. Those past the context become zeros: 0 * NaN is NaN."""
    request = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(query_start + request + 1) - tl.load(query_start + request)
    context = tl.where(count > 0, tl.load(seq_len + request) + count, 0)
    position = first + at
    inside = position < context
    page = tl.load(page_table + request * table_stride + position // PAGE, mask=inside, other=0).to(tl.int64)
    slot = page * PAGE + position % PAGE
    to = request.to(tl.int64) * piece + at
    d = tl.arange(0, LORA_PAD)
    e = tl.arange(0, ROPE_PAD)
    d_ok = (d < LORA)[None, :]
    e_ok = (e < ROPE)[None, :]
    source = latents + (slot * LATENT_STRIDE)[:, None] + d[None, :]
    x = tl.load(source, mask=inside[:, None] & d_ok, other=0.0).to(tl.float32)
    tl.store(out_latents + (to * LORA)[:, None] + d[None, :], x.to(out_latents.dtype.element_ty), mask=d_ok)
    source = keys + (slot * KEY_STRIDE)[:, None] + e[None, :]
    x = tl.load(source, mask=inside[:, None] & e_ok, other=0.0).to(tl.float32)
    tl.store(out_keys + (to * ROPE)[:, None] + e[None, :], x.to(out_keys.dtype.element_ty), mask=e_ok)


@jit
def _rows(start: tensor, row: tensor, WIDTH: constexpr, PAD: constexpr, UPCAST: constexpr) -> tensor:
    """Rows of a contiguous matrix `[.., WIDTH]`, with zeros up to PAD columns. All rows exist."""
    d = tl.arange(0, PAD)
    at = start + row[:, None] * WIDTH + d[None, :]
    x = tl.load(at) if WIDTH == PAD else tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@jit
def _over(
    lo: tensor,
    hi: tensor,
    limit: tensor,  # [ROWS] positions of the piece that each row may see
    qn: tensor,
    qr: tensor,
    k_nope: tensor,
    k_rope: tensor,
    values: tensor,
    top: tensor,
    total: tensor,
    mixed: tensor,
    scale_log2: tensor,
    NOPE: constexpr,
    NOPE_PAD: constexpr,
    ROPE: constexpr,
    ROPE_PAD: constexpr,
    V: constexpr,
    V_PAD: constexpr,
    KEYS: constexpr,
    STAGES: constexpr,
    MASKED: constexpr,
    UPCAST: constexpr,
    PRECISION: constexpr,
) -> tensor:
    """The online softmax over rows `lo .. hi` of the piece. Every row sees one of them, or saw one before."""
    for base in tl.range(lo, hi, KEYS, num_stages=STAGES):
        row = base + tl.arange(0, KEYS)
        k = _rows(k_nope, row, NOPE, NOPE_PAD, UPCAST)
        scores = tl.dot(qn, tl.trans(k), input_precision=PRECISION)
        k = _rows(k_rope, row, ROPE, ROPE_PAD, UPCAST)
        scores = tl.dot(qr, tl.trans(k), acc=scores, input_precision=PRECISION)
        if MASKED:
            scores = tl.where(row[None, :] < limit[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weight = tl.exp2(scores * scale_log2 - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        v = _rows(values, row, V, V_PAD, UPCAST)
        mixed = tl.dot(weight.to(v.dtype), v, acc=mixed * fade[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, mixed


@jit
def _flash(
    q_nope: tensor,  # [tokens, heads, NOPE]
    q_nope_token_stride: tensor,
    q_nope_head_stride: tensor,
    q_rope: tensor,  # [tokens, heads, ROPE]
    q_rope_token_stride: tensor,
    q_rope_head_stride: tensor,
    k_nope: tensor,  # [heads, requests, piece, NOPE]
    k_rope: tensor,  # [requests, piece, ROPE]
    values: tensor,  # [heads, requests, piece, V]
    seq_len: tensor,
    query_start: tensor,
    out: tensor,  # [tokens, heads, V]
    partial: tensor,  # [tokens, heads, V] float32, of the pieces before; unused if there is one piece
    lse: tensor,  # [tokens, heads] float32, base 2; likewise
    scale_log2: tensor,  # scale * log2(e), above 0
    tokens: tensor,
    requests: tensor,
    first: tensor,  # position of the piece
    piece: tensor,
    HEADS: constexpr,
    NOPE: constexpr,
    NOPE_PAD: constexpr,
    ROPE: constexpr,
    ROPE_PAD: constexpr,
    V: constexpr,
    V_PAD: constexpr,
    REQUESTS_PAD: constexpr,
    ROWS: constexpr,
    KEYS: constexpr,
    STAGES: constexpr,
    UPCAST: constexpr,
    PRECISION: constexpr,
) -> None:
    """Program (b, head): block b of the queries, over one piece of its request's context.

    Blocks are numbered as in `triton_mla._attend`: request r begins at block `query_start[r] // ROWS + r`, spare blocks
    return, padding rows are the last, virtual request. Blocks of one head run together: they share its keys and values.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, REQUESTS_PAD)
    begin = tl.load(query_start + i, mask=i <= requests, other=0) // ROWS + i
    request = tl.sum(((i <= requests) & (begin <= block)).to(tl.int32), 0) - 1
    owned = request < requests
    start = tl.load(query_start + request)
    end = tl.load(query_start + request + 1, mask=owned, other=tokens)
    lead = (block - start // ROWS - request) * ROWS  # the block's first row in its request
    if lead >= end - start:
        return
    i = tl.arange(0, ROWS)
    row = lead + i
    live = row < end - start
    token = (start + lead).to(
        tl.int64
    )  # 64 bits for the block, 32 within it, and HEADS known: the loop lacks registers
    e = tl.arange(0, V_PAD)
    out += (token * HEADS + head) * V
    partial += (token * HEADS + head) * V
    lse += token * HEADS + head
    at = i[:, None] * (HEADS * V) + e[None, :]
    at_ok = live[:, None] & (e < V)[None, :]
    if not owned:
        if first == 0:
            tl.store(out + at, tl.zeros([ROWS, V_PAD], tl.float32).to(out.dtype.element_ty), mask=at_ok)
        return

    stored = tl.load(seq_len + request)
    last = tl.minimum(stored + lead + ROWS, stored + end - start) - first  # what the block's last row may see
    if last <= 0:
        return
    seen = tl.minimum(stored + lead + 1 - first, piece)  # what all its rows may see; below 1: nothing
    hi = tl.minimum(last, piece).to(tl.int32)
    even = (tl.maximum(seen, 0) // KEYS * KEYS).to(tl.int32)
    limit = (stored + row + 1 - first).to(tl.int32)

    d = tl.arange(0, NOPE_PAD)
    q_nope += token * q_nope_token_stride + head * q_nope_head_stride
    ok = live[:, None] & (d < NOPE)[None, :]
    qn = tl.load(q_nope + i[:, None] * q_nope_token_stride + d[None, :], mask=ok, other=0.0)
    d = tl.arange(0, ROPE_PAD)
    q_rope += token * q_rope_token_stride + head * q_rope_head_stride
    ok = live[:, None] & (d < ROPE)[None, :]
    qr = tl.load(q_rope + i[:, None] * q_rope_token_stride + d[None, :], mask=ok, other=0.0)
    if UPCAST:
        qn = qn.to(tl.float32)
        qr = qr.to(tl.float32)

    goes_on = live & (tl.zeros([ROWS], tl.int32) + first > 0)  # the interpreter takes no scalar for a part of a mask
    top = tl.load(lse + i * HEADS, mask=goes_on, other=float("-inf"))
    total = tl.where(goes_on, 1.0, 0.0)
    mixed = tl.load(partial + at, mask=at_ok & goes_on[:, None], other=0.0)

    mine = head.to(tl.int64) * requests + request
    k_nope += mine * piece * NOPE
    k_rope += request.to(tl.int64) * piece * ROPE
    values += mine * piece * V
    top, total, mixed = _over(
        0, even, limit, qn, qr, k_nope, k_rope, values, top, total, mixed, scale_log2,
        NOPE, NOPE_PAD, ROPE, ROPE_PAD, V, V_PAD, KEYS, STAGES, False, UPCAST, PRECISION,
    )  # fmt: skip
    top, total, mixed = _over(
        even, hi, limit, qn, qr, k_nope, k_rope, values, top, total, mixed, scale_log2,
        NOPE, NOPE_PAD, ROPE, ROPE_PAD, V, V_PAD, KEYS, STAGES, True, UPCAST, PRECISION,
    )  # fmt: skip

    mixed = mixed / total[:, None]
    if last <= piece:
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=at_ok)
    else:
        tl.store(partial + at, mixed, mask=at_ok)
        tl.store(lse + i * HEADS, top + tl.log2(total), mask=live)


# --------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Blocks:
    """How `_flash` cuts its work; any choice gives the same answer, at another speed."""

    rows: int  # queries a program; a power of two, at least 16
    keys: int  # positions a step of its loop; likewise, at most GRAIN
    warps: int
    stages: int  # of the software pipeline: shared memory holds `stages` blocks of keys and values


def choose_blocks(tokens: int, key: int, value: int, itemsize: int, processors: Processors) -> Blocks:
    """Blocks for a step. `key` and `value` are the sizes of a head, in parts rounded up to powers of two."""
    if itemsize > 2:  # float32 is for tests
        return Blocks(16, 16, 4, 1)
    # 128 keys and 2 stages fit Hopper too, but not into registers (32 bytes of each thread are spilled).
    rows, keys, stages = min(128, max(16, _power_of_two(tokens))), 64, 3
    free_bytes = processors.shared_bytes - 8192
    while (rows * key + stages * keys * (key + value)) * itemsize > free_bytes and max(rows, keys) > 16:
        if stages > 2:
            stages = 2
        else:
            rows, keys = (rows, keys // 2) if keys >= rows // 2 else (rows // 2, keys)
    return Blocks(rows, keys, 8 if rows == 128 else 4, stages)


def attend_expanded(
    q_nope: Tensor,  # [tokens, heads, nope]
    q_rope: Tensor,  # [tokens, heads, rope], rotated
    w_uk: Tensor,  # [heads, nope, lora]
    w_uv: Tensor,  # [heads, v, lora]
    pool: Tensor,
    page_table: Tensor,
    seq_len: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    piece: int | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Values of query `i` of request `r` over the positions `0 .. seq_len[r] + i`, `[tokens, heads, v]`.

    What `mla_attend` computes of `q_nope @ w_uk`, times `w_uv`. The step's own rows are already in the pool. `scale` is
    above 0. `piece`, a multiple of GRAIN: positions of each request that are expanded at once. Raises ValueError.
    """
    _check_cache(pool, page_table, seq_len, query_start)
    (tokens, heads, nope), rope, (v, lora) = q_nope.shape, q_rope.shape[2], w_uv.shape[1:]
    requests, dtype = seq_len.shape[0], q_nope.dtype
    if q_rope.shape[:2] != (tokens, heads) or w_uk.shape != (heads, nope, lora) or w_uv.shape[0] != heads:
        sizes = [list(t.shape) for t in (q_nope, q_rope, w_uk, w_uv)]
        raise ValueError(f"q_nope, q_rope, w_uk and w_uv do not fit each other: {', '.join(map(str, sizes))}")
    if pool.shape[2] != _width(pool, lora, rope) or pool.dtype not in (dtype, torch.uint8):
        raise ValueError(f"pool {list(pool.shape)} {pool.dtype} is not one of {lora} and {rope} in {dtype} or uint8")
    if {q_rope.dtype, w_uk.dtype, w_uv.dtype} != {dtype}:
        raise ValueError(f"q_nope is {dtype}; q_rope, w_uk, w_uv are {q_rope.dtype}, {w_uk.dtype}, {w_uv.dtype}")
    if q_nope.stride(2) != 1 or q_rope.stride(2) != 1:
        raise ValueError("the last dimension of q_nope and q_rope must be contiguous")
    context = page_table.shape[1] * pool.shape[1]
    piece = piece_of(max(1, requests), context) if piece is None else piece
    if piece % GRAIN or piece < GRAIN:
        raise ValueError(f"piece is {piece}; it must be a multiple of {GRAIN}")
    out = q_nope.new_empty(tokens, heads, v)
    if tokens == 0 or requests == 0:
        return out.zero_()
    nope_pad, rope_pad, v_pad = (max(16, _power_of_two(n)) for n in (nope, rope, v))
    if blocks is None:
        here = processors_of(pool.get_device())
        blocks = choose_blocks(tokens, nope_pad + rope_pad, v_pad, dtype.itemsize, here)

    carried = (tokens, heads) if piece < context else (0, 0)
    partial = torch.empty(*carried, v, dtype=torch.float32, device=pool.device)
    lse = torch.empty(carried, dtype=torch.float32, device=pool.device)
    latents, keys = unpacked(pool, lora)
    own_latents, own_keys = (q_nope.new_empty(requests * piece, n) for n in (lora, rope))
    k_nope, values = (q_nope.new_empty(heads, requests * piece, n) for n in (nope, v))
    each = own_latents.expand(heads, -1, -1)  # every head reads the same: cuBLAS takes a stride of 0
    with torch.cuda.device(pool.get_device()):
        for first in range(0, context, piece):
            _gather[(piece // 16, requests)](
                latents, keys, page_table, page_table.stride(0), seq_len, query_start, own_latents, own_keys,
                first, piece, LORA=lora, LORA_PAD=_power_of_two(lora), ROPE=rope, ROPE_PAD=_power_of_two(rope),
                LATENT_STRIDE=latents.stride(1), KEY_STRIDE=keys.stride(1), PAGE=pool.shape[1], BLOCK=16,
            )  # fmt: skip
            torch.bmm(each, w_uk.transpose(1, 2), out=k_nope)
            torch.bmm(each, w_uv.transpose(1, 2), out=values)
            _flash[(tokens // blocks.rows + requests + 1, heads)](
                q_nope, q_nope.stride(0), q_nope.stride(1), q_rope, q_rope.stride(0), q_rope.stride(1),
                k_nope, own_keys, values, seq_len, query_start, out, partial, lse, scale * 1.4426950408889634,
                tokens, requests, first, piece, HEADS=heads,
                NOPE=nope, NOPE_PAD=nope_pad, ROPE=rope, ROPE_PAD=rope_pad, V=v, V_PAD=v_pad,
                REQUESTS_PAD=_power_of_two(requests + 1), ROWS=blocks.rows, KEYS=blocks.keys, STAGES=blocks.stages,
                UPCAST=interpreted(), PRECISION="ieee", num_warps=blocks.warps,
            )  # fmt: skip
    return out
