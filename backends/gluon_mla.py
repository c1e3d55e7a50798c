"""The kernel of `mla_attend` for Hopper GPUs, in Gluon: Triton with layouts and asynchronous products in our hands.

`triton_mla._attend` defines it and runs wherever this one does not; both take the same arguments and give the same
numbers. What the compiler does not do there, and is done here (64 rows, 64 keys a step, two groups of four warps):

- both groups share the scores of a step, 32 keys each; left to itself the compiler has each compute all of them
- the product of the weights with the latents and the scores of the next step are queued together, so that the tensor
  cores have work while the next rows of the cache are asked for
- which rows come is known a step ahead: the page table is never waited for

Gluon may change from one Triton to the next, so `refuses` also runs the kernel once and looks at what it gives.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ktcompile.backends.triton_language import async_copy, constexpr, gl, gluon_jit, hopper, tensor
from ktcompile.ops.mla import attend_reference

LORA, ROPE = 512, 64
"""The only sizes of a row that it is written for."""

ROWS, KEYS, WARPS = 64, 64, 8
"""(query, head) pairs a program, cache rows a step of its loop, warps."""

if async_copy is not None:
    _load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # until Triton 3.6
    _commit, _wait = async_copy.commit_group, async_copy.wait_group
    _barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    _fence, _mma, _mma_wait = hopper.fence_async_shared, hopper.warpgroup_mma, hopper.warpgroup_mma_wait


@gluon_jit
def _fetch(
    latents: tensor,
    keys: tensor,
    slot: tensor,  # [KEYS], as `to` is written
    slot_key: tensor,  # [KEYS], as `to_key` is
    to: tensor,  # [KEYS, LORA] shared
    to_key: tensor,  # [KEYS, ROPE]
    d: tensor,
    e: tensor,
    LATENT_STRIDE: constexpr,
    KEY_STRIDE: constexpr,
) -> None:
    _load(to, latents + (slot.to(gl.int64) * LATENT_STRIDE)[:, None] + d[None, :])
    _load(to_key, keys + (slot_key.to(gl.int64) * KEY_STRIDE)[:, None] + e[None, :])
    _commit()


@gluon_jit
def _slots(pages: tensor, position: tensor, hi: tensor, PAGE: constexpr) -> tensor:
    """The pool's rows of positions, int32; of those from `hi` on the last one again."""
    position = gl.minimum(position, hi - 1)
    return gl.load(pages + position // PAGE).to(gl.int32) * PAGE + position % PAGE


@gluon_jit
def attend(
    q_latent: tensor,  # arguments as of `triton_mla._attend`
    q_latent_token_stride: tensor,
    q_latent_head_stride: tensor,
    q_rope: tensor,
    q_rope_token_stride: tensor,
    q_rope_head_stride: tensor,
    latents: tensor,
    keys: tensor,
    page_table: tensor,
    table_stride: tensor,
    seq_len: tensor,
    query_start: tensor,
    out: tensor,
    partial: tensor,
    lse: tensor,
    scale_log2: tensor,
    tokens: tensor,
    requests: tensor,
    HEADS: constexpr,
    LORA: constexpr,
    ROPE: constexpr,
    LATENT_STRIDE: constexpr,
    KEY_STRIDE: constexpr,
    PAGE: constexpr,
    REQUESTS_PAD: constexpr,
    ROWS: constexpr,
    KEYS: constexpr,
    SPLITS: constexpr,
) -> None:
    """Launched with `WARPS` warps over (blocks of rows, splits)."""
    flat: constexpr = gl.BlockedLayout([1], [32], [8], [0])
    wide: constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    narrow: constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    of_scores: constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, KEYS // 2, 16])
    of_mixed: constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    of_weights: constexpr = gl.DotOperandLayout(0, of_mixed, 2)
    shared: constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: constexpr = q_latent.dtype.element_ty

    block = gl.program_id(0)
    split = gl.program_id(1)
    i = gl.arange(0, REQUESTS_PAD, flat)
    begin = gl.load(query_start + i, mask=i <= requests, other=0).to(gl.int32) * HEADS // ROWS
    if HEADS % ROWS != 0:
        begin += i
    request = gl.sum(((i <= requests) & (begin <= block)).to(gl.int32), 0) - 1

    owned = request < requests
    start = gl.load(query_start + request).to(gl.int32)
    end = gl.load(query_start + request + 1, mask=owned, other=tokens).to(gl.int32)
    stored = gl.load(seq_len + request, mask=owned, other=0).to(gl.int32)
    own_begin = start * HEADS // ROWS
    if HEADS % ROWS != 0:
        own_begin += request
    first = (block - own_begin) * ROWS
    count = (end - start) * HEADS
    if first >= count:
        return
    # The last row sees most.
    context = gl.where(owned, stored + gl.minimum(first + ROWS - 1, count - 1) // HEADS + 1, 0)

    d = gl.arange(0, LORA, gl.SliceLayout(0, wide))
    e = gl.arange(0, ROPE, gl.SliceLayout(0, narrow))
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    token = (start + row // HEADS).to(gl.int64)
    at = q_latent + (token * q_latent_token_stride + row % HEADS * q_latent_head_stride)[:, None] + d[None, :]
    ql = gl.allocate_shared_memory(dtype, [ROWS, LORA], shared, gl.load(at, mask=(row < count)[:, None], other=0.0))
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, narrow))
    token = (start + row // HEADS).to(gl.int64)
    at = q_rope + (token * q_rope_token_stride + row % HEADS * q_rope_head_stride)[:, None] + e[None, :]
    qr = gl.allocate_shared_memory(dtype, [ROWS, ROPE], shared, gl.load(at, mask=(row < count)[:, None], other=0.0))
    latent = gl.allocate_shared_memory(dtype, [2, KEYS, LORA], shared)
    key = gl.allocate_shared_memory(dtype, [2, KEYS, ROPE], shared)

    row_s = first + gl.arange(0, ROWS, gl.SliceLayout(1, of_scores))
    limit = gl.where((row_s < count) & owned, stored + row_s // HEADS + 1, 0)  # positions each row may see
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, of_scores))  # running maximum
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, of_scores))  # running sum of exp2(score - top)
    mixed = gl.full([ROWS, LORA], 0.0, gl.float32, of_mixed)
    part = gl.cdiv(gl.cdiv(context, KEYS), SPLITS) * KEYS
    lo = split * part
    hi = gl.minimum(lo + part, context)
    if lo < hi:
        pages = page_table + request * table_stride
        ahead = lo + gl.arange(0, KEYS, gl.SliceLayout(1, wide))
        ahead_key = lo + gl.arange(0, KEYS, gl.SliceLayout(1, narrow))
        for buffer in gl.static_range(2):
            slot = _slots(pages, ahead + buffer * KEYS, hi, PAGE)
            slot_key = _slots(pages, ahead_key + buffer * KEYS, hi, PAGE)
            _fetch(
                latents, keys, slot, slot_key, latent.index(buffer), key.index(buffer), d, e, LATENT_STRIDE, KEY_STRIDE
            )
        slot = _slots(pages, ahead + 2 * KEYS, hi, PAGE)
        slot_key = _slots(pages, ahead_key + 2 * KEYS, hi, PAGE)
        _wait(1)
        _fence()
        _barrier()
        zero = gl.full([ROWS, KEYS], 0.0, gl.float32, of_scores)
        scores = _mma(ql, latent.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = _mma(qr, key.index(0).permute((1, 0)), scores, is_async=True)
        score = _mma_wait(0, deps=[scores])
        buffer = 0
        for base in range(lo, hi, KEYS):
            position = base + gl.arange(0, KEYS, gl.SliceLayout(0, of_scores))
            score = gl.where(position[None, :] < limit[:, None], score * scale_log2, float("-inf"))
            new_top = gl.maximum(top, gl.max(score, 1))
            safe = gl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing: no inf - inf
            weight = gl.exp2(score - safe[:, None])
            fade = gl.exp2(top - safe)
            total = total * fade + gl.sum(weight, 1)
            top = new_top
            mixed = mixed * gl.convert_layout(fade, gl.SliceLayout(1, of_mixed))[:, None]
            operand = gl.convert_layout(weight.to(dtype), of_weights)
            product = _mma(operand, latent.index(buffer), mixed, is_async=True)

            other = 1 - buffer  # holds the next step's rows, or the last ones again
            _wait(0)
            _fence()
            _barrier()
            scores = _mma(ql, latent.index(other).permute((1, 0)), zero, use_acc=False, is_async=True)
            scores = _mma(qr, key.index(other).permute((1, 0)), scores, is_async=True)
            mixed, operand = _mma_wait(2, deps=[product, operand])
            _barrier()  # the other group has read its half too
            _fetch(
                latents, keys, slot, slot_key, latent.index(buffer), key.index(buffer), d, e, LATENT_STRIDE, KEY_STRIDE
            )
            slot = _slots(pages, ahead + (base - lo + 3 * KEYS), hi, PAGE)
            slot_key = _slots(pages, ahead_key + (base - lo + 3 * KEYS), hi, PAGE)
            score = _mma_wait(0, deps=[scores])
            buffer = other
        _wait(0)

    seen = total > 0
    scale = gl.convert_layout(1.0 / gl.where(seen, total, 1.0), gl.SliceLayout(1, of_mixed))
    mixed = mixed * scale[:, None]
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, of_mixed))
    column = gl.arange(0, LORA, gl.SliceLayout(0, of_mixed))
    at = (start * HEADS + row).to(gl.int64)
    if SPLITS == 1:
        gl.store(out + at[:, None] * LORA + column[None, :], mixed.to(dtype), mask=(row < count)[:, None])
    else:
        offset = split.to(gl.int64) * tokens * HEADS
        score = gl.where(seen, top + gl.log2(gl.where(seen, total, 1.0)), float("-inf"))
        gl.store(lse + offset + start * HEADS + row_s, score, mask=row_s < count)
        some = gl.convert_layout(seen.to(gl.int32), gl.SliceLayout(1, of_mixed)) > 0
        to = partial + (offset + at)[:, None] * LORA + column[None, :]
        gl.store(to, mixed, mask=((row < count) & some)[:, None])


