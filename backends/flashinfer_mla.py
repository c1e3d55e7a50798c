"""mla on a GPU with FlashInfer's attention: `triton_mla` with another core, for many requests or long contexts.

Everything but the core is Triton's, and so are the layouts: one phase may run `triton_planes` and the other
`flashinfer_planes`. They are first in the lists, so they run where FlashInfer is installed, unless `gluon_mla` takes
the step, which is faster (docs/performance.md); a page made on a machine without a GPU takes that machine for an
example of what is installed.

FlashInfer (arXiv 2501.01005; written for and tested with flashinfer-python 0.5.3, which needs apache-tvm-ffi, nvcc and
ninja, and compiles for 20 s when it is first used) cuts the work of a step on the host: its `plan` wants every length
there. A kernel cannot know them without waiting for the device, so the caller of the step says them in `begin`. All
layers share one plan, and a CUDA graph that is replayed reads the plan of its step from buffers that never move. Where
nobody said what a step is (`end` came last), lengths are read from the device at every call: right, and slow.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktcompile import Region, Target, value_of
from ktcompile.backends import gluon_mla
from ktcompile.backends.mla import TritonMLA, TritonMLAPlanes, capability
from ktcompile.backends.triton_mla import mla_attend
from ktcompile.kernel import StepFacts
from ktcompile.ops.mla import attend_reference
from ktcompile.symbols import Sizes

LATENT, ROTATED = 512, 64
"""The only sizes of a row that it is compiled for."""

WORKSPACE_BYTES = 64 << 20
"""Room for partial results: FlashInfer takes 128 KiB a multiprocessor."""

PLAN_BYTES = 8 << 20
"""What each wrapper takes for its plans: there is one for decode, and one for the rest."""

MAX_WORKS = 16384 - 1024
"""FlashInfer keeps room for 16384 pieces of work and does not look; a split context takes one more a multiprocessor."""


def unavailable() -> str | None:
    """Why FlashInfer cannot be used here, or None if it can."""
    try:
        import_module("flashinfer.mla")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("flashinfer")
        return "flashinfer is not installed" if absent else f"flashinfer cannot be imported: {error}"
    return None


def uncompilable() -> str | None:
    """Why FlashInfer, which compiles what it is asked for, could not here, or None if it could."""
    if find_spec("flashinfer_jit_cache") is not None:  # has it compiled
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if shutil.which("nvcc") is None and not Path(home, "bin", "nvcc").exists():
        return f"flashinfer compiles its kernels, and there is no nvcc on the path or in {home}/bin"
    if shutil.which("ninja") is None and find_spec("ninja") is None:
        return "flashinfer compiles its kernels, and there is no ninja"
    return None


# ------------------------------------------------------------------------------------------------ plans


@dataclass(frozen=True)
class _Shape:
    """What a plan is made for, beside lengths."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    lora: int
    rope: int
    page: int
    scale: float


@dataclass(frozen=True)
class _Held:
    """One of FlashInfer's wrappers. `copied`: its last plan has left the pinned buffer, which the next overwrites."""

    wrapper: Any
    copied: torch.cuda.Event | None


