"""router on a GPU in two launches: logits by many programs, then one Triton program a token.

The op is defined in `ktcompile/ops/router.py`. Its weight is 4 to 7 MB in DeepSeek-V3, far more than one program can
read in time, so `_logits` cuts it: a program multiplies a few experts' rows by one stretch of H, and leaves a partial
sum. `_select` adds these, scores, and chooses. From MAX_ROWS tokens on, the product is torch's.

Of equal values the lowest id is chosen first, as `torch.topk` usually does on a CPU; NaN counts as largest, as there.
Experts come in falling order of the choice. Nothing waits for the device, so a step can be captured in a CUDA graph.
Without Triton this module still imports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.backends.reference import Reference
from ktcompile.backends.triton_language import constexpr, jit, tensor, tl
from ktcompile.backends.triton_mla import _power_of_two, interpreted, unavailable
from ktcompile.ops.router import RouterShape, Rule, follows_rule
from ktcompile.symbols import Sizes, nbytes

# ---------------------------------------------------------------------------------------------------------- kernels
# UPCAST: the interpreter computes bfloat16 on bit patterns, silently wrong; every load becomes float32 at once.


@jit
def _logits(
    x: tensor,  # [tokens, H]
    x_stride: tensor,
    weight: tensor,  # [E, H], contiguous
    partial: tensor,  # [splits, tokens, E] float32
    tokens: tensor,
    E: constexpr,
    H: constexpr,
    ROWS: constexpr,
    EXPERTS: constexpr,
    COLUMNS: constexpr,
) -> None:
    """Program (block of experts, split of H, block of tokens): all it needs is loaded at once, nothing is looped."""
    split = tl.program_id(1)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    token = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    h = split * COLUMNS + tl.arange(0, COLUMNS)
    at = weight + expert.to(tl.int64)[:, None] * H + h[None, :]
    w = tl.load(at, mask=(expert < E)[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
    at = x + token.to(tl.int64)[:, None] * x_stride + h[None, :]
    v = tl.load(at, mask=(token < tokens)[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(v[:, None, :] * w[None, :, :], 2)  # [ROWS, EXPERTS]
    to = partial + (split.to(tl.int64) * tokens + token)[:, None] * E + expert[None, :]
    tl.store(to, total, mask=(token < tokens)[:, None] & (expert < E)[None, :])


@jit
def _key(value: tensor, index: tensor) -> tensor:
    """An int64 that orders as (float32 value, falling index): one reduction finds the largest and where it is."""
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@jit
def _value(key: tensor) -> tensor:
    """The value of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _index(key: tensor) -> tensor:
    """The index of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@jit
def _raw(
    logits: tensor,
    tokens: tensor,
    token: tensor,
    expert: tensor,
    mask: tensor,
    E: constexpr,
    SPLITS: constexpr,
    ROUND: constexpr,
) -> tensor:
    """The logits of these experts: the sum over splits, rounded to the type that the model has them in."""
    total = tl.load(logits + token * E + expert, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(logits + (split * tokens + token) * E + expert, mask=mask, other=0.0).to(tl.float32)
    if ROUND == "bfloat16":
        total = total.to(tl.bfloat16).to(tl.float32)
    if ROUND == "float16":
        total = total.to(tl.float16).to(tl.float32)
    return total


@jit
def _select(
    logits: tensor,  # [SPLITS, tokens, E]
    bias: tensor,  # [E]; unused without BIAS
    scores: tensor,  # [tokens, K]
    ids: tensor,  # [tokens, K] int64
    tokens: tensor,
    fill: tensor,
    eps: tensor,
    scaling: tensor,
    E: constexpr,
    K: constexpr,
    K_PAD: constexpr,
    SPLITS: constexpr,
    ROUND: constexpr,
    SIGMOID: constexpr,
    BIAS: constexpr,
    GROUPS: constexpr,
    GROUPS_PAD: constexpr,
    SIZE_PAD: constexpr,
    GROUPS_KEPT: constexpr,
    TOP2: constexpr,
    NORMALISED: constexpr,
) -> None:
    """One token. Experts lie as [group, place in it], each axis padded to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    least = -0x8000000000000000  # below the key of every value
    size = E // GROUPS
    group = tl.arange(0, GROUPS_PAD)
    place = tl.arange(0, SIZE_PAD)
    expert = group[:, None] * size + place[None, :]
    real = (group < GROUPS)[:, None] & (place < size)[None, :]
    raw = _raw(logits, tokens, token, expert, real, E, SPLITS, ROUND)
    top = 0.0
    total = 1.0
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-raw))
    else:
        raw = tl.where(real, raw, float("-inf"))
        top = tl.max(tl.max(raw, 1), 0)
        score = tl.exp(raw - top)
        total = tl.sum(tl.sum(score, 1), 0)
        score = score / total
    choice = score
    if BIAS:
        choice = score + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)

    if GROUPS > 1:
        keys = tl.where(real, _key(choice, expert), least)
        first = tl.max(keys, 1)  # [GROUPS_PAD]
        best = _value(first)
        if TOP2:
            best += _value(tl.max(tl.where(keys == first[:, None], least, keys), 1))
        keys_of_groups = tl.where(group < GROUPS, _key(best, group), least)
        kept = group < 0
        for _ in tl.static_range(GROUPS_KEPT):
            winner = tl.max(keys_of_groups, 0)
            kept = kept | (keys_of_groups == winner)
            keys_of_groups = tl.where(keys_of_groups == winner, least, keys_of_groups)
        choice = tl.where(kept[:, None], choice, fill)

    keys = tl.where(real, _key(choice, expert), least)
    slot = tl.arange(0, K_PAD)
    chosen = tl.full([K_PAD], least, tl.int64)
    for j in tl.static_range(K):
        winner = tl.max(tl.max(keys, 1), 0)
        chosen = tl.where(slot == j, winner, chosen)
        keys = tl.where(keys == winner, least, keys)
    out = slot < K
    which = tl.where(out, _index(chosen), 0)
    if BIAS:  # the choice was by another value than the score
        found = _raw(logits, tokens, token, which, out, E, SPLITS, ROUND)
        found = 1.0 / (1.0 + tl.exp(-found)) if SIGMOID else tl.exp(found - top) / total
    else:
        found = _value(chosen)
    found = tl.where(out, found, 0.0)
    if NORMALISED:
        found = found / (tl.sum(found, 0) + eps)
    at = token * K + slot
    tl.store(scores + at, (found * scaling).to(scores.dtype.element_ty), mask=out)
    tl.store(ids + at, which.to(tl.int64), mask=out)


