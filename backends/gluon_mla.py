"""The kernel of `mla_attend` for Hopper GPUs, in Gluon: Triton with layouts and asynchronous products in our hands.

`triton_mla._attend` defines it and runs wherever this one does not; both take the same arguments, here with descriptors
of the cache (`rows`), and give the same numbers. A program is 64 rows and a part of the context, in blocks of 64 keys,
with warps of three kinds:

- `_fetch`, one warp, has the memory accelerator copy block after block into one of two places: boxes of a page's rows
  and 64 columns, wherever the page table says
- `_mix`, two groups of four warps: one makes the scores and weights of even blocks, one of odd blocks; each keeps half
  the columns of the result, so both need the weights of every block. While one works on weights, the tensor cores have
  the other's products

A block's weights take the place of its rotated keys once these are read: there is no room elsewhere. They are relative
to a scale of their row that lags behind the maximum by up to `SLACK`, so that what is mixed already seldom has to be
scaled anew. Groups tell each other by barriers in shared memory:

    full[place]     a block has come                            from `_fetch` to the group whose block it is
    known[group]    the scales of its block stand in `tops`     from a group to the other
    ready[group]    so do its weights, in `key`                 likewise
    empty[place]    both groups have mixed the block            from both to `_fetch`

Gluon may change from one Triton to the next, so `refuses` also runs the kernel once and looks at what it gives.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ktcompile.backends.triton_language import (
    TensorDescriptor,
    async_copy,
    constant,
    constexpr,
    gl,
    gluon_jit,
    hopper,
    tensor,
)
from ktcompile.ops.mla import attend_reference

LORA, ROPE = 512, 64
"""The only sizes of a row that it is written for."""

ROWS, KEYS, WARPS = 64, 64, 4
"""(query, head) pairs a program, cache rows a block, warps of a launch; eight more come of themselves."""

SLACK = constant(8.0)
"""A row's maximum exceeds its scale by this at most, in powers of two: a weight is at most 256."""

MIXES, FETCHES = constant(232), constant(40)
"""Registers of a thread of either kind: 256 and, for a warp counts as four here, 128 of them share 64512."""

if async_copy is not None:
    _load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # until Triton 3.6
    _barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    _fence, _mma, _mma_wait = hopper.fence_async_shared, hopper.warpgroup_mma, hopper.warpgroup_mma_wait
    mbarrier = hopper.mbarrier
    _copy_box = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared  # until Triton 3.6
    _memory = gl.shared_memory_descriptor
    _reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret  # until Triton 3.6


@gluon_jit
def _barriers(arrivals: constexpr) -> tensor:
    """Two, each complete after so many arrivals."""
    both = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(both.index(0), arrivals)
    mbarrier.init(both.index(1), arrivals)
    return both


