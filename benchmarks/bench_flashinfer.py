"""Time the core of latent attention, FlashInfer's next to Triton's, on the same steps; one JSON object a line.

    FLASHINFER_CUDA_ARCH_LIST=9.0a python benchmarks/bench_flashinfer.py

DeepSeek-V3: 128 heads, 512 + 64, bfloat16, pages of 16 as the engine has them. `us` is a replayed CUDA graph of one
layer with a cold L2 (`gpu_timing`), `plan_us` what FlashInfer's plan costs the host once a step, all layers together.
`triton_fp8` reads a cache of 640 bytes a token, the others of 1152; `GB/s` counts it once. `error` is |got - want| /
|want| of the first request against the float32 reference.
"""

import json
import sys
import time
from statistics import median

import torch
from gpu_timing import copy_gb_s, graph_us

from ktcompile.backends import flashinfer_mla, triton_mla
from ktcompile.kernel import StepFacts
from ktcompile.ops.mla import attend_reference, packed
from ktcompile.symbols import PAGE

HEADS, LORA, ROPE = 128, 512, 64
SCALE = (128 + ROPE) ** -0.5
DECODE = (  # requests, context
    *((1, 1024), (1, 8192), (1, 32768), (4, 8192), (8, 8192), (16, 8192)),
    *((32, 1024), (32, 8192), (32, 32768), (32, 65536)),
)
PREFILL = ((512, 0), (512, 8192), (2048, 8192))  # tokens of one request, after how many


def main() -> int:
    why = (
        "no CUDA device" if not torch.cuda.is_available() else triton_mla.unavailable() or flashinfer_mla.unavailable()
    )
    if why is not None or triton_mla.interpreted():
        print(f"bench_flashinfer: {why or 'TRITON_INTERPRET is set'}, nothing to measure", file=sys.stderr)
        return 0
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    copy = copy_gb_s(scratch)
    print(json.dumps({"bench": "copy", "GB/s": round(copy), "device": torch.cuda.get_device_name()}), flush=True)
    for requests, context in DECODE:
        measure("decode", [context - 1] * requests, [1] * requests, copy, scratch)
    for tokens, stored in PREFILL:
        measure("prefill", [stored], [tokens], copy, scratch)
    return 0


def measure(kind: str, lengths: list[int], counts: list[int], copy: float, scratch: torch.Tensor) -> None:
    """Both cores on one step, whose rows are stored already."""
    torch.manual_seed(0)
    requests, tokens, context = len(counts), sum(counts), lengths[0] + counts[0]
    each = -(-context // PAGE)
    pool = torch.randn(requests * each, PAGE, LORA + ROPE, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(requests * each, device="cuda").view(requests, each)
    start = torch.tensor([0, *counts], device="cuda").cumsum(0)
    cache = (pool, table, torch.tensor(lengths, device="cuda"), start)
    latent = torch.randn(HEADS, tokens, LORA, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    rope = torch.randn(tokens, HEADS, ROPE, device="cuda", dtype=torch.bfloat16)
    first = counts[0] if kind == "decode" else 16  # the reference copies the context for every token
    one = (pool, table[:1], cache[2][:1] + counts[0] - first, torch.tensor([0, first], device="cuda"))
    rows = slice(counts[0] - first, counts[0])
    want = attend_reference(latent[rows], rope[rows], *one, SCALE).float()
    attention, facts = flashinfer_mla.Attention(), StepFacts(tuple(lengths), tuple(counts), table)
    attention.begin(facts)
    small = packed(pool[..., :LORA], pool[..., LORA:], torch.uint8)
    triton = triton_mla.mla_attend
    for core, kept, attend in (
        ("triton", pool, triton),
        ("triton_fp8", small, triton),
        ("flashinfer", pool, attention),
    ):
        found: list[torch.Tensor] = []

        def step() -> None:
            found[:] = [attend(latent, rope, kept, *cache[1:], SCALE)]  # noqa: B023

        us = graph_us(step, scratch)
        off = float((found[0][rows].float() - want).norm() / want.norm())
        row = {"bench": kind, "core": core, "requests": requests, "tokens": tokens, "context": context}
        gb_s = kept.nbytes / us / 1e3
        flops = (
            2 * HEADS * (2 * LORA + ROPE) * sum(c * n + c * (c + 1) // 2 for c, n in zip(counts, lengths, strict=True))
        )
        row |= {"us": round(us, 1), "GB/s": round(gb_s), "of_copy": round(gb_s / copy, 3)}
        row |= {"TFLOP/s": round(flops / us / 1e6), "error": float(f"{off:.1e}")}
        if core == "flashinfer":
            row["plan_us"] = round(planning(attention, facts), 1)
        print(json.dumps(row), flush=True)


def planning(attention: flashinfer_mla.Attention, facts: StepFacts) -> float:
    """Median time of `begin` on the host, the GPU idle, in microseconds; of a prefill the first layer plans."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        before = time.perf_counter()
        attention.begin(facts)
        times.append((time.perf_counter() - before) * 1e6)
    return median(times)


if __name__ == "__main__":
    sys.exit(main())
