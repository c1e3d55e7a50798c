"""Writes a large GGUF of random but valid blocks in the shape of a known model, as fast as memory takes it. JSON lines.

    python benchmarks/synthetic.py --model v3 --layers 2 --out /dev/shm
    python benchmarks/synthetic.py --model v2-lite --gb 8 --shards 4 --out FOLDER --check

Widths, router and positions are the model's; `--layers` or `--gb` say how many of its layers with experts there are.
Types are those of llama.cpp's Q4_K_M. The tokenizer is the embedded model's, with tokens that nothing spells up to the
model's vocabulary.
"""

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktcompile.gguf_config import metadata_fields
from ktcompile.weights.file import ModelFile
from ktcompile.weights.ggml import BY_NAME
from ktcompile.weights.gguf_header import Value, read_header

LIMIT_SECONDS, LIMIT_MB = 5.0, 500.0  # for the page of `ktrans explain`

_STEP_BYTES = 32 << 20
"""Random blocks of a type are made once, at most so many bytes, and written over and over, so many at a time."""

_ALIGNMENT = 32
_DEVIATION, _FAN_IN = 0.02, 7168  # of weights that read so many values; with others, results of the same size
_UNUSED = 5  # token_type of a token that nothing spells


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `layers` counts those with experts. Latent attention if `kv_lora`, else grouped queries."""

    name: str
    hidden: int
    heads: int
    experts: int
    used: int
    width: int
    vocabulary: int
    layers: int
    context: int
    theta: float
    dense: int = 0  # width of the MLP of the one layer without experts; 0: no such layer
    shared: int = 0
    groups: int = 1
    groups_used: int = 1
    is_sigmoid: bool = False
    scale: float = 1.0
    q_lora: int = 0
    kv_lora: int = 0
    rope: int = 0
    nope: int = 0
    value: int = 0
    mscale: float = 0.0  # of YaRN, 40 times 4096 tokens; 0: plain positions
    kv_heads: int = 0
    head: int = 0


SHAPES = {
    "v3": Shape(
        "DeepSeek-V3", 7168, 128, 256, 8, 2048, 129280, 58, 163840, 1e4, dense=18432, shared=1, groups=8,
        groups_used=4, is_sigmoid=True, scale=2.5, q_lora=1536, kv_lora=512, rope=64, nope=128, value=128, mscale=1.0,
    ),
    "v2-lite": Shape(
        "DeepSeek-V2-Lite", 2048, 16, 64, 6, 1408, 102400, 26, 163840, 1e4, dense=10944, shared=2, kv_lora=512,
        rope=64, nope=128, value=128, mscale=0.707,
    ),
    "qwen3-30b": Shape(
        "Qwen3-30B-A3B", 2048, 32, 128, 8, 768, 151936, 48, 40960, 1e6, dense=0, kv_heads=4, head=128
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. `fan_in`: values that a result is summed from; 0: the tensor is all ones."""

    name: str
    shape: tuple[int, ...]  # rows first
    type: str
    fan_in: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding not counted."""
        return BY_NAME[self.type].row_bytes(self.shape[-1]) * math.prod(self.shape[:-1])


def _matrix(name: str, shape: tuple[int, ...], wanted: str, fan_in: int = 0) -> Tensor:
    """A matrix in the wanted type, or in what llama.cpp takes where rows are no multiple of 256."""
    fallback = {"q4_k": "q5_0", "q6_k": "q8_0"}
    return Tensor(name, shape, wanted if shape[-1] % 256 == 0 else fallback[wanted], fan_in or shape[-1])


def _mlp(suffix: str, leading: tuple[int, ...], hidden: int, width: int, down: str) -> list[Tensor]:
    """Gate, up and down of an MLP, or of all experts."""
    return [
        _matrix(f"ffn_gate{suffix}.weight", (*leading, width, hidden), "q4_k"),
        _matrix(f"ffn_up{suffix}.weight", (*leading, width, hidden), "q4_k"),
        _matrix(f"ffn_down{suffix}.weight", (*leading, hidden, width), down),
    ]


def _norm(name: str, width: int) -> Tensor:
    return Tensor(f"{name}.weight", (width,), "f32", 0)


def _latent(s: Shape, finer: str) -> list[Tensor]:
    key = s.nope + s.rope
    found = [
        _matrix("attn_kv_a_mqa.weight", (s.kv_lora + s.rope, s.hidden), finer),
        _norm("attn_kv_a_norm", s.kv_lora),
        _matrix("attn_k_b.weight", (s.heads, s.kv_lora, s.nope), "q4_k", fan_in=s.kv_lora),  # stored turned
        _matrix("attn_v_b.weight", (s.heads, s.value, s.kv_lora), finer),
        _matrix("attn_output.weight", (s.hidden, s.heads * s.value), "q4_k"),
    ]
    if not s.q_lora:
        return [_matrix("attn_q.weight", (s.heads * key, s.hidden), "q4_k"), *found]
    return [
        _matrix("attn_q_a.weight", (s.q_lora, s.hidden), "q4_k"),
        _norm("attn_q_a_norm", s.q_lora),
        _matrix("attn_q_b.weight", (s.heads * key, s.q_lora), "q4_k"),
        *found,
    ]


def _grouped(s: Shape, finer: str) -> list[Tensor]:
    return [
        _matrix("attn_q.weight", (s.heads * s.head, s.hidden), "q4_k"),
        _matrix("attn_k.weight", (s.kv_heads * s.head, s.hidden), "q4_k"),
        _matrix("attn_v.weight", (s.kv_heads * s.head, s.hidden), finer),
        _norm("attn_q_norm", s.head),
        _norm("attn_k_norm", s.head),
        _matrix("attn_output.weight", (s.hidden, s.heads * s.head), "q4_k"),
    ]


def tensors_of(s: Shape, layer: int) -> list[Tensor]:
    """The tensors of a layer. llama.cpp's `use_more_bits` says which layers have finer values and down matrices."""
    count = s.layers + bool(s.dense)
    is_finer = layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2
    finer = "q6_k" if is_finer else "q4_k"
    found = [_norm("attn_norm", s.hidden), *(_latent if s.kv_lora else _grouped)(s, finer), _norm("ffn_norm", s.hidden)]
    if s.dense and layer == 0:
        found += _mlp("", (), s.hidden, s.dense, finer)
    else:
        found.append(Tensor("ffn_gate_inp.weight", (s.experts, s.hidden), "f32", s.hidden))
        if s.is_sigmoid:
            found.append(Tensor("exp_probs_b.bias", (s.experts,), "f32", _FAN_IN))
        found += _mlp("_exps", (s.experts,), s.hidden, s.width, finer)
        found += _mlp("_shexp", (), s.hidden, s.shared * s.width, finer) if s.shared else []
    return [Tensor(f"blk.{layer}.{t.name}", t.shape, t.type, t.fan_in) for t in found]