class Attention:
    """FlashInfer's wrappers for one model, each planned once a step.

    A step that was begun and brings a token of every request may be a CUDA graph: it has a wrapper, with buffers that
    stay where they are, for its number of requests. All other steps share one.
    """

    def __init__(self) -> None:
        self._step: StepFacts | None = None
        self._ready: dict[_Shape, _Held] = {}  # planned for this step
        self._fixed: dict[tuple[_Shape, int, int], _Held] = {}  # by requests and entries of the page table
        self._free: dict[_Shape, _Held] = {}
        self._workspaces: dict[torch.device, Tensor] = {}
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}  # this step's page table, and it there in int32

    def begin(self, step: StepFacts) -> None:
        """Plan the step for what may be in a CUDA graph; the rest is planned by the first layer that runs."""
        self._step, self._ready = step, {}
        self._tables.clear()  # the table of the last step may have been written to since
        if not _decodes(step):
            return
        for shape, requests, entries in [*self._fixed]:
            if (requests, entries) == (len(step.counts), step.pages.numel()):
                self._ready[shape] = self._planned(step, shape)

    def end(self) -> None:
        """Forget the step."""
        self._step, self._ready = None, {}
        self._tables.clear()

    def __call__(
        self,
        q_latent: Tensor,  # [tokens, heads, lora]
        q_rope: Tensor,  # [tokens, heads, rope]
        pool: Tensor,
        page_table: Tensor,
        seq_len: Tensor,
        query_start: Tensor,
        scale: float,
        *,
        max_queries: int | None = None,
    ) -> Tensor:
        """What `mla_attend` returns for the same arguments; rows that no request owns are zeros."""
        step = self._step or _read(page_table, seq_len, query_start)
        tokens, heads, lora = q_latent.shape
        brought = sum(step.counts)
        if len(step.counts) != seq_len.shape[0] or brought > tokens:
            raise ValueError(
                f"the step that began has {len(step.counts)} requests and {brought} tokens; this call has "
                f"{seq_len.shape[0]} and {tokens}"
            )
        if _works(step, heads) > MAX_WORKS or pool.numel() >= 1 << 32:  # FlashInfer's offsets have 32 bits
            cache = (pool, page_table, seq_len, query_start)
            return mla_attend(q_latent, q_rope, *cache, scale, max_queries=max_queries)
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
        if brought < tokens:
            out[brought:].zero_()
        if brought == 0:
            return out
        shape = _Shape(q_latent.device, q_latent.dtype, heads, lora, q_rope.shape[2], pool.shape[1], scale)
        held = self._ready.get(shape)
        if held is None:
            held = self._planned(step, shape)
            if self._step is not None:
                self._ready[shape] = held
        held.wrapper.run(q_latent, q_rope, pool[..., :lora], pool[..., lora:], out=out)
        return out

    def _planned(self, step: StepFacts, shape: _Shape) -> _Held:
        cuda = shape.device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("FlashInfer plans on the host: a step must be begun before it is recorded")
        # A request without tokens would only be counted where FlashInfer chooses the size of its tiles: at 128 heads
        # they could become smaller than a token, which its causal bound rounds down to nothing.
        active = [r for r, count in enumerate(step.counts) if count]
        starts = [0, *accumulate(step.counts[r] for r in active)]
        lengths = [step.lengths[r] + step.counts[r] for r in active]
        requests, width = step.pages.shape
        with torch.inference_mode(), torch.cuda.device(shape.device.index if cuda else -1):
            held = self._held(step, shape)
            if held.copied is not None:
                held.copied.synchronize()
            held.wrapper.plan(
                _int32(starts),
                _int32([*(r * width for r in active), requests * width]),
                self._table(step.pages, shape.device),
                _int32(lengths),
                shape.heads,
                shape.lora,
                shape.rope,
                shape.page,
                max(step.counts) > 1,  # causal: without it all layers of a decode step are the same program
                shape.scale,
                shape.dtype,
                shape.dtype,
            )
            if held.copied is not None:
                held.copied.record()
        return held

    def _held(self, step: StepFacts, shape: _Shape) -> _Held:
        if step is not self._step or not _decodes(step):
            if shape not in self._free:
                self._free[shape] = self._made(shape.device)
            return self._free[shape]
        requests, entries = len(step.counts), step.pages.numel()
        key = shape, requests, entries
        if key not in self._fixed:
            sizes = {
                "qo_indptr": requests + 1,
                "kv_indptr": requests + 1,
                "kv_indices": entries,
                "kv_len_arr": requests,
            }
            buffers = {k: torch.zeros(n, dtype=torch.int32, device=shape.device) for k, n in sizes.items()}
            self._fixed[key] = self._made(shape.device, use_cuda_graph=True, **buffers)
        return self._fixed[key]

    def _made(self, device: torch.device, **fixed: Any) -> _Held:
        if device not in self._workspaces:
            self._workspaces[device] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper(
            self._workspaces[device], **fixed, backend="auto"
        )
        return _Held(wrapper, torch.cuda.Event() if device.type == "cuda" else None)

    def _table(self, pages: Tensor, device: torch.device) -> Tensor:
        """The page table as FlashInfer wants it, `[requests * P]`; request r begins at r * P."""
        held = self._tables.get(device)
        if held is None or held[0] is not pages:
            held = self._tables[device] = pages, pages.to(device, torch.int32).flatten()
        return held[1]