# --------------------------------------------------------------------------------------------------------- launches

MAX_ROWS = 32
"""Tokens up to which reading the weight is the whole cost; beyond, the product is left to torch."""

MAX_EXPERTS, MAX_TOP_K = 4096, 64
"""A program holds all experts of a token in registers, and its loop over the chosen is unrolled."""

_COLUMNS = 1024


def route(x: Tensor, weight: Tensor, bias: Tensor | None, shape: RouterShape) -> tuple[Tensor, Tensor]:
    """Scores [T, k] and ids [T, k] int64 of `x [..., H]`, as `ktrans::router`. `weight [E, H]`, `bias [E]`.

    Rows of `x` may be strided; it is copied only if they cannot be seen as [T, H] with neighbouring values.
    """
    rule = shape.rule
    experts, width = weight.shape
    if rule is None or experts != shape.experts or (bias is None) != (rule.bias is None):
        raise ValueError(f"weight {list(weight.shape)} with{'out' if bias is None else ''} bias: not of {shape}")
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError("weight and bias must be contiguous")
    rows = x.reshape(-1, width)
    tokens = rows.shape[0]
    scores = torch.empty(tokens, shape.top_k, dtype=rule.dtype, device=x.device)
    ids = torch.empty(tokens, shape.top_k, dtype=torch.int64, device=x.device)
    if tokens == 0:
        return scores, ids
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    with torch.cuda.device(x.get_device()):
        logits = _products(rows, weight, rule)
        size = experts // rule.groups
        groups_pad, size_pad = _power_of_two(rule.groups), _power_of_two(size)
        _select[(tokens,)](
            logits, logits if bias is None else bias, scores, ids, tokens, rule.fill, rule.eps, rule.scaling,
            E=experts, K=shape.top_k, K_PAD=_power_of_two(shape.top_k), SPLITS=logits.shape[0],
            ROUND=str(rule.logits).removeprefix("torch."), SIGMOID=rule.scoring == "sigmoid", BIAS=bias is not None,
            GROUPS=rule.groups, GROUPS_PAD=groups_pad, SIZE_PAD=size_pad, GROUPS_KEPT=rule.groups_kept,
            TOP2=rule.group_score == "top2", NORMALISED=shape.normalised,
            num_warps=1 if groups_pad * size_pad <= 512 else 4,  # one warp reduces by shuffles alone
        )  # fmt: skip
    return scores, ids


