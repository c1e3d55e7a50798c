"""Writes a large sharded GGUF of random but valid blocks, and measures what opening it costs. JSON lines.

    python benchmarks/synthetic_gguf.py --gb 8 --out FOLDER --check

The model has DeepSeek-V2-Lite's widths and as many layers as the size needs; its tokenizer is the embedded model's.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from ktcompile.weights.file import ModelFile
from ktcompile.weights.gguf_header import Value, read_header

HIDDEN, HEADS, LATENT, NOPE, ROPE, VALUE = 2048, 16, 512, 128, 64, 128
EXPERTS, USED, WIDTH, SHARED, DENSE = 64, 6, 1408, 2, 10944
LIMIT_SECONDS, LIMIT_MB = 5.0, 500.0  # for the page of `ktrans explain`

Type = gguf.GGMLQuantizationType
Tensor = tuple[str, tuple[int, ...], Type]  # name, shape rows first, type

_SCALES = {Type.Q4_K: (0, 2), Type.Q6_K: (208,), Type.Q5_0: (0,), Type.Q8_0: (0,)}  # where a block has fp16 scales
_POOL_BYTES = 32 << 20  # random blocks of a type are made once and written over and over
_ALIGNMENT = 32


def tensors_of(layer: int) -> list[Tensor]:
    """The tensors of a layer, the first one dense. Rows that are no multiple of 256 take a type with blocks of 32."""
    found: list[Tensor] = [
        ("attn_norm.weight", (HIDDEN,), Type.F32),
        ("attn_q.weight", (HEADS * (NOPE + ROPE), HIDDEN), Type.Q4_K),
        ("attn_kv_a_mqa.weight", (LATENT + ROPE, HIDDEN), Type.Q4_K),
        ("attn_kv_a_norm.weight", (LATENT,), Type.F32),
        ("attn_k_b.weight", (HEADS, LATENT, NOPE), Type.Q5_0),
        ("attn_v_b.weight", (HEADS, VALUE, LATENT), Type.Q4_K),
        ("attn_output.weight", (HIDDEN, HEADS * VALUE), Type.Q4_K),
        ("ffn_norm.weight", (HIDDEN,), Type.F32),
    ]
    if layer == 0:
        found += matrices("", (), DENSE)
    else:
        found.append(("ffn_gate_inp.weight", (EXPERTS, HIDDEN), Type.F32))
        found += matrices("_exps", (EXPERTS,), WIDTH) + matrices("_shexp", (), SHARED * WIDTH)
    return [(f"blk.{layer}.{name}", shape, kind) for name, shape, kind in found]


def matrices(suffix: str, leading: tuple[int, ...], width: int) -> list[Tensor]:
    """Gate, up and down of an MLP, or of all experts."""
    down = Type.Q6_K if width % 256 == 0 else Type.Q5_0
    return [
        (f"ffn_gate{suffix}.weight", (*leading, width, HIDDEN), Type.Q4_K),
        (f"ffn_up{suffix}.weight", (*leading, width, HIDDEN), Type.Q4_K),
        (f"ffn_down{suffix}.weight", (*leading, HIDDEN, width), down),
    ]


def nbytes_of(tensor: Tensor) -> int:
    """Bytes that a tensor takes in the file, padding not counted."""
    values, size = gguf.GGML_QUANT_SIZES[tensor[2]]
    return math.prod(tensor[1]) // values * size


def metadata(layers: int) -> dict[str, Value]:
    """DeepSeek-V2-Lite's, with the embedded model's tokenizer."""
    embedded = read_header(ModelFile(Path(str(files("ktcompile.assets") / "tiny-deepseek-v3-Q4_K_M.gguf")))).metadata
    own: dict[str, Value] = {
        "general.name": f"Synthetic DeepSeek-V2, {layers} layers",
        "deepseek2.block_count": layers,
        "deepseek2.context_length": 163840,
        "deepseek2.embedding_length": HIDDEN,
        "deepseek2.feed_forward_length": DENSE,
        "deepseek2.attention.head_count": HEADS,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
        "deepseek2.attention.kv_lora_rank": LATENT,
        "deepseek2.attention.key_length": LATENT + ROPE,
        "deepseek2.attention.value_length": LATENT,
        "deepseek2.attention.key_length_mla": NOPE + ROPE,
        "deepseek2.attention.value_length_mla": VALUE,
        "deepseek2.rope.dimension_count": ROPE,
        "deepseek2.rope.freq_base": 10000.0,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.expert_count": EXPERTS,
        "deepseek2.expert_used_count": USED,
        "deepseek2.expert_shared_count": SHARED,
        "deepseek2.expert_feed_forward_length": WIDTH,
        "deepseek2.expert_gating_func": 1,
        "deepseek2.expert_weights_scale": 1.0,
        "deepseek2.vocab_size": int(str(embedded["deepseek2.vocab_size"])),
    }
    return own | {key: value for key, value in embedded.items() if key.startswith("tokenizer.")}


def add_metadata(writer: gguf.GGUFWriter, values: dict[str, Value]) -> None:
    """Write every value with the type that llama.cpp gives it."""
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value if isinstance(value, list) else value.tolist())


def pool(kind: Type, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random blocks of a type with scales between 0 and 0.001; small numbers around 0 for F32."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    if kind == Type.F32:
        return rng.normal(0, 0.02, _POOL_BYTES // 4).astype(np.float32).view(np.uint8)
    blocks = rng.integers(0, 256, (_POOL_BYTES // size, size), dtype=np.uint8)
    for at in _SCALES[kind]:
        blocks[:, at : at + 2] = (rng.random((len(blocks), 1)) * 1e-3).astype(np.float16).view(np.uint8)
    return blocks.reshape(-1)


def write_shard(
    path: Path, values: dict[str, Value], tensors: list[Tensor], pools: dict[Type, NDArray[np.uint8]]
) -> None:
    """One file: header, then the tensors from the pools, with no more memory than those."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_metadata(writer, values)
    for name, shape, kind in tensors:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = nbytes_of((name, shape, kind))
        if kind == Type.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes)
        else:
            rows = (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(name, rows, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    for tensor in tensors:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        write_tensor(file, nbytes_of(tensor), pools[tensor[2]])
    file.write(bytes(-file.tell() % _ALIGNMENT))
    writer.close()


def write_tensor(file: BinaryIO, nbytes: int, blocks: NDArray[np.uint8]) -> None:
    """`nbytes` from the pool, again from its start when it ends: its length is a multiple of the block."""
    for start in range(0, nbytes, len(blocks)):
        file.write(memoryview(blocks[: min(len(blocks), nbytes - start)]))


def write(folder: Path, gigabytes: float, count: int) -> Path:
    """All shards; the first one's path. Prints how fast they were written."""
    vocabulary = int(str(metadata(1)["deepseek2.vocab_size"]))
    ends: list[Tensor] = [
        ("token_embd.weight", (vocabulary, HIDDEN), Type.Q4_K),
        ("output_norm.weight", (HIDDEN,), Type.F32),
        ("output.weight", (vocabulary, HIDDEN), Type.Q6_K),
    ]
    rest = gigabytes * 1e9 - sum(map(nbytes_of, [*ends, *tensors_of(0)]))
    layers = 1 + max(1, round(rest / sum(map(nbytes_of, tensors_of(1)))))
    units = [ends, *(tensors_of(i) for i in range(layers))]
    if not 1 <= count <= len(units):
        raise SystemExit(f"--shards {count}: {layers} layers make 1 to {len(units)}")
    parts = [units[len(units) * i // count : len(units) * (i + 1) // count] for i in range(count)]
    rng = np.random.default_rng(0)
    pools = {kind: pool(kind, rng) for kind in (*_SCALES, Type.F32)}
    folder.mkdir(parents=True, exist_ok=True)
    names = [folder / f"synthetic-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    start = time.perf_counter()
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        split: dict[str, Value] = {"split.no": i, "split.count": count, "split.tensors.count": sum(map(len, units))}
        write_shard(name, (metadata(layers) if i == 0 else {}) | split, [t for unit in part for t in unit], pools)
    os.sync()
    seconds, size = time.perf_counter() - start, sum(name.stat().st_size for name in names)
    print(
        json.dumps(
            {"step": "write", "layers": layers, "gb": size / 1e9, "seconds": seconds, "gb_s": size / 1e9 / seconds}
        )
    )
    return names[0]


def check(path: Path, command: str) -> bool:
    """Run `ktrans COMMAND path` as a user would; seconds and peak memory against the limits."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "ktcompile.cli", command, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    lines = child.stdout.read().count(b"\n")
    _, status, usage = os.wait4(child.pid, 0)
    seconds, peak_mb = time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6
    code = os.waitstatus_to_exitcode(status)
    child.returncode = code
    is_good = code == 0 and seconds <= LIMIT_SECONDS and peak_mb <= LIMIT_MB
    facts = {
        "step": command,
        "exit": code,
        "lines": lines,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    limits = {"peak_mb": peak_mb, "limit_seconds": LIMIT_SECONDS, "limit_mb": LIMIT_MB, "good": is_good}
    print(json.dumps(facts | limits))
    return is_good


def main() -> None:
    """Write, then check; exit 1 beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="size of all shards together, in 10^9 bytes")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--check", action="store_true", help="time `ktrans explain` on the model, in a process of its own"
    )
    parser.add_argument("--no-write", action="store_true", help="check what an earlier run wrote")
    arguments = parser.parse_args()
    if arguments.no_write:
        first = next(iter(sorted(arguments.out.glob("synthetic-00001-of-*.gguf"))), None)
        if first is None:
            raise SystemExit(f"{arguments.out} has no synthetic-00001-of-*.gguf")
    else:
        first = write(arguments.out, arguments.gb, arguments.shards)
    if arguments.check and not check(first, "explain"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
