"""Weights that stay encoded on a GPU decode to the bits that `ktcompile.weights` decodes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx

from ktcompile import Device, Packed, Parts, Region, Target
from ktcompile.backends.encoded import DECODERS, decode_rows, decoded, encoded_bytes, keepable, pack_encoded, wasteful
from ktcompile.verify import gib
from ktcompile.weights import (
    GGUFSource,
    ImaginedSource,
    Part,
    SafetensorsSource,
    TensorSpec,
    WeightSource,
    decode,
    ggml,
    values,
)
from ktcompile.weights.source import everywhere, fp8_block

GGUF = GGUFSource(str(files("ktcompile.assets") / "tiny-deepseek-v3-Q4_K_M.gguf"))
FP8 = SafetensorsSource(Path(__file__).parent / "data" / "tiny-deepseek-v3", layers=6)
SOURCES: Mapping[str, WeightSource] = {"gguf": GGUF, "fp8": FP8}

ENCODINGS = sorted(DECODERS)
_EDGES = (0x00, 0x01, 0x0F, 0x7B, 0x7C, 0x7E, 0x7F, 0x80, 0xF0, 0xFC, 0xFF)
"""Bytes that make scales zero, subnormal, largest, infinite and NaN, and integers smallest and largest."""


def gpu(capacity: int) -> Target:
    """One device that calls itself a GPU; torch computes on the CPU."""
    return Target((Device("cpu:1", "cuda", capacity, 1e12),))


TARGET = gpu(8 << 20)


# ------------------------------------------------------------------------------------------------ decoders


def same_bits(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float32
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(torch.int32)[~nan], want.view(torch.int32)[~nan])


def by_ggml(raw: Tensor, encoding: str) -> Tensor:
    return torch.from_numpy(ggml.BY_NAME[encoding].decode(raw.numpy()))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), blocks=st.integers(1, 3))
@example(seed=0, rows=1, blocks=1)
@example(seed=1, rows=300, blocks=2)  # every byte at every place, infinite and NaN scales
def test_random_blocks(encoding: str, seed: int, rows: int, blocks: int) -> None:
    raw = noise(seed, rows, blocks * DECODERS[encoding][0])
    same_bits(decode_rows(raw, encoding), by_ggml(raw, encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(data=st.data())
def test_arbitrary_blocks(encoding: str, data: st.DataObject) -> None:
    raw = torch.tensor([list(data.draw(st.binary(min_size=(n := DECODERS[encoding][0]), max_size=n)))]).byte()
    same_bits(decode_rows(raw, encoding), by_ggml(raw, encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_edge_blocks(encoding: str) -> None:
    """Blocks of one byte but for their scales, which stand first or last: zero, subnormal, infinite, NaN."""
    size = DECODERS[encoding][0]
    scales = [[low, high] for low in (0x00, 0x01, 0xFF) for high in _EDGES]
    first = [[*a, *b] + [byte] * (size - 4) for a in scales for b in (a, [0, 0]) for byte in _EDGES]
    last = [[byte] * (size - 2) + scale for scale in scales for byte in _EDGES]
    raw = torch.tensor([*first, *last], dtype=torch.uint8)
    want = by_ggml(raw, encoding)
    assert want.isnan().any() and want.isinf().any() and (want == 0).any()
    same_bits(decode_rows(raw, encoding), want)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_blocks_are_those_of_ggml(encoding: str) -> None:
    assert DECODERS[encoding][0] == ggml.BY_NAME[encoding].block_bytes


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 1, 1), (2, 3, 4, 1), (4,)], ids=str)
def test_any_number_of_dimensions(encoding: str, shape: Sequence[int]) -> None:
    """Experts are `[E, rows, row bytes]`; what is left of an axis need not be contiguous."""
    raw = noise(3, *shape[:-1], shape[-1] * DECODERS[encoding][0])
    got = decode_rows(raw, encoding)
    assert got.shape == (*shape[:-1], shape[-1] * ggml.BY_NAME[encoding].block_values)
    same_bits(got, by_ggml(raw, encoding))
    if len(shape) > 1:
        same_bits(decode_rows(raw[::2], encoding), got[::2].contiguous())


# ------------------------------------------------------------------------------------------------ FP8


def packed_fp8(raw: Tensor, scale: Tensor, block: int = 128) -> Packed:
    """An FP8 parameter as `pack_encoded` leaves it."""
    spec = TensorSpec(tuple(raw.shape), torch.float32, f"fp8_block{block}", raw.nbytes + scale.nbytes)
    part = Part("w", spec, everywhere(raw.shape), scale="w_scale_inv")
    return Packed("encoded", {"w/0": raw, "w/0/scale": scale}, ({"w": (part,)}, {"w": torch.float32}))


def fp8(shape: Sequence[int], block: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values of every bit pattern but NaN, and scales, the last ones of partial blocks."""
    raw = noise(seed, *shape)
    raw[(raw & 0x7F) == 0x7F] = 0
    blocks = (*shape[:-2], *(math.ceil(n / block) for n in shape[-2:]))
    return raw.view(torch.float8_e4m3fn), torch.rand(blocks, generator=torch.Generator().manual_seed(seed)) + 0.5