def _products(rows: Tensor, weight: Tensor, rule: Rule) -> Tensor:
    """Parts [splits, T, E] whose sum are the logits; whole and rounded already where torch makes them."""
    tokens, width = rows.shape
    experts = weight.shape[0]
    if tokens > MAX_ROWS:
        return functional.linear(rows.to(rule.logits), weight.to(rule.logits))[None]
    block = 4 if tokens > 2 else tokens  # tokens that share one reading of the weight
    columns = min(_COLUMNS, _power_of_two(width))
    splits = -(-width // columns)
    partial = torch.empty(splits, tokens, experts, dtype=torch.float32, device=rows.device)
    each = 4 // block
    _logits[(-(-experts // each), splits, -(-tokens // block))](
        rows, rows.stride(0), weight, partial, tokens,
        E=experts, H=width, ROWS=block, EXPERTS=each, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return partial


class TritonRouter(Kernel):
    """The whole router in two launches instead of 20 to 30, where its rule is understood."""

    name = "triton_router"
    op = "router"
    device = "cuda"
    layout = "plain"

    def missing(self) -> str | None:
        return unavailable()

    def refuses(self, region: Region, target: Target) -> str | None:
        shape: RouterShape = region.binding.shape
        if shape.rule is None:
            return "its captured code follows no rule that is understood"
        if not follows_rule(region.body, shape):
            return "a pass changed which of the chosen experts are kept"
        if shape.experts > MAX_EXPERTS or shape.top_k > MAX_TOP_K:
            return f"{shape.top_k} of {shape.experts} experts; at most {MAX_TOP_K} of {MAX_EXPERTS}"
        return unavailable() if torch.cuda.is_available() else None

    def packed_bytes(self, region: Region) -> int:
        return Reference().packed_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        x = value_of(region.inputs[0])
        experts, width = int(region.binding.shape.experts), int(x.shape[-1])
        tokens = nbytes(x, sizes) // (int(x.element_size()) * width)
        made = tokens * experts * -(-width // _COLUMNS)  # parts of logits
        if tokens > MAX_ROWS:
            made = (tokens + experts) * width + tokens * experts  # x and the weight in float32, logits
        return nbytes(value_of(region.node), sizes) + 4 * made

    def cost(self, region: Region, target: Target) -> Cost:
        return Reference().cost(region, target)

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return Reference().pack(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> tuple[Tensor, Tensor]:
        (x,) = inputs
        shape: RouterShape = region.shape
        bias = packed.tensors[shape.rule.bias] if shape.rule and shape.rule.bias else None
        scores, ids = route(x, packed.tensors["weight"], bias, shape)
        return (scores, ids) if shape.scores < shape.ids else (ids, scores)


__all__ = ["MAX_EXPERTS", "MAX_ROWS", "MAX_TOP_K", "TritonRouter", "interpreted", "route"]