def _decodes(step: StepFacts) -> bool:
    return all(count == 1 for count in step.counts)


def _works(step: StepFacts, heads: int) -> int:
    """How many tiles of queries a plan has: those of a request are rows of 64 or 128 (token, head) pairs."""
    active = [count for count in step.counts if count]
    tile = 128 if sum(active) * heads > 64 * len(active) else 64
    return sum(-(-count * heads // tile) for count in active)


def _read(page_table: Tensor, seq_len: Tensor, query_start: Tensor) -> StepFacts:
    """What nobody said of a step, from the device."""
    if seq_len.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("FlashInfer plans on the host: a step must be begun before it is recorded")
    start: list[int] = query_start.tolist()
    counts = tuple(b - a for a, b in pairwise(start))
    return StepFacts(tuple(seq_len.tolist()), counts, page_table.clone())


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------ kernels


class FlashInferMLA(TritonMLA):
    """Latent attention with FlashInfer's core (fa3 on Hopper, else fa2), the rest in Triton. Weights decoded once."""

    name = "flashinfer"

    def __init__(self) -> None:
        self.attention = Attention()

    def missing(self) -> str | None:
        return super().missing() or unavailable() or uncompilable()

    def refuses(self, region: Region, target: Target) -> str | None:
        return super().refuses(region, target) or _refuses(region, target)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        return super().workspace_bytes(region, sizes) + WORKSPACE_BYTES + 2 * PLAN_BYTES

    def begin(self, step: StepFacts) -> None:
        self.attention.begin(step)

    def end(self) -> None:
        self.attention.end()

    def attend(self, *args: Any, **options: Any) -> Tensor:
        return self.attention(*args, **options)


class FlashInferMLAPlanes(FlashInferMLA, TritonMLAPlanes):
    """The same with projections from the bits of the file, as `triton_planes` has them."""

    name = "flashinfer_planes"


def _refuses(region: Region, target: Target) -> str | None:
    shape, roles = region.binding.shape, region.binding.roles
    if (shape.lora, shape.rope) != (LATENT, ROTATED):
        return f"FlashInfer takes latents of {LATENT} and keys of {ROTATED}; these are {shape.lora} and {shape.rope}"
    if 128 % shape.heads:
        return f"FlashInfer's causal tiles are right where heads divide 128; there are {shape.heads}"
    for role in ("hidden", "pool"):
        dtype = value_of(region.inputs[roles[role]]).dtype
        if dtype != torch.bfloat16:
            return f"FlashInfer is used in bf16 alone; {role} is {str(dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available():
        return unavailable()
    device = target[region.device or target.main.name].torch
    has = capability(device)
    if has is not None and has < (8, 0):
        return f"FlashInfer needs compute capability 8.0 for this; {region.device} has {has[0]}.{has[1]}"
    lacking = unavailable() or uncompilable()
    if lacking is not None or has is None:
        return lacking
    if shape.heads >= gluon_mla.ROWS and gluon_mla.refuses(device.index) is None:
        return f"on {region.device} Triton's kernel for Hopper is faster, and needs no plan by the host"
    return broken(device)


@cache
def broken(device: torch.device) -> str | None:
    """Why FlashInfer does not work there, or None: it is tried, once. If it never was on this machine, it compiles."""
    given = gluon_mla.example(device, 16)
    try:
        got = Attention()(*given)
        want = attend_reference(*given)
        error = float((got.float() - want.float()).norm() / want.float().norm())
    except Exception as failed:  # of a compiler that may be any
        lines = str(failed).strip().splitlines() or [type(failed).__name__]
        told = next((line for line in lines if "error" in line.lower()), lines[-1])
        return f"flashinfer does not work on {device}: {told.strip()[:200]}"
    return None if error < 2e-2 else f"flashinfer's result on {device} is off by {error:.1e}"