def fits(q_latent: Tensor, q_rope: Tensor, pool: Tensor) -> bool:
    """Whether a step is of the sizes and the types that the kernel is written for."""
    return (
        (q_latent.shape[2], q_rope.shape[2]) == (LORA, ROPE)
        and pool.dtype == q_latent.dtype
        and q_latent.dtype in (torch.bfloat16, torch.float16)
    )


@cache
def refuses(device: int) -> str | None:
    """Why the kernel cannot run on the CUDA device of this index, or None: it is tried, once, which takes seconds."""
    if gl is None:
        return "this Triton has no Gluon for Hopper"
    if device < 0:
        return "the interpreter does not know Gluon"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it is for compute capability 9.0, this is {capability[0]}.{capability[1]}"
    try:
        error = _tried(torch.device("cuda", device))
    except Exception as failed:  # of a compiler that may be any
        return f"it does not compile: {str(failed).strip().splitlines()[-1:]}"
    return None if error < 1e-2 else f"its result is off by {error:.1e}"


def _tried(device: torch.device) -> float:
    """|got - want| / |want| of two requests with 64 heads, one of three queries after 150 positions, in pages of 16."""
    heads, page, stored = 64, 16, [150, 0]
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(device, torch.bfloat16)

    pool, q_latent, q_rope = random(24, page, LORA + ROPE), random(4, heads, LORA), random(4, heads, ROPE)
    table = torch.randperm(24, generator=draw).view(2, 12).to(device)
    lengths, start = (torch.tensor(x, device=device) for x in (stored, [0, 3, 4]))
    out, scale = torch.empty_like(q_latent), (128 + ROPE) ** -0.5
    none = torch.empty(0, device=device)
    with torch.cuda.device(device):
        attend[(4, 1)](
            q_latent, q_latent.stride(0), q_latent.stride(1), q_rope, q_rope.stride(0), q_rope.stride(1), pool,
            pool[..., LORA:], table, table.stride(0), lengths, start, out, none, none, scale * math.log2(math.e), 4, 2,
            HEADS=heads, LORA=LORA, ROPE=ROPE, LATENT_STRIDE=LORA + ROPE, KEY_STRIDE=LORA + ROPE, PAGE=page,
            REQUESTS_PAD=4, ROWS=ROWS, KEYS=KEYS, SPLITS=1, num_warps=WARPS,
        )  # fmt: skip
    want = attend_reference(q_latent, q_rope, pool, table, lengths, start, scale).float()
    return float((out.float() - want).norm() / want.norm())
