"""Hand-over between a GPU's stream and kernels on the CPU, without the host: inside a CUDA graph, or step by step.

A kernel writes the values that the CPU reads to pinned memory and raises a flag; the pool's driver sees it, computes,
and raises another; the stream waits for that one, and a kernel reads the result from pinned memory. No copy nodes and
no host functions: those cost several times as much (docs/design.md).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ktcompile.backends.triton_language import constexpr, jit, tensor, tl, triton
from ktcompile.kernel import Prepared

_BLOCK = 1024  # elements a program
_ALONE = 8192  # elements that one program sends alone: it need not ask whether others are done


@jit
def _send(
    x: tensor,  # [tokens, WIDTH]
    x_stride: tensor,
    ids: tensor,  # [tokens, TOP_K]
    ids_stride: tensor,
    scores: tensor,
    scores_stride: tensor,
    host_x: tensor,  # the same in pinned memory, contiguous
    host_ids: tensor,
    host_scores: tensor,
    arrived: tensor,  # [1] int32 on the GPU, 0 between launches
    start: tensor,  # [1] int32 in pinned memory, raised at the end
    done: tensor,  # [1] int32 in pinned memory, the CPU's answer to the last launch: taken back
    programs: tensor,
    below: tensor,  # ids smaller than this are written as -1: computed elsewhere
    WIDTH: constexpr,
    TOP_K: constexpr,
    TOP_K_PAD: constexpr,
    BLOCK: constexpr,
    ALONE: constexpr,
    UPCAST: constexpr,
) -> None:
    """Program (token, block of columns). The last to arrive raises `start`: all that was written is visible then."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
    if UPCAST:
        value = value.to(tl.float32)
    tl.store(host_x + token * WIDTH + column, value.to(host_x.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        k = tl.arange(0, TOP_K_PAD)
        chosen = tl.load(ids + token * ids_stride + k, mask=k < TOP_K, other=0)
        chosen = tl.where(chosen < below, -1, chosen)
        tl.store(host_ids + token * TOP_K + k, chosen.to(host_ids.dtype.element_ty), mask=k < TOP_K)
        score = tl.load(scores + token * scores_stride + k, mask=k < TOP_K, other=0.0)
        if UPCAST:
            score = score.to(tl.float32)
        tl.store(host_scores + token * TOP_K + k, score.to(host_scores.dtype.element_ty), mask=k < TOP_K)
        tl.store(done, 0)
    tl.debug_barrier()  # the release below covers what this thread saw: so all threads of the program come first
    if ALONE:
        tl.atomic_xchg(start, 1, sem="release", scope="sys")
    elif tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys") == programs - 1:
        tl.atomic_xchg(arrived, 0, sem="relaxed", scope="gpu")
        tl.atomic_xchg(start, 1, sem="release", scope="sys")


@jit
def _receive(host: tensor, out: tensor, count: tensor, BLOCK: constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(host + at, mask=at < count, volatile=True)  # no cache may answer with the last step's
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


def interpreted() -> bool:
    """Whether Triton was imported under TRITON_INTERPRET=1."""
    return triton is not None and not isinstance(_send, triton.runtime.JITFunction)


# ------------------------------------------------------------------------------------------------ the driver's API

_WAIT_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ


@cache
def _cuda() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _stream_value(name: str, flag: Tensor, value: int, flags: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    call = getattr(_cuda(), name)
    status = call(ctypes.c_void_p(stream), ctypes.c_uint64(flag.data_ptr()), ctypes.c_uint32(value), flags)
    if status:
        raise RuntimeError(f"{name}: CUDA error {status}")


@cache
def _unavailable() -> str | None:
    if triton is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    try:
        flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        _stream_value("cuStreamWriteValue32_v2", flag, 1, 0)
        _stream_value("cuStreamWaitValue32_v2", flag, 1, _WAIT_EQUAL)
        torch.cuda.current_stream().synchronize()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the GPU's driver has no stream waits: {error}"
    return None


def _write(values: Sequence[Tensor], prepared: Prepared, arrived: Tensor, start: Tensor, done: Tensor) -> None:
    x, ids, scores = values
    rows = x.reshape(-1, x.shape[-1])
    tokens, width = rows.shape
    prepared.resize(tokens)
    host_x, host_ids, host_scores = prepared.inputs
    if any(v.shape != (tokens, host.shape[1]) for v, host in zip((rows, ids, scores), prepared.inputs, strict=True)):
        raise ValueError(f"prepared for {tuple(host_x.shape)} and {tuple(host_ids.shape)}, not {tuple(rows.shape)}")
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    ids, scores = (v if v.stride(1) == 1 else v.contiguous() for v in (ids, scores))
    alone = tokens == 1 and width <= _ALONE
    block = max(_BLOCK, 1 << (width - 1).bit_length()) if alone else _BLOCK
    blocks = -(-width // block)
    _send[(tokens, blocks)](
        rows, rows.stride(0), ids, ids.stride(0), scores, scores.stride(0), host_x, host_ids, host_scores,
        arrived, start, done, tokens * blocks, prepared.elsewhere(tokens), WIDTH=width, TOP_K=ids.shape[1],
        TOP_K_PAD=max(2, 1 << (ids.shape[1] - 1).bit_length()), BLOCK=block, ALONE=alone, UPCAST=interpreted(),
        num_warps=block // 512 if alone else 4,
    )  # fmt: skip


def _read(prepared: Prepared, like: Tensor) -> Tensor:
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    count = out.numel()
    _receive[(-(-count // _BLOCK),)](prepared.out, out, count, BLOCK=_BLOCK)
    return out


class Flags:
    """Flags in pinned memory: the stream waits for the CPU by value. `like`: the result's shape, type and device."""

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        self.prepared = prepared
        pinned = device.type == "cuda"
        self.start, self.done = (torch.zeros(1, dtype=torch.int32, pin_memory=pinned) for _ in range(2))
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        prepared.listen(self.start, self.done)

    @staticmethod
    def missing() -> str | None:
        """Why it cannot be used here, or None."""
        return None if interpreted() else _unavailable()

    def submit(self, *values: Tensor) -> None:
        """Enqueue: the CPU gets `values` and starts."""
        _write(values, self.prepared, self._arrived, self.start, self.done)

    def wait(self, like: Tensor) -> Tensor:
        """Enqueue: wait for the CPU, then its result as a new tensor of the shape and type of `like`."""
        if like.device.type == "cuda":
            _stream_value("cuStreamWaitValue32_v2", self.done, 1, _WAIT_EQUAL)
        else:  # a GPU that is the CPU, in tests
            while not self.done.item():
                time.sleep(0)
        return _read(self.prepared, like)


class HostFunctions:
    """Copies and host functions: for a GPU whose driver has no stream waits."""

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        self.prepared, self._functions = prepared, prepared.host_functions()

    @staticmethod
    def missing() -> str | None:
        """Why it cannot be used here, or None."""
        return None if torch.cuda.is_available() else "there is no GPU that torch can use"

    def submit(self, *values: Tensor) -> None:
        """As `Flags.submit`."""
        x, ids, scores = values
        tokens = ids.shape[0]
        self.prepared.resize(tokens)
        ids = torch.where(ids < self.prepared.elsewhere(tokens), -1, ids)
        for value, host in zip((x, ids, scores), self.prepared.inputs, strict=True):
            host[:tokens].copy_(value.reshape(tokens, -1).to(host.dtype), non_blocking=True)
        self._call(self._functions.submit)

    def wait(self, like: Tensor) -> Tensor:
        """As `Flags.wait`."""
        self._call(self._functions.wait)
        rows = like.numel() // self.prepared.out.shape[1]
        return self.prepared.out[:rows].to(like.device, non_blocking=True).to(like.dtype).view(like.shape)

    def _call(self, function: int) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        argument = ctypes.c_void_p(self._functions.argument)
        status = _cuda().cuLaunchHostFunc(stream, ctypes.c_void_p(function), argument)
        if status:
            raise RuntimeError(f"cuLaunchHostFunc: CUDA error {status}")
