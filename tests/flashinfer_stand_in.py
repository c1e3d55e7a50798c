"""FlashInfer 0.5.3's MLA wrapper without its kernels: it takes what that one takes, and computes as that one would.

As there, `plan` decides on the host what `run` does, `run` reads page indices from the wrapper's own buffer when it
runs, and what a CUDA graph records of a `run` (arguments, mask, grid) must still fit the plan when it is replayed.
Beside that the wrapper's limits, which FlashInfer does not check: addresses are read 16 bytes at a time, keys of a
tile of queries end at a multiple of 64 above a bound that is rounded down.
"""

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

INTS = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")


def modules(taken: list["BatchMLAPagedAttentionWrapper"]) -> dict[str, Any]:
    """What to put into sys.modules; every wrapper that is made is added to `taken`."""
    package, mla = ModuleType("flashinfer"), ModuleType("flashinfer.mla")

    class Recorded(BatchMLAPagedAttentionWrapper):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            taken.append(self)

    for name, value in {"mla": mla, "__path__": []}.items():
        setattr(package, name, value)
    mla.__dict__["BatchMLAPagedAttentionWrapper"] = Recorded
    return {"flashinfer": package, "flashinfer.mla": mla}


class BatchMLAPagedAttentionWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert backend in ("auto", "fa2", "fa3") and float_workspace_buffer.nbytes >= 132 * (128 << 10)
        self.device = float_workspace_buffer.device
        self.fixed = use_cuda_graph
        self.buffers = dict(zip(INTS, (qo_indptr, kv_indptr, kv_indices, kv_len_arr), strict=True))
        assert all(isinstance(b, Tensor) == use_cuda_graph for b in self.buffers.values())
        self.plans = self.runs = 0
        self.batches: list[int] = []  # requests of each plan
        self.recorded: list[Callable[[], None]] = []  # a replay of each run

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        given = dict(zip(INTS, (qo_indptr, kv_indptr, kv_indices, kv_len_arr), strict=True))
        for name, tensor in given.items():
            if tensor.dtype != torch.int32:
                raise ValueError(f"Expected {name}.dtype == torch.int32, got {tensor.dtype}")
            assert tensor.dim() == 1
        batch = len(kv_len_arr)
        assert batch > 0 and len(qo_indptr) == len(kv_indptr) == batch + 1
        for name, tensor in given.items():
            if not self.fixed:
                self.buffers[name] = tensor.to(self.device, copy=True)
                continue
            held = self.buffers[name]
            assert held is not None and held.device == self.device and held.dtype == torch.int32
            if name == "kv_indices":
                held = held[: len(tensor)]
            assert held.shape == tensor.shape, f"{name}: the batch of a wrapper with fixed buffers cannot change"
            held.copy_(tensor)
        assert q_data_type == kv_data_type == torch.bfloat16
        assert all(type(n) is int for n in (num_heads, head_dim_ckv, head_dim_kpe, page_size))
        assert type(causal) is bool and type(sm_scale) is float
        starts, lengths, pages = qo_indptr.tolist(), kv_len_arr.tolist(), kv_indptr.tolist()
        assert starts[0] == 0 and starts == sorted(starts) and pages[-1] <= len(kv_indices)
        for r, length in enumerate(lengths):
            assert starts[r + 1] - starts[r] <= length and pages[r] * page_size + length <= len(kv_indices) * page_size
        self.tile = 128 if starts[-1] * num_heads // batch > 64 else 64
        assert sum(-(-(b - a) * num_heads // self.tile) for a, b in pairwise(starts)) <= 16384
        self.heads, self.lora, self.rope, self.page = num_heads, head_dim_ckv, head_dim_kpe, page_size
        self.causal, self.scale = causal, sm_scale
        self.work = [(starts[r], starts[r + 1], pages[r], n) for r, n in enumerate(lengths)]
        self.plans += 1
        self.batches.append(batch)

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:
        tensors = (q_nope, q_pe, ckv_cache, kpe_cache)
        sizes = (self.lora, self.rope, self.lora, self.rope)
        for tensor, size in zip(tensors, sizes, strict=True):
            assert tensor.dim() == 3 and tensor.shape[2] == size and tensor.dtype == torch.bfloat16
            assert tensor.device == self.device and tensor.stride(2) == 1
            assert not any(n % 16 for n in (tensor.data_ptr(), *(2 * s for s in tensor.stride()[:2])))
            assert max(tensor.stride()) * tensor.shape[0] < 1 << 32
        assert q_nope.shape[:2] == q_pe.shape[:2] and q_nope.shape[1] == self.heads
        assert ckv_cache.shape[:2] == kpe_cache.shape[:2] and ckv_cache.shape[1] == self.page
        assert not return_lse and lse is None
        out = torch.empty_like(q_nope) if out is None else out
        assert (out.shape, out.dtype, out.device) == (q_nope.shape, q_nope.dtype, q_nope.device)
        causal, tile, result = self.causal, self.tile, out

        def replay() -> None:
            assert self.fixed and (causal, tile) == (self.causal, self.tile), "not the recorded program"
            self._compute(*tensors, result)

        self.recorded.append(replay)
        self.runs += 1
        self._compute(*tensors, out)
        return out

    def _compute(self, q_nope: Tensor, q_pe: Tensor, ckv: Tensor, kpe: Tensor, out: Tensor) -> None:
        indices = self.buffers["kv_indices"]
        assert indices is not None
        for start, end, first, length in self.work:
            count = end - start
            pages = indices[first : first + -(-length // self.page)].long()
            keys = torch.cat([ckv, kpe], -1)[pages].flatten(0, 1)[:length].float()
            query = torch.cat([q_nope[start:end], q_pe[start:end]], -1).float()
            position = torch.arange(length, device=out.device)
            row = torch.arange(count * self.heads, device=out.device).view(count, self.heads, 1)
            seen = torch.ones(count, self.heads, length, dtype=torch.bool, device=out.device)
            if self.causal:
                bound = length - count + (row // self.tile * self.tile + self.tile) // self.heads
                seen &= position < (bound + 63) // 64 * 64  # blocks of keys that the tile reads
                seen &= position <= length - count + row // self.heads
            scores = torch.einsum("thd,sd->ths", query, keys) * self.scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[start:end] = torch.einsum("ths,sl->thl", weights, keys[:, : self.lora]).to(out.dtype)