@given(
    rows=st.sampled_from([1, 127, 128, 129, 256, 300]),
    cols=st.sampled_from([1, 96, 128, 130, 257]),
    experts=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
@example(rows=129, cols=130, experts=2, seed=0)
def test_fp8_blocks(rows: int, cols: int, experts: int | None, seed: int) -> None:
    shape = (rows, cols) if experts is None else (experts, rows, cols)
    raw, scale = fp8(shape, 128, seed)
    same_bits(decoded(packed_fp8(raw, scale), "w"), decode(raw, "fp8_block128", scale))


@pytest.mark.parametrize("block", [32, 64, 256])
def test_fp8_blocks_of_other_sizes(block: int) -> None:
    raw, scale = fp8((300, 130), block, 0)
    assert fp8_block(f"fp8_block{block}") == block
    same_bits(decoded(packed_fp8(raw, scale, block), "w"), decode(raw, f"fp8_block{block}", scale))


# ------------------------------------------------------------------------------------------------ whole parameters


@dataclass(frozen=True)
class Case:
    """A region of some parameters, and where they are stored."""

    region: Region
    parts: Parts


def case(source: WeightSource, keys: Sequence[str], dtype: torch.dtype = torch.float32) -> Case:
    """A region that reads these parameters, annotated as `load` does, placed on the GPU."""
    graph = fx.Graph()
    nodes = []
    for i, key in enumerate(keys):
        spec, node = source.spec(key), graph.placeholder(f"w{i}")
        val = torch.empty(spec.shape, dtype=dtype, device="meta")
        node.meta.update(val=val, weight=key, nbytes=spec.nbytes, encoding=spec.encoding, source=source)
        nodes.append(node)
    root = torch.nn.Module()
    root.add_module("body", torch.nn.Identity())
    call = graph.call_module("body", tuple(nodes))
    leaves = tuple(key.rpartition(".")[0].rpartition(".")[2] + "." + key.rpartition(".")[2] for key in keys)
    call.meta.update(path="region", cls="Region", op="glue", binding=None, leaves=leaves, device="cpu:1")
    graph.output(call)
    region = Region(next(n for n in fx.GraphModule(root, graph).graph.nodes if n.op == "call_module"))
    region.node.meta.update(call.meta)
    return Case(region, Parts(source, dict(zip(leaves, keys, strict=True))))


def modules(source: WeightSource) -> Iterator[list[str]]:
    """The parameters of each module with children of its own (`model.layers.0.self_attn`)."""
    keys = sorted(source.keys())
    for _, group in groupby(keys, lambda key: key.removesuffix(".weight").rpartition(".")[0]):
        yield list(group)


WHOLE = [("gguf", keys) for keys in modules(GGUF)] + [
    ("fp8", keys) for keys in modules(FP8) if keys[0].startswith("model.layers.1.")
]
IDS = [f"{name}-{keys[0].removesuffix('.weight').rpartition('.')[0] or keys[0]}" for name, keys in WHOLE]


@pytest.mark.parametrize(("name", "keys"), WHOLE, ids=IDS)
def test_every_parameter(name: str, keys: list[str]) -> None:
    """Packed and decoded it is what a CPU reads, and takes the bytes that were announced."""
    source = SOURCES[name]
    made = case(source, keys)
    packed = pack_encoded(made.parts, made.region, TARGET)
    assert packed.nbytes == encoded_bytes(made.region)
    kept = {leaf for leaf, key in made.parts.keys.items() if keepable(source, key)}
    assert set(packed.tensors) & set(made.parts.keys) == set(made.parts.keys) - kept
    for leaf, key in made.parts.keys.items():
        same_bits(decoded(packed, leaf), values(source, key))


@pytest.mark.parametrize("name", SOURCES)
def test_a_compute_type_of_16_bits(name: str) -> None:
    """Decoded in fp32, then rounded once."""
    keys = [k for k in SOURCES[name].keys() if k.startswith("model.layers.1.self_attn.")]  # noqa: SIM118
    made = case(SOURCES[name], keys, torch.bfloat16)
    packed = pack_encoded(made.parts, made.region, TARGET)
    assert packed.nbytes == encoded_bytes(made.region)
    for leaf, key in made.parts.keys.items():
        got = decoded(packed, leaf)
        assert got.dtype == torch.bfloat16 and torch.equal(got, values(SOURCES[name], key, torch.bfloat16))


def test_what_stays_encoded() -> None:
    """All that is quantised as a whole; not kv_b_proj, which a GGUF has in parts of heads, half of them transposed."""
    left = {k for k in GGUF.keys() if not keepable(GGUF, k) and GGUF.spec(k).encoding != "f32"}  # noqa: SIM118
    assert left == {f"model.layers.{i}.self_attn.kv_b_proj.weight" for i in range(6)}
    assert len(GGUF.parts("model.layers.0.self_attn.kv_b_proj.weight")) > 2
    assert keepable(FP8, "model.layers.0.self_attn.kv_b_proj.weight")
    assert keepable(GGUF, "model.layers.1.mlp.experts.gate_up_proj")
    assert not keepable(FP8, "model.layers.1.mlp.experts.gate_up_proj")  # a tensor an expert
    assert not keepable(GGUF, "model.norm.weight") and not keepable(None, "model.norm.weight")


class TwoExperts:
    """FP8 experts in safetensors are a tensor each; with two of them they are no more parts than gate and up."""

    def __init__(self) -> None:
        self.stored = [fp8((128, 256), 128, seed) for seed in (0, 1)]

    def keys(self) -> list[str]:
        return ["experts.down_proj"]

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec((2, 128, 256), torch.float32, "fp8_block128", sum(p.spec.nbytes for p in self.parts(key)))

    def parts(self, key: str) -> tuple[Part, ...]:
        spec = TensorSpec((128, 256), torch.float32, "fp8_block128", 128 * 256 + 8)
        return tuple(Part(str(i), spec, (slice(i, i + 1), *everywhere((128, 256))), scale=str(i)) for i in (0, 1))

    def read(self, part: Part) -> Tensor:
        return self.stored[int(part.name)][0]

    def read_scale(self, part: Part) -> Tensor:
        return self.stored[int(part.name)][1]


def test_parts_go_where_they_belong() -> None:
    source = TwoExperts()
    made = case(source, ["experts.down_proj"])
    packed = pack_encoded(made.parts, made.region, TARGET)
    same_bits(decoded(packed, "experts.down_proj"), values(source, "experts.down_proj"))


# ------------------------------------------------------------------------------------------------ when


def test_wasteful_says_why() -> None:
    keys = [k for k in GGUF.keys() if k.startswith("model.layers.0.self_attn.")]  # noqa: SIM118
    plain = sum(math.prod(GGUF.spec(k).shape) * 4 for k in keys)
    made = [case(GGUF, keys) for _ in range(2)]
    assert wasteful(made[0].region, gpu(plain)) is None  # a fifth stays free
    why = f"decoded, all weights of cpu:1 are {gib(plain)} and fit"
    assert wasteful(made[1].region, gpu(plain * 5 // 4 + 1)) == why
    assert encoded_bytes(made[0].region) < plain
    norm = case(GGUF, ["model.norm.weight"]).region
    assert wasteful(norm, TARGET) == "none of its weights is quantised as a whole"


def test_wasteful_of_imagined_weights() -> None:
    """Plans of a configuration ask it, too."""
    source = ImaginedSource({"mlp.up_proj.weight": (512, 256)}, "q4_k", 1)
    assert wasteful(case(source, ["mlp.up_proj.weight"]).region, gpu(512 * 256)) is None
    assert encoded_bytes(case(source, ["mlp.up_proj.weight"]).region) == 512 * 144