@gluon_jit
def _halves(tiles: tensor) -> tensor:
    """What lies in tiles of 64 columns, [n, rows, 64], as halves of `LORA` columns: [n / 4, rows, 256]."""
    return _reinterpret(tiles, tiles.dtype, [tiles.shape[0] // 4, tiles.shape[1], 256], tiles.layout)


@gluon_jit
def _fetch(
    buffers: tensor,
    full: tensor,
    empty: tensor,
    latents: tensor,
    keys: tensor,
    pages: tensor,
    lo: tensor,
    hi: tensor,
    PAGE: constexpr,
) -> None:
    """The warp that copies: block after block into the place of the one before the last, once nobody reads that."""
    _, _, latent, key, _, _ = buffers
    TILES: constexpr = latent.shape[0] // 2
    KEYS: constexpr = key.shape[1]
    ROPE: constexpr = key.shape[2]
    BOX: constexpr = latents.block_type.shape[0]
    BYTES: constexpr = KEYS * (TILES * 64 + ROPE) * 2
    last = (hi - 1) // BOX * BOX  # a box after the context's end comes again: the barrier counts bytes
    for i in range(gl.cdiv(hi - lo, KEYS)):
        place = i % 2
        found: tensor = ()
        for b in gl.static_range(KEYS // BOX):  # before the wait: what they take is not seen then
            position = gl.minimum(lo + i * KEYS + b * BOX, last)
            found += (gl.load(pages + position // PAGE).to(gl.int32) * PAGE + position % PAGE,)
        mbarrier.wait(empty.index(place), (i // 2 + 1) & 1)
        mbarrier.expect(full.index(place), BYTES)
        for b in gl.static_range(KEYS // BOX):
            _copy_box(keys, [found[b], 0], full.index(place), key.index(place).slice(b * BOX, BOX))
            for t in gl.static_range(TILES):
                to = latent.index(place * TILES + t).slice(b * BOX, BOX)
                _copy_box(latents, [found[b], t * 64], full.index(place), to)


@gluon_jit
def _finite(top: tensor) -> tensor:
    """A row's scale, or 0 if it has seen nothing: no inf - inf."""
    return gl.where(top == float("-inf"), 0.0, top)


@gluon_jit
def _moved(tops: tensor, before: tensor) -> tensor:
    """Whether any row's scale is another one. Every warp looks at all rows, so none waits for the others."""
    everywhere: constexpr = gl.SliceLayout(1, gl.BlockedLayout([2, 1], [32, 1], [1, 4], [1, 0]))
    return gl.max((tops.load(everywhere) != before.load(everywhere)).to(gl.int32), 0) > 0


@gluon_jit
def _clear(latent: tensor, start: tensor, tiles: tensor, valid: tensor) -> None:
    """Zeros for rows from `valid` on: what a page holds after the context's end may be anything, 0 times that too."""
    layout: constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, latent.shape[1], gl.SliceLayout(1, layout))
    for t in range(tiles):
        x = latent.index(start + t).load(layout)
        latent.index(start + t).store(gl.where((row < valid)[:, None], x, 0.0))
    _fence()
    _barrier()


@gluon_jit
def _scores(
    buffers: tensor, full: tensor, turn: tensor, valid: tensor, tiles: tensor, zero: tensor, GROUP: constexpr
) -> tensor:
    """Of a block of this group whose rows from `valid` on are not of the context, [ROWS, KEYS].

    A loop over tiles of 64 columns, whose number the compiler does not know: unrolled, the addresses of all of them
    are more than registers hold.
    """
    q, q_rope, latent, key, _, _ = buffers
    mbarrier.wait(full.index(GROUP), turn & 1)
    if valid < key.shape[1]:
        _clear(latent, GROUP * tiles, tiles, valid)
    scores = _mma(q_rope, key.index(GROUP).permute((1, 0)), zero, use_acc=False, is_async=True)
    for t in range(tiles):
        scores = _mma(q.index(t), latent.index(GROUP * tiles + t).permute((1, 0)), scores, is_async=True)
    return _mma_wait(0, deps=[scores])


@gluon_jit
def _own(
    mixed: tensor,  # [ROWS, LORA // 2], this group's columns of the result
    top: tensor,  # [ROWS], its scale: the logarithm of what it is divided by
    total: tensor,  # [ROWS], sum of this group's weights, likewise
    scores: tensor,  # of the block
    limit: tensor,  # [ROWS], columns of the block from which on a row may not see
    least: tensor,  # the smallest of them
    scale_log2: tensor,
    buffers: tensor,
    barriers: tensor,
    GROUP: constexpr,
) -> tensor:
    """Scores of a block to weights, which the other group is told, and this group's half of what they mix."""
    _, _, latent, key, tops, _ = buffers
    _, empty, known, ready = barriers
    KEYS: constexpr = scores.shape[1]
    if least < KEYS:
        column = gl.arange(0, KEYS, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(column[None, :] < limit[:, None], scores, float("-inf"))
    highest = gl.max(scores, 1) * scale_log2
    new_top = gl.where(highest > top + SLACK, highest, top)
    tops.index(GROUP).store(new_top)
    _barrier()
    mbarrier.arrive(known.index(GROUP))
    moved = _moved(tops.index(GROUP), tops.index(1 - GROUP))
    safe = _finite(new_top)
    weight = gl.exp2(scores * scale_log2 - safe[:, None])
    weights = weight.to(key.dtype)
    key.index(GROUP).store(weights)
    _fence()
    _barrier()
    mbarrier.arrive(ready.index(GROUP))

    fade = gl.exp2(top - safe)
    total = total * fade + gl.sum(weight, 1)
    if moved:
        mixed = mixed * gl.convert_layout(fade, gl.SliceLayout(1, mixed.type.layout))[:, None]
    operand = gl.convert_layout(weights, gl.DotOperandLayout(0, mixed.type.layout, 2))
    product = _mma(operand, _halves(latent).index(2 * GROUP + GROUP), mixed, is_async=True)
    mixed, operand = _mma_wait(0, deps=[product, operand])
    _barrier()
    mbarrier.arrive(empty.index(GROUP))
    return mixed, new_top, total


@gluon_jit
def _other(
    mixed: tensor, top: tensor, total: tensor, turn: tensor, buffers: tensor, barriers: tensor, GROUP: constexpr
) -> tensor:
    """This group's half of a block of the other one."""
    _, _, latent, key, tops, _ = buffers
    _, empty, known, ready = barriers
    OTHER: constexpr = 1 - GROUP
    mbarrier.wait(known.index(OTHER), turn & 1)
    new_top = tops.index(OTHER).load(top.type.layout)
    fade = gl.exp2(top - _finite(new_top))
    if _moved(tops.index(OTHER), tops.index(GROUP)):
        mixed = mixed * gl.convert_layout(fade, gl.SliceLayout(1, mixed.type.layout))[:, None]
    mbarrier.wait(ready.index(OTHER), turn & 1)
    product = _mma(key.index(OTHER), _halves(latent).index(2 * OTHER + GROUP), mixed, is_async=True)
    mixed = _mma_wait(0, deps=[product])
    _barrier()
    mbarrier.arrive(empty.index(OTHER))
    return mixed, new_top, total * fade


@gluon_jit
def _mix(
    buffers: tensor,
    barriers: tensor,
    asked: tensor,  # barrier: the queries have come
    ended: tensor,  # barrier: both groups have told their totals
    numbers: tensor,
    result: tensor,
    GROUP: constexpr,
    HEADS: constexpr,
    ROWS: constexpr,
    KEYS: constexpr,
    LORA: constexpr,
    SPLITS: constexpr,
) -> None:
    """One of two groups of four warps: the weights of every other block, and half the columns of the result."""
    lo, hi, first, count, start, stored, scale_log2, tiles = numbers
    out, partial, lse, tokens, split = result
    HALF: constexpr = LORA // 2
    of_scores: constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    of_mixed: constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    row_s = first + gl.arange(0, ROWS, gl.SliceLayout(1, of_scores))
    limit = gl.where(row_s < count, stored + row_s // HEADS + 1, 0) - lo  # of rows that there are not, nobody reads
    least = stored + first // HEADS + 1 - lo
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, of_scores))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, of_scores))
    mixed = gl.full([ROWS, HALF], 0.0, gl.float32, of_mixed)
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, of_scores)
    full, _, _, _ = barriers
    blocks = gl.cdiv(hi - lo, KEYS)
    mbarrier.wait(asked, 0)
    _fence()
    if (GROUP == 0) & (blocks > 0):
        scores = _scores(buffers, full, 0, hi - lo, tiles, zero, GROUP)
        mixed, top, total = _own(mixed, top, total, scores, limit, least, scale_log2, buffers, barriers, GROUP)
    for i in range(2 - GROUP, blocks, 2):
        mixed, top, total = _other(mixed, top, total, (i - 1) // 2, buffers, barriers, GROUP)
        scores = _scores(buffers, full, i // 2, hi - lo - i * KEYS, tiles, zero, GROUP)
        mixed, top, total = _own(
            mixed, top, total, scores, limit - i * KEYS, least - i * KEYS, scale_log2, buffers, barriers, GROUP
        )
    if (blocks > 0) & (blocks % 2 == GROUP):  # the last one is the other group's
        mixed, top, total = _other(mixed, top, total, (blocks - 1) // 2, buffers, barriers, GROUP)

    _, _, _, _, _, totals = buffers
    totals.index(GROUP).store(total)
    _barrier()
    mbarrier.arrive(ended)
    mbarrier.wait(ended, 0)
    total += totals.index(1 - GROUP).load(gl.SliceLayout(1, of_scores))
    seen = total > 0
    scale = gl.convert_layout(1.0 / gl.where(seen, total, 1.0), gl.SliceLayout(1, of_mixed))
    mixed = mixed * scale[:, None]
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, of_mixed))
    column = GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(0, of_mixed))
    inside = (row < count)[:, None]
    at = (start * HEADS + row).to(gl.int64)
    if SPLITS == 1:
        gl.store(out + at[:, None] * LORA + column[None, :], mixed.to(out.dtype.element_ty), mask=inside)
    else:
        offset = split.to(gl.int64) * tokens * HEADS
        if GROUP == 0:
            score = gl.where(seen, top + gl.log2(gl.where(seen, total, 1.0)), float("-inf"))
            gl.store(lse + offset + start * HEADS + row_s, score, mask=row_s < count)
        some = gl.convert_layout(seen.to(gl.int32), gl.SliceLayout(1, of_mixed)) > 0
        to = partial + (offset + at)[:, None] * LORA + column[None, :]
        gl.store(to, mixed, mask=inside & some[:, None])


@gluon_jit
def _queries(
    q: tensor,
    token_stride: tensor,
    head_stride: tensor,
    first: tensor,
    count: tensor,
    start: tensor,
    tokens: tensor,
    HEADS: constexpr,
    ROWS: constexpr,
    layout: constexpr,
) -> tensor:
    """Where this program's rows begin, [ROWS, 1]; the last one again for rows that there are not."""
    row = gl.maximum(gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), count - 1), 0)
    token = gl.minimum(start + row // HEADS, tokens - 1).to(gl.int64)
    return q + (token * token_stride + row % HEADS * head_stride)[:, None]


@gluon_jit
def attend(
    q_latent: tensor,  # arguments as of `triton_mla._attend`; `latents` and `keys` are what `rows` gives
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
    PAGE: constexpr,
    REQUESTS_PAD: constexpr,
    ROWS: constexpr,
    KEYS: constexpr,
    SPLITS: constexpr,
) -> None:
    """Launched with `WARPS` warps over (blocks of rows, splits); eight more come of themselves."""
    HALF: constexpr = LORA // 2
    wide: constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    narrow: constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    shared: constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat_shared: constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: constexpr = q_latent.dtype.element_ty

    full, empty, known, ready = _barriers(1), _barriers(2), _barriers(1), _barriers(1)
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ended = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(asked, 128)
    mbarrier.init(ended, 2)
    _fence()
    _barrier()

    block = gl.program_id(0)
    split = gl.program_id(1)
    # All that says which request this is comes at once; every warp looks at all of it.
    i = gl.arange(0, REQUESTS_PAD, gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [1, 4], [1, 0])))
    starts = gl.load(query_start + i, mask=i <= requests, other=0).to(gl.int32)
    ends = gl.load(query_start + i + 1, mask=i < requests, other=tokens).to(gl.int32)
    lengths = gl.load(seq_len + i, mask=i < requests, other=0).to(gl.int32)
    begin = starts * HEADS // ROWS
    if HEADS % ROWS != 0:
        begin += i
    request = gl.sum(((i <= requests) & (begin <= block)).to(gl.int32), 0) - 1

    owned = request < requests
    start = gl.sum(gl.where(i == request, starts, 0), 0)
    end = gl.sum(gl.where(i == request, ends, 0), 0)
    stored = gl.sum(gl.where(i == request, lengths, 0), 0)
    own_begin = start * HEADS // ROWS
    if HEADS % ROWS != 0:
        own_begin += request
    first = (block - own_begin) * ROWS
    count = (end - start) * HEADS
    # The last row sees most.
    context = stored + gl.minimum(first + ROWS - 1, count - 1) // HEADS + 1
    context = gl.where(owned & (first < count), context, 0)
    part = gl.cdiv(gl.cdiv(context, KEYS), SPLITS) * KEYS
    lo = split * part
    hi = gl.maximum(lo, gl.minimum(lo + part, context))

    d = gl.arange(0, HALF, gl.SliceLayout(0, wide))
    e = gl.arange(0, ROPE, gl.SliceLayout(0, narrow))
    q = gl.allocate_shared_memory(dtype, [LORA // 64, ROWS, 64], shared)
    qr = gl.allocate_shared_memory(dtype, [ROWS, ROPE], shared)
    at = _queries(q_latent, q_latent_token_stride, q_latent_head_stride, first, count, start, tokens, HEADS, ROWS, wide)
    _load(_halves(q).index(0), at + d[None, :])
    _load(_halves(q).index(1), at + HALF + d[None, :])
    at = _queries(q_rope, q_rope_token_stride, q_rope_head_stride, first, count, start, tokens, HEADS, ROWS, narrow)
    _load(qr, at + e[None, :])
    async_copy.mbarrier_arrive(asked, increment_count=False)
    latent = gl.allocate_shared_memory(dtype, [2 * LORA // 64, KEYS, 64], shared)
    key = gl.allocate_shared_memory(dtype, [2, KEYS, ROPE], shared)
    tops = gl.allocate_shared_memory(gl.float32, [2, ROWS], flat_shared)
    totals = gl.allocate_shared_memory(gl.float32, [2, ROWS], flat_shared)

    pages = page_table + request * table_stride
    # All in shared memory; of `latent` and `key` the even block's part comes first.
    buffers = (q, qr, latent, key, tops, totals)
    barriers = (full, empty, known, ready)
    tiles = LORA // 64 * (hi > lo).to(gl.int32)
    numbers = (lo, hi, first, count, start, stored, scale_log2, tiles)
    result = (out, partial, lse, tokens, split)
    gl.warp_specialize(
        [
            (_mix, (buffers, barriers, asked, ended, numbers, result, 0, HEADS, ROWS, KEYS, LORA, SPLITS)),
            (_mix, (buffers, barriers, asked, ended, numbers, result, 1, HEADS, ROWS, KEYS, LORA, SPLITS)),
            (_fetch, (buffers, full, empty, latents, keys, pages, lo, hi, PAGE)),
        ],
        [4, 1],
        [MIXES, FETCHES],
    )


def rows(pool: Tensor) -> Any:
    """`[pages, page, columns]`, pages without a gap, as `attend` takes it: its rows, in boxes of 64 columns."""
    pages, page, columns = pool.shape
    box = [min(page, KEYS), 64]
    return TensorDescriptor(pool, [pages * page, columns], [pool.stride(1), 1], box, gl.NVMMASharedLayout(128, 16, 2))


def fits(q_latent: Tensor, q_rope: Tensor, pool: Tensor) -> bool:
    """Whether a step is of the sizes and the types that the kernel is written for: pages of 8, 16, 32 or 64 n rows."""
    page = pool.shape[1]
    return (
        (q_latent.shape[2], q_rope.shape[2]) == (LORA, ROPE)
        and page % 8 == 0
        and (KEYS % page == 0 or page % KEYS == 0)
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


def example(device: torch.device, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """Arguments of an attention, to try one: two requests, one of three queries after 150 positions, in pages of 16."""
    page, stored = 16, [150, 0]
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(device, torch.bfloat16)

    pool, q_latent, q_rope = random(24, page, LORA + ROPE), random(4, heads, LORA), random(4, heads, ROPE)
    pool *= torch.linspace(0.2, 3, 24, device=device)[:, None, None]  # scales change from block to block
    table = torch.randperm(24, generator=draw).view(2, 12).to(device)
    lengths, start = (torch.tensor(x, device=device) for x in (stored, [0, 3, 4]))
    return q_latent, q_rope, pool, table, lengths, start, (128 + ROPE) ** -0.5


def _tried(device: torch.device) -> float:
    """|got - want| / |want|"""
    heads = 64
    q_latent, q_rope, pool, table, lengths, start, scale = example(device, heads)
    out, none = torch.empty_like(q_latent), torch.empty(0, device=device)
    with torch.cuda.device(device):
        attend[(4, 1)](
            q_latent, q_latent.stride(0), q_latent.stride(1), q_rope, q_rope.stride(0), q_rope.stride(1),
            rows(pool[..., :LORA]), rows(pool[..., LORA:]), table, table.stride(0), lengths, start, out, none, none,
            scale * math.log2(math.e), 4, 2, HEADS=heads, LORA=LORA, ROPE=ROPE, PAGE=pool.shape[1], REQUESTS_PAD=4,
            ROWS=ROWS, KEYS=KEYS, SPLITS=1, num_warps=WARPS,
        )  # fmt: skip
    want = attend_reference(q_latent, q_rope, pool, table, lengths, start, scale).float()
    return float((out.float() - want).norm() / want.norm())