def ends_of(s: Shape) -> list[Tensor]:
    """What is in no layer."""
    return [
        Tensor("token_embd.weight", (s.vocabulary, s.hidden), "q4_k", s.hidden),
        _norm("output_norm", s.hidden),
        Tensor("output.weight", (s.vocabulary, s.hidden), "q6_k", s.hidden),
    ]


# ------------------------------------------------------------------------------------------------ metadata


def config_of(s: Shape) -> dict[str, object]:
    """The fields of the Hugging Face configuration."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": s.theta}
    if s.mscale:
        yarn = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
        rope |= {"rope_type": "yarn", **yarn, "mscale": s.mscale, "mscale_all_dim": s.mscale}
    found: dict[str, object] = {
        "vocab_size": s.vocabulary,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers + bool(s.dense),
        "num_attention_heads": s.heads,
        "num_experts_per_tok": s.used,
        "moe_intermediate_size": s.width,
        "max_position_embeddings": s.context,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
    }
    if not s.kv_lora:
        heads = {"num_key_value_heads": s.kv_heads, "head_dim": s.head}
        experts = {"num_experts": s.experts, "norm_topk_prob": True, "intermediate_size": s.width * s.used}
        return found | {"model_type": "qwen3_moe"} | heads | experts
    found |= {
        "model_type": "deepseek_v3" if s.is_sigmoid else "deepseek_v2",
        "topk_method": "noaux_tc" if s.is_sigmoid else "greedy",
        "norm_topk_prob": s.is_sigmoid,
        "routed_scaling_factor": s.scale,
        "n_routed_experts": s.experts,
        "n_shared_experts": s.shared,
        "n_group": s.groups,
        "topk_group": s.groups_used,
        "intermediate_size": s.dense,
        "first_k_dense_replace": int(bool(s.dense)),
        "kv_lora_rank": s.kv_lora,
        "qk_rope_head_dim": s.rope,
        "qk_nope_head_dim": s.nope,
        "v_head_dim": s.value,
    }
    return found | {"q_lora_rank": s.q_lora or None}


def metadata(s: Shape) -> dict[str, Value]:
    """What the file says of itself: the configuration, and the embedded model's tokenizer."""
    path = Path(str(files("ktcompile.assets") / "tiny-deepseek-v3-Q4_K_M.gguf"))
    embedded = read_header(ModelFile(path)).metadata
    tokenizer = {key: value for key, value in embedded.items() if key.startswith("tokenizer.")}
    tokens, types = tokenizer["tokenizer.ggml.tokens"], tokenizer["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, np.ndarray)
    lacking = s.vocabulary - len(tokens)
    if lacking < 0:
        raise SystemExit(f"a vocabulary of {s.vocabulary}: the tokenizer has {len(tokens)} tokens")
    tokenizer["tokenizer.ggml.tokens"] = tokens + [f"[unused {i}]" for i in range(lacking)]
    tokenizer["tokenizer.ggml.token_type"] = np.concatenate([types, np.full(lacking, _UNUSED, types.dtype)])
    name: dict[str, Value] = {"general.name": f"Synthetic {s.name}, {s.layers} layers with experts"}
    return metadata_fields(config_of(s)) | name | tokenizer


_TYPES = {"uint32": (4, "<I"), "int32": (5, "<i"), "float32": (6, "<f"), "bool": (7, "<?")}


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """A metadata value with its type, as llama.cpp writes it: integers are uint32, numbers float32."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, _TYPES[value.dtype.name][0], len(value)) + value.tobytes()
    code, form = _TYPES["bool" if isinstance(value, bool) else "uint32" if isinstance(value, int) else "float32"]
    return struct.pack("<I", code) + struct.pack(form, value)


def header(values: Mapping[str, Value], tensors: Sequence[Tensor]) -> tuple[bytes, list[int]]:
    """The bytes before the data, and where in the file each tensor goes."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    out += [_string(key) + _value(value) for key, value in values.items()]
    offsets, at = [], 0
    for t in tensors:
        dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
        out.append(_string(t.name) + dims + struct.pack("<IQ", BY_NAME[t.type].code, at))
        offsets.append(at)
        at += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT
    raw = b"".join(out)
    raw += bytes(-len(raw) % _ALIGNMENT)
    return raw, [len(raw) + at for at in offsets]


# ------------------------------------------------------------------------------------------------ blocks


def blocks_of(kind: str, fan_in: int, nbytes: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Up to `nbytes` of random blocks whose values have mean 0, deviation 0.02 * sqrt(7168 / fan_in); ones for 0."""
    if fan_in == 0:
        return np.ones(nbytes // 4, np.float32).view(np.uint8)
    deviation = _DEVIATION * math.sqrt(_FAN_IN / fan_in)
    if kind == "f32":
        return (rng.standard_normal(nbytes // 4, np.float32) * np.float32(deviation)).view(np.uint8)
    size = BY_NAME[kind].block_bytes
    blocks = np.frombuffer(rng.bytes(nbytes // size * size), np.uint8).reshape(-1, size).copy()
    vary = rng.uniform(0.8, 1.2, (len(blocks), 1)) * deviation
    turned = vary * rng.choice([-1.0, 1.0], vary.shape)  # codes reach one further down than up
    if kind == "q4_k":  # d * scale * q - dmin * min: equal scales and mins, so that dmin = 7.5 d centres each run of 32
        blocks[:, 8:12] = blocks[:, 4:8]
        low = blocks[:, 12:16] & 15
        blocks[:, 12:16] = low | low << 4
        d = vary / math.sqrt((63 * 127 / 6) * (255 / 12))
        blocks[:, 0:2], blocks[:, 2:4] = _half(d), _half(7.5 * d)
    elif kind == "q6_k":
        blocks[:, 208:210] = _half(vary / math.sqrt((65535 / 12) * (4095 / 12)))
    elif kind == "q5_0":
        blocks[:, 0:2] = _half(turned / math.sqrt(1023 / 12))
    elif kind == "q8_0":
        blocks[:, 0:2] = _half(turned / math.sqrt(65535 / 12))
    else:
        raise ValueError(f"no random blocks of {kind}; q4_k, q6_k, q5_0, q8_0 and f32 are made")
    return blocks.reshape(-1)


def _half(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    return values.astype(np.float16).view(np.uint8)


def pieces(nbytes: int, blocks: NDArray[np.uint8], start: int) -> Iterator[tuple[int, memoryview]]:
    """(byte of the tensor, bytes to write there): the blocks from byte `start` on, and again when they end."""
    view, done, at = blocks.data, 0, start
    while done < nbytes:
        count = min(nbytes - done, len(view) - at)
        yield done, view[at : at + count]
        done, at = done + count, 0


Pools = Mapping[tuple[str, int], NDArray[np.uint8]]


def pools_for(tensors: Sequence[Tensor], workers: ThreadPoolExecutor) -> Pools:
    """Random blocks for every type and fan-in of these tensors, no more than the largest of them needs."""
    sizes: dict[tuple[str, int], int] = {}
    for t in tensors:
        sizes[t.type, t.fan_in] = max(sizes.get((t.type, t.fan_in), 0), t.nbytes)
    jobs = {
        key: workers.submit(blocks_of, *key, min(size, _STEP_BYTES), np.random.default_rng(i))
        for i, (key, size) in enumerate(sizes.items())
    }
    return {key: job.result() for key, job in jobs.items()}


def write_file(
    path: Path, values: Mapping[str, Value], tensors: Sequence[Tensor], pools: Pools, workers: ThreadPoolExecutor
) -> int:
    """One file, its tensors by several threads; returns its bytes. Takes no more memory than the pools."""
    raw, offsets = header(values, tensors)
    size = -(-(offsets[-1] + tensors[-1].nbytes) // _ALIGNMENT) * _ALIGNMENT
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, raw, 0)
        jobs = []
        for i, (t, offset) in enumerate(zip(tensors, offsets, strict=True)):
            blocks, block = pools[t.type, t.fan_in], BY_NAME[t.type].block_bytes
            start = i * 9973 % (len(blocks) // block) * block  # no two tensors begin alike
            jobs += [workers.submit(_put, fd, part, offset + at) for at, part in pieces(t.nbytes, blocks, start)]
        for job in jobs:
            job.result()
        os.fsync(fd)
    finally:
        os.close(fd)
    return size


def _put(fd: int, part: memoryview, at: int) -> None:
    while part:
        done = os.pwrite(fd, part, at)
        part, at = part[done:], at + done


def write(s: Shape, folder: Path, count: int = 1, threads: int | None = None) -> Path:
    """All shards; the first one's path. Prints how fast they were written."""
    start = time.perf_counter()
    layers = s.layers + bool(s.dense)
    units = [ends_of(s), *(tensors_of(s, i) for i in range(layers))]
    if not 1 <= count <= len(units):
        raise SystemExit(f"--shards {count}: {layers} layers make 1 to {len(units)}")
    parts = [units[len(units) * i // count : len(units) * (i + 1) // count] for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    names = [folder / f"synthetic-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    values, size = metadata(s), 0
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as workers:
        pools = pools_for([t for unit in units for t in unit], workers)
        ready = time.perf_counter()
        for i, (name, part) in enumerate(zip(names, parts, strict=True)):
            split: dict[str, Value] = {"split.no": i, "split.count": count, "split.tensors.count": sum(map(len, units))}
            given = (values if i == 0 else {}) | (split if count > 1 else {})
            size += write_file(name, given, [t for unit in part for t in unit], pools, workers)
    end = time.perf_counter()
    facts = {"step": "write", "model": s.name, "layers": s.layers, "path": str(names[0]), "bytes": size}
    times = {"seconds": end - start, "random_s": ready - start, "gb_s": size / 1e9 / (end - start)}
    print(json.dumps(facts | times), flush=True)
    return names[0]


def layers_for(s: Shape, gigabytes: float) -> int:
    """How many layers with experts make a file of this size."""
    rest: float = gigabytes * 1e9 - sum(t.nbytes for t in (*ends_of(s), *(tensors_of(s, 0) if s.dense else ())))
    return max(1, round(rest / sum(t.nbytes for t in tensors_of(s, 1))))


# ------------------------------------------------------------------------------------------------ command


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
    parser.add_argument("--model", choices=SHAPES, default="v3")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, help="layers with experts; default: all the model has")
    size.add_argument("--gb", type=float, help="as many layers as make this size, in 10^9 bytes")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--threads", type=int, help="that write; default: all cores")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--check", action="store_true", help="time `ktrans explain` on the model, in a process of its own"
    )
    parser.add_argument("--no-write", action="store_true", help="check what an earlier run wrote")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    layers = arguments.layers if arguments.gb is None else layers_for(shape, arguments.gb)
    if layers is not None and layers < 1:
        parser.error(f"--layers {layers}: 1 or more")
    if arguments.no_write:
        first = next(iter(sorted(arguments.out.glob("synthetic-00001-of-*.gguf"))), None)
        if first is None:
            raise SystemExit(f"{arguments.out} has no synthetic-00001-of-*.gguf")
    else:
        sized = shape if layers is None else replace(shape, layers=layers)
        first = write(sized, arguments.out, arguments.shards, arguments.threads)
    if arguments.check and not check(first, "explain"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
