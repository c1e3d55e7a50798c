"""A one-layer model stored in each ggml type, run by `torch.compile(model, backend="ktrans")` from its GGUF file."""

from functools import cache
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import pytest
import tiny
import torch
from tolerances import TOLERANCE
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ktcompile.dynamo
from ktcompile.backends import native
from ktcompile.gguf_config import metadata_fields
from ktcompile.target import Target, detect
from ktcompile.weights import GGUFSource, ggml, values
from ktcompile.weights.names import exports

SCALES = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "tq1_0": (52,), "tq2_0": (64,)}
SCALES |= dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2))
"""Where the fp16 scales of a block lie, if not in its first two bytes alone."""

CONFIG = tiny.config(
    "qwen3_moe",
    num_hidden_layers=1,
    hidden_size=256,
    head_dim=64,
    moe_intermediate_size=256,
    num_experts=4,
    num_experts_per_tok=2,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
IDS = tiny.ids(2, 11)


def blocks(kind: ggml.BlockType, rows: int, cols: int, seed: int) -> np.ndarray:
    """Random rows with values about as large as a trained matrix's: every bit is random but those of the scales."""
    rng = np.random.default_rng(seed)
    if kind.block_values == 1:
        value = rng.normal(0, cols**-0.5, (rows, cols)).astype(np.float32)
        raw = value.view(np.uint32) >> 16 if kind.name == "bf16" else value
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[kind.name]
        return raw.astype(dtype).view(np.uint8)
    raw = rng.integers(0, 256, (rows * cols // kind.block_values, kind.block_bytes), dtype=np.uint8)
    if kind.name == "mxfp4":
        raw[:, 0] = rng.integers(118, 122, len(raw))  # a power of two
    elif kind.name == "nvfp4":
        raw[:, :4] = rng.integers(8, 40, (len(raw), 4))  # UE4M3
    elif kind.name == "iq1_m":  # the scale is in the high nibbles of four 16-bit words
        words = raw[:, 48:56].view(np.uint16)
        half = rng.uniform(0.002, 0.004, len(raw)).astype(np.float16).view(np.uint16)
        for i in range(4):
            words[:, i] = (words[:, i] & 0x0FFF) | ((half >> (4 * i) & 15) << 12)
    else:
        for at in SCALES.get(kind.name, (0,)):
            raw[:, at : at + 2] = rng.uniform(0.5, 1, (len(raw), 1)).astype(np.float16).view(np.uint8)
        size = kind.decode(raw[:256]).std() * cols**0.5
        for at in SCALES.get(kind.name, (0,)):
            half = raw[:, at : at + 2].copy().view(np.float16).astype(np.float32) / size
            raw[:, at : at + 2] = half.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@cache
def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in AutoModelForCausalLM.from_config(CONFIG).state_dict().items()}


def write(kind: ggml.BlockType, path: Path) -> Path:
    """The file: every matrix in blocks of the type, vectors and the router in f32."""
    fields = CONFIG.to_dict()
    metadata = metadata_fields(fields)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in metadata.items():
        if key != "general.architecture":
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    rng = np.random.default_rng(0)
    for seed, export in enumerate(exports("qwen3moe", shapes(), fields)):
        if export.exact:
            writer.add_tensor(export.name, rng.normal(1, 0.1, export.shape).astype(np.float32))
            continue
        rows, cols = int(np.prod(export.shape[:-1])), export.shape[-1]
        raw = blocks(kind, rows, cols, seed).reshape(*export.shape[:-1], -1)
        writer.add_tensor(export.name, raw, raw_dtype=gguf.GGMLQuantizationType(kind.code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def eager(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Tensor]:
    """The Hugging Face model of the decoded weights, and its logits in fp32."""
    source = GGUFSource(path)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).eval()
    model.load_state_dict({key: values(source, key) for key in shapes()}, strict=True)
    assert source.unused() == ()
    logits = model(IDS).logits
    assert logits.isfinite().all() and 0.01 < logits.std() < 100
    return model.to(dtype), logits


@torch.no_grad()
def compiled(model: PreTrainedModel, path: Path, moe: str, tmp_path: Path) -> Tensor:
    """Logits through the backend: routed experts by one kernel; the model's own weights are spoilt first."""
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    rules = tmp_path / f"{moe}.yaml"
    rules.write_text(f"extends: base\npipeline:\n  - choose-kernels:\n      moe: [{moe}]\n")
    torch.compiler.reset()
    ktcompile.dynamo.reset()
    options = {"weights": str(path), "rules": str(rules), "target": Target((detect().host,))}
    run = torch.compile(model, backend="ktrans", options=options)
    found: Tensor = run(IDS, use_cache=False).logits
    plans = ktcompile.dynamo.plans()
    assert {r.kernel for p in plans for r in p.rows if r.op == "moe"} == {moe}
    return found.float()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def of_a_token(got: Tensor, want: Tensor) -> float:
    """Of most tokens: of one that rounding gave another expert, the whole error is that of the choice."""
    return median(map(relative, got.flatten(0, 1), want.flatten(0, 1)))


@pytest.mark.parametrize("kind", ggml.TYPES, ids=lambda t: t.name)
def test_reference_kernels(kind: ggml.BlockType, tmp_path: Path) -> None:
    path = write(kind, tmp_path / "one.gguf")
    model, want = eager(path)
    got = compiled(model, path, "reference", tmp_path)
    assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("kind", ggml.TYPES, ids=lambda t: t.name)
def test_c_kernels(kind: ggml.BlockType, tmp_path: Path) -> None:
    """The best fp32 kernel that this machine has, for every type; types that no kernel reads are widened at load."""
    path = write(kind, tmp_path / "one.gguf")
    model, want = eager(path)
    best = next(isa for isa in ("avx512", "avx2", "scalar") if native.isas()[isa] is None)
    assert relative(compiled(model, path, best, tmp_path), want) <= TOLERANCE["f32"]


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512_vnni"])
@pytest.mark.parametrize("name", ["bf16", "q8_0", "q5_0", "q4_k", "q6_k", "iq3_s", "mxfp4"])
def test_rounding_c_kernels(name: str, isa: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    missing = native.isas()[isa]
    why = missing or native.refuses(isa, [name if name in native.TYPES else "bf16"])
    if why is not None:
        assert missing or (isa == "avx512_vnni" and name in ("bf16", "iq3_s")), why
        return
    path = write(ggml.BY_NAME[name], tmp_path / "one.gguf")
    model, want = eager(path, dtype)
    with torch.no_grad():
        rounded = of_a_token(model(IDS).logits.float(), want)  # the dense part rounds too
    assert of_a_token(compiled(model, path, isa, tmp_path), want) <= 1.25 * rounded
