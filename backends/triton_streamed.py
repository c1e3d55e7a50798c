"""moe on a GPU with weights that stay in RAM: some of a layer's experts cross the link, the CPU computes the others.

A prompt of many tokens needs every expert: reading all weights over PCIe takes a fixed time, and the products of a GPU
take hardly any beside it. So the experts 0 to n - 1 are streamed, n such that both ends finish together
(`Share.streamed`). Their packed groups of 16 rows (csrc/internal.h) are copied a few experts at a time, into one buffer
while the kernels read the other, and become bfloat16 in registers:

    h[slot]    = silu(gate[e] x) * up[e] x       slots sorted by expert, `_up`
    part[slot] = score * down[e] h[slot]         in the order of the tokens, `_down`
    y[t]       = the sum of the parts of t, of experts below n, `_sum`

Nothing reads a value on the host: how many tokens an expert has is known to the kernels only.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.backends import native
from ktcompile.backends.cpu_moe import Avx2, matrices
from ktcompile.backends.reference import plain_cost
from ktcompile.backends.triton_language import constexpr, jit, tensor, tl
from ktcompile.backends.triton_mla import interpreted, unavailable
from ktcompile.kernel import TOKENS
from ktcompile.ops.moe import MoeShape
from ktcompile.symbols import Sizes, concrete

TYPES = ("q4_k", "q6_k")
"""What can be streamed; 256 columns share a unit of scales."""

CHUNK_BYTES = 256 << 20
"""Of packed experts in one of the two buffers, about: enough that a copy runs at full rate."""


# ---------------------------------------------------------------------------------------------------------- kernels


@jit
def _weights(
    packed: tensor,  # bytes of a matrix
    row: tensor,  # [ROWS]
    first: tensor,  # column: a multiple of WIDTH, which divides 256
    COLS: constexpr,
    Q6: constexpr,
    ROWS: constexpr,
    WIDTH: constexpr,
) -> tensor:
    """Values of some rows and columns, float32 [ROWS, WIDTH]. The layout is that of csrc/internal.h."""
    SPAN: constexpr = 384 if Q6 else 256  # bytes of 32 columns of 16 rows
    UNIT: constexpr = 288 if Q6 else 256  # of the scales of 256 columns
    CODES: constexpr = COLS // 32 * SPAN
    GROUP: constexpr = CODES + (COLS // 256 * UNIT + 63) // 64 * 64 + 64
    r = (row % 16)[:, None]
    group = packed + (row // 16).to(tl.int64)[:, None] * GROUP
    word = tl.arange(0, WIDTH // 8)[None, :]  # of eight columns
    at = group + (first // 32 + word // 4) * SPAN + ((word % 4) * 16 + r) * 4
    words = tl.load(at.to(tl.pointer_type(tl.int32)))
    j = tl.arange(0, 8)[None, None, :]
    codes = tl.reshape((words[:, :, None] >> (8 * (j % 4) + 4 * (j // 4))) & 15, (ROWS, WIDTH))
    unit = group + CODES + first // 256 * UNIT
    d = tl.load((unit + 2 * r).to(tl.pointer_type(tl.float16))).to(tl.float32)  # [ROWS, 1]
    if Q6:
        word = tl.arange(0, WIDTH // 16)[None, :]  # of sixteen
        at = group + (first // 32 + word // 2) * SPAN + 256 + ((word % 2) * 16 + r) * 4
        words = tl.load(at.to(tl.pointer_type(tl.int32)))
        j = tl.arange(0, 16)[None, None, :]
        high = tl.reshape((words[:, :, None] >> (8 * (j % 4) + 2 * (j // 4))) & 3, (ROWS, WIDTH))
        codes = (codes | high << 4) - 32
        run = first % 256 // 16 + tl.arange(0, WIDTH // 16)[None, :]
        scale = tl.load((unit + 32 + run * 16 + r).to(tl.pointer_type(tl.int8))).to(tl.float32) * d
        value = tl.reshape(codes.to(tl.float32), (ROWS, WIDTH // 16, 16)) * scale[:, :, None]
        return tl.reshape(value, (ROWS, WIDTH))
    dmin = tl.load((unit + 32 + 2 * r).to(tl.pointer_type(tl.float16))).to(tl.float32)
    run = first % 256 // 32 + tl.arange(0, WIDTH // 32)[None, :]
    at = unit + 64 + (run % 4) * 16 + r
    a = tl.load(at).to(tl.int32)
    b = tl.load(at + 64).to(tl.int32)
    c = tl.load(at + 128).to(tl.int32)
    scale = tl.where(run < 4, a, b) & 63
    minimum = tl.where(run < 4, c & 63, (a >> 6) | (b >> 6) << 2 | (c >> 6) << 4)
    value = tl.reshape(codes.to(tl.float32), (ROWS, WIDTH // 32, 32)) * (d * scale.to(tl.float32))[:, :, None]
    value -= (dmin * minimum.to(tl.float32))[:, :, None]
    return tl.reshape(value, (ROWS, WIDTH))


@jit
def _multiply(x: tensor, w: tensor, total: tensor, UPCAST: constexpr) -> tensor:
    """`total [TOKENS, ROWS]` plus x times the rows of w."""
    if UPCAST:
        return tl.dot(x.to(tl.float32), tl.trans(w), acc=total, input_precision="ieee")
    return tl.dot(x, tl.trans(w.to(x.dtype)), acc=total)


@jit
def _up(
    x: tensor,  # [T, H]
    x_stride: tensor,
    order: tensor,  # [T * TOP_K] slots (token * TOP_K + j), sorted by expert
    ends: tensor,  # [E] where in `order` an expert's slots end
    gate: tensor,  # packed, of the experts from `first` on
    up: tensor,
    first: tensor,
    h: tensor,  # [T * TOP_K, I], in the order of `order`
    GATE_BYTES: constexpr,  # of an expert
    UP_BYTES: constexpr,
    GATE_Q6: constexpr,
    UP_Q6: constexpr,
    H: constexpr,
    I: constexpr,
    TOP_K: constexpr,
    TOKENS: constexpr,
    ROWS: constexpr,
    WIDTH: constexpr,
    UPCAST: constexpr,
) -> None:
    """Program (block of rows, expert of the chunk): all its tokens, TOKENS at a time."""
    expert = first + tl.program_id(1)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, I - 1)
    gate += tl.program_id(1).to(tl.int64) * GATE_BYTES
    up += tl.program_id(1).to(tl.int64) * UP_BYTES
    for at in range(begin, end, TOKENS):
        place = at + tl.arange(0, TOKENS)
        token = tl.load(order + place, mask=place < end, other=0) // TOP_K
        g = tl.zeros([TOKENS, ROWS], tl.float32)
        u = tl.zeros([TOKENS, ROWS], tl.float32)
        for column in range(0, H, WIDTH):
            from_x = x + token.to(tl.int64)[:, None] * x_stride + (column + tl.arange(0, WIDTH))[None, :]
            v = tl.load(from_x, mask=(place < end)[:, None], other=0.0)
            g = _multiply(v, _weights(gate, real, column, H, GATE_Q6, ROWS, WIDTH), g, UPCAST)
            u = _multiply(v, _weights(up, real, column, H, UP_Q6, ROWS, WIDTH), u, UPCAST)
        value = g / (1.0 + tl.exp(-g)) * u
        to = h + place.to(tl.int64)[:, None] * I + row[None, :]
        tl.store(to, value.to(h.dtype.element_ty), mask=(place < end)[:, None] & (row < I)[None, :])


@jit
def _down(
    h: tensor,  # [T * TOP_K, I]
    order: tensor,
    ends: tensor,
    scores: tensor,  # [T * TOP_K]
    down: tensor,
    first: tensor,
    part: tensor,  # [T * TOP_K, H], in the order of the tokens
    DOWN_BYTES: constexpr,
    DOWN_Q6: constexpr,
    H: constexpr,
    I: constexpr,
    TOKENS: constexpr,
    ROWS: constexpr,
    WIDTH: constexpr,
    UPCAST: constexpr,
) -> None:
    """Program (block of rows, expert of the chunk)."""
    expert = first + tl.program_id(1)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, H - 1)
    down += tl.program_id(1).to(tl.int64) * DOWN_BYTES
    for at in range(begin, end, TOKENS):
        place = at + tl.arange(0, TOKENS)
        slot = tl.load(order + place, mask=place < end, other=0)
        total = tl.zeros([TOKENS, ROWS], tl.float32)
        for column in range(0, I, WIDTH):
            from_h = h + place.to(tl.int64)[:, None] * I + (column + tl.arange(0, WIDTH))[None, :]
            v = tl.load(from_h, mask=(place < end)[:, None], other=0.0)
            total = _multiply(v, _weights(down, real, column, I, DOWN_Q6, ROWS, WIDTH), total, UPCAST)
        total *= tl.load(scores + slot, mask=place < end, other=0.0).to(tl.float32)[:, None]
        to = part + slot.to(tl.int64)[:, None] * H + row[None, :]
        tl.store(to, total.to(part.dtype.element_ty), mask=(place < end)[:, None] & (row < H)[None, :])


@jit
def _sum(
    part: tensor,
    ids: tensor,  # [T, TOP_K], contiguous
    y: tensor,  # [T, H], contiguous
    count: tensor,  # experts below this one were computed
    H: constexpr,
    TOP_K: constexpr,
    BLOCK: constexpr,
) -> None:
    """Program (token, block of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        slot = token * TOP_K + j
        here = tl.where(tl.load(ids + slot) < count, H, 0)
        total += tl.load(part + slot * H + column, mask=column < here, other=0.0).to(tl.float32)
    tl.store(y + token * H + column, total.to(y.dtype.element_ty), mask=column < H)


# --------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Layer:
    """One layer's packed experts in RAM: `[E, bytes]` each, and their types."""

    gate: Tensor
    up: Tensor
    down: Tensor
    types: tuple[str, str, str]

    def pin(self) -> None:
        """Let the GPU copy from where they lie, at the link's full rate. What cannot be pinned is copied slower."""
        for t in (self.gate, self.up, self.down):
            if t.is_pinned():
                continue
            runtime = torch.cuda.cudart()
            status = int(runtime.cudaHostRegister(t.data_ptr(), t.nbytes, 0))
            if status:
                _drop_error()
                warnings.warn(
                    f"experts' memory cannot be pinned (CUDA error {status}): prompts stream it slower", stacklevel=2
                )
                return
            weakref.finalize(t, runtime.cudaHostUnregister, t.data_ptr()).atexit = False  # the process ends that anyway


def _drop_error() -> None:
    """Take what the runtime keeps of its last error: torch would raise it after the next kernel it launches."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def chunks(layer: Layer, count: int, device: torch.device) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(first expert, how many, their gate, up and down on the device), of experts 0 to `count`; the next are on their
    way meanwhile. What was given must be enqueued for reading before the next is asked for.
    """
    weights = (layer.gate, layer.up, layer.down)
    each = sum(t.shape[1] for t in weights)
    step = max(1, min(count, CHUNK_BYTES // each))
    spans = [(at, min(step, count - at)) for at in range(0, count, step)]
    buffers = [[torch.empty(step, t.shape[1], dtype=torch.uint8, device=device) for t in weights] for _ in range(2)]
    if device.type != "cuda":
        for i, (at, n) in enumerate(spans):
            for to, t in zip(buffers[i % 2], weights, strict=True):
                to[:n].copy_(t[at : at + n])
            yield at, n, buffers[i % 2]
        return
    main, side = torch.cuda.current_stream(device), _copies(device)
    read: list[Any] = [None, None]  # when the kernels are done with a buffer
    arrived: list[Any] = [None, None]

    def send(i: int) -> None:
        at, n = spans[i]
        with torch.cuda.stream(side):
            side.wait_event(read[i % 2])
            for to, t in zip(buffers[i % 2], weights, strict=True):
                to[:n].copy_(t[at : at + n], non_blocking=True)
            arrived[i % 2] = side.record_event()

    for i in range(2):
        read[i] = main.record_event()
    send(0)
    for i, (at, n) in enumerate(spans):
        if i + 1 < len(spans):
            send(i + 1)
        main.wait_event(arrived[i % 2])
        yield at, n, buffers[i % 2]
        read[i % 2] = main.record_event()
    for buffer in buffers:
        for t in buffer:
            t.record_stream(side)


@cache
def _copies(device: torch.device) -> Any:
    """The stream for copies to a device: one, as it has one engine for them."""
    return torch.cuda.Stream(device)


def streamed(x: Tensor, ids: Tensor, scores: Tensor, layer: Layer, shape: MoeShape, count: int) -> Tensor:
    """The experts 0 to `count` of a layer: `x [..., H]` to the same shape; `ids` and `scores [T, k]`."""
    rows = x.reshape(-1, shape.hidden)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    ids = ids.contiguous()
    tokens, top_k = ids.shape
    y = torch.zeros(rows.shape, dtype=x.dtype, device=x.device)
    if tokens == 0 or count == 0:
        return y.view(x.shape)
    sorted_ids, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(shape.experts, device=ids.device), right=True)
    h = torch.empty(tokens * top_k, shape.width, dtype=x.dtype, device=x.device)
    part = torch.empty(tokens * top_k, shape.hidden, dtype=x.dtype, device=x.device)
    flat = scores.reshape(-1).contiguous()
    gate, up, down = (t == "q6_k" for t in layer.types)
    sizes: dict[str, Any] = {"H": shape.hidden, "I": shape.width, "UPCAST": interpreted()}
    sizes |= _tiles(tokens, top_k, shape)
    with torch.cuda.device(x.get_device()):
        for first, n, (a, b, c) in chunks(layer, count, x.device):
            _up[(-(-shape.width // sizes["ROWS"]), n)](
                rows, rows.stride(0), order, ends, a, b, first, h, GATE_BYTES=a.shape[1], UP_BYTES=b.shape[1],
                GATE_Q6=gate, UP_Q6=up, TOP_K=top_k, **sizes,
            )  # fmt: skip
            _down[(-(-shape.hidden // sizes["ROWS"]), n)](
                h, order, ends, flat, c, first, part, DOWN_BYTES=c.shape[1], DOWN_Q6=down, **sizes
            )
        block = 1024
        grid = (tokens, -(-shape.hidden // block))
        _sum[grid](part, ids, y, count, H=shape.hidden, TOP_K=top_k, BLOCK=block)
    return y.view(x.shape)


def _tiles(tokens: int, top_k: int, shape: MoeShape) -> dict[str, int]:
    """Tokens, rows and columns of a block: tokens about as many as an expert has."""
    mean = tokens * top_k / shape.experts
    return {"TOKENS": 16 if mean <= 16 else 32 if mean <= 32 else 64, "ROWS": 64, "WIDTH": 64, "num_warps": 4}


class TritonStreamed(Kernel):
    """A layer's first experts by a GPU, from weights in RAM that cross the link at each step of many tokens."""

    name = "triton_streamed"
    op = "moe"
    device = "cuda"
    layout = "tiles"

    def missing(self) -> str | None:
        return unavailable()

    def refuses(self, region: Region, target: Target) -> str | None:
        shape: MoeShape = region.binding.shape
        if shape.share is None or not shape.share.streams:
            return "its weights are on the GPU; this streams what is in RAM"
        if shape.clamp or shape.activation != "silu":
            return f"its activation is {shape.activation}, not silu"
        if other := sorted(set(matrices(region).values()) - set(TYPES)):
            return f"experts packed as {other[0]} are not streamed; {', '.join(TYPES)} are"
        dtype = value_of(region.inputs[region.binding.roles["x"]]).dtype
        if dtype == torch.float32:
            return "it computes in bf16, this model in fp32"
        return unavailable() if torch.cuda.is_available() else None

    def packed_bytes(self, region: Region) -> int:
        return Avx2().packed_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        shape: MoeShape = region.binding.shape
        tokens = concrete(value_of(region.inputs[region.binding.roles["ids"]]).shape[0], sizes)
        slots = (tokens if isinstance(tokens, int) else 1) * shape.top_k
        return 2 * CHUNK_BYTES + 2 * slots * (shape.hidden + shape.width) + super().workspace_bytes(region, sizes)

    def cost(self, region: Region, target: Target) -> Cost:
        shape: MoeShape = region.binding.shape
        assert shape.share is not None
        part, nbytes = shape.share.fraction(TOKENS, shape), self.packed_bytes(region)
        whole = plain_cost(region, nbytes)
        return Cost(part * nbytes, part * whole.flops, part * nbytes)

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return Avx2().pack(parts, region, target)

    def ready(self, packed: Packed) -> None:
        if torch.cuda.is_available():
            _layer(packed).pin()

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        x, ids, scores = inputs
        shape: MoeShape = region.shape
        assert shape.share is not None
        return streamed(x, ids, scores, _layer(packed), shape, shape.share.streamed(ids.shape[0], shape))


def _layer(packed: Packed) -> Layer:
    weights: native.MoeWeights = next(iter(packed.shape[0].values()))
    return Layer(weights.gate, weights.up, weights.down, weights.types)


__all__ = ["CHUNK_BYTES", "TYPES", "Layer", "TritonStreamed", "chunks", "streamed"]
