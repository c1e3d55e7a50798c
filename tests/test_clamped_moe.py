"""The experts of gpt-oss on the CPU kernels: from every form of their weights, exact, and what the page says."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from native.reference import route
from safetensors.torch import save_file
from tolerances import CHAIN, TOLERANCE
from torch import Tensor, fx
from transformers import GenerationConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ktcompile
from ktcompile import Kernel, Region, Target, dynamo, regions
from ktcompile.backends import native
from ktcompile.backends.cpu_moe import CpuMoe
from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.convert import convert
from ktcompile.kernel import Call, Packed, Parts, available, refusal
from ktcompile.model import capture_phase, empty_model, explain, settings_for
from ktcompile.passes.fold import Fold
from ktcompile.passes.quantize import Quantize
from ktcompile.pipeline import Context, Pipeline
from ktcompile.target import detect
from ktcompile.weights import ModuleSource, values

HOST = Target((detect().host,))
EXPERTS, HIDDEN, WIDTH, TOP_K = 8, 64, 96, 2
KEY = "model.layers.0.mlp.experts"
FORMS = ("plain", "mxfp4", "gguf f32", "gguf q8_0")
CPU = [k for k in available().values() if isinstance(k, CpuMoe)]


def made(**changes: object) -> Any:
    """A tiny gpt-oss with biases that are not zero, as llama.cpp can say it."""
    model = tiny.model("gpt_oss", **{"intermediate_size": WIDTH, "swiglu_limit": 7.0} | changes)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def as_published(model: Any, folder: Path) -> Checkpoint:
    """With its experts' matrices in MXFP4: blocks and scales of random bits, which the model then has as values."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for key, tensor in model.state_dict().items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            tensors[key] = tensor
            continue
        experts, cols, rows = tensor.shape
        shape = experts, rows, cols // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        tensor.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Checkpoint, Any]]:
    """Form -> a checkpoint, and the model of the same values."""
    found = {}
    for form in FORMS:
        model, folder = made(), tmp_path_factory.mktemp("gpt_oss")
        if form == "mxfp4":
            checkpoint = as_published(model, folder)
        elif form == "plain":
            model.save_pretrained(folder)
            checkpoint = open_checkpoint(folder)
        else:
            with pytest.MonkeyPatch.context() as patch:  # its tokenizer is too large
                patch.setattr("ktcompile.convert.metadata.tokenizer_metadata", lambda *a: {})
                source = ModuleSource({name: value.detach() for name, value in model.state_dict().items()})
                file = folder / "model.gguf"
                memory = Checkpoint("tiny", "nowhere", model.config, source, GenerationConfig(), lambda: None)
                convert(memory, file, form.split()[1], quantize=native.quantize)
            checkpoint = open_checkpoint(file)
            assert checkpoint.source is not None
            model.load_state_dict({key: values(checkpoint.source, key) for key in model.state_dict()}, strict=True)
        found[form] = checkpoint, model
    return found


def region_of(checkpoint: Checkpoint, dtype: torch.dtype, quantize: str | None = None) -> Region:
    """The experts of the first layer, placed."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    settings = settings_for(checkpoint, target=HOST, dtype=name, context=64)
    gm: fx.GraphModule = capture_phase(empty_model(checkpoint.config, dtype), "prefill", settings, checkpoint)
    rules = {"*.experts": quantize} if quantize else {}
    region = next(regions(Pipeline((Fold(), Quantize(rules))).run(gm, Context(HOST)), op="moe"))
    region.place("cpu")
    return region


def packed_by(kernel: Kernel, checkpoint: Checkpoint, region: Region) -> Packed:
    keys = {leaf: str(node.meta["weight"]) for leaf, node in region.weights.items()}
    assert checkpoint.source is not None
    packed = kernel.pack(Parts(checkpoint.source, keys), region, HOST)
    assert packed.nbytes == kernel.packed_bytes(region)
    return packed


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    ids, scores = route("random", EXPERTS, tokens, TOP_K)
    return x, ids, scores.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_agrees_with_the_body(checkpoints: Any, form: str, dtype: torch.dtype) -> None:
    """What a kernel computes from packed weights is what the captured code computes from their values, in float64."""
    checkpoint, _ = checkpoints[form]
    region = region_of(checkpoint, dtype)
    weights = [values(checkpoint.source, str(node.meta["weight"])) for node in region.weights.values()]
    call = Call(region.path, region.op, region.binding.shape, region.body, tuple(region.weights))
    ran = set()
    for kernel in CPU:
        if refusal(kernel, region, HOST) is not None:
            continue
        ran.add(kernel.name)
        packed = packed_by(kernel, checkpoint, region)
        held = packed.shape[0][kernel.isa]
        family = native.FAMILY[kernel.isa]
        for tokens in (1, 9, 40):
            x, ids, scores = inputs(tokens, dtype)
            # Weights that are rounded to bf16 since the compute type is are no error of the kernel.
            exact = [w.to(torch.bfloat16) if "bf16" in held.types and w.dim() == 3 else w for w in weights]
            args = {"x": x.double(), "ids": ids, "scores": scores.double()}
            ordered = sorted(region.binding.roles, key=lambda role: region.binding.roles[role])
            want = region.body(*(args[role] for role in ordered), *(w.double() for w in exact))
            got = kernel(packed, call, x, ids, scores)
            assert got.dtype == dtype and got.shape == x.shape
            bound = TOLERANCE[family] + (2**-8 if dtype == torch.bfloat16 else 0)
            assert (got.double() - want).norm() <= bound * want.norm(), (kernel.name, tokens)
    assert "scalar" in ran


@pytest.mark.parametrize(("form", "type"), [("mxfp4", "mxfp4"), ("gguf q8_0", "q8_0"), ("plain", "f32")])
def test_weights_stay_as_stored_and_exact(checkpoints: Any, form: str, type: str) -> None:
    """Gate and up are every second row of what is stored; no value changes, and no byte is added but the biases."""
    check_exact(*checkpoints[form], type)


def test_matrices_that_are_read_in_pieces(tmp_path: Path) -> None:
    model = made(hidden_size=1024, intermediate_size=1184, num_local_experts=2, num_hidden_layers=2)
    check_exact(as_published(model, tmp_path), model, "mxfp4")


def check_exact(checkpoint: Checkpoint, model: Any, type: str) -> None:
    region = region_of(checkpoint, torch.float32)
    held = packed_by(available()["scalar"], checkpoint, region).shape[0]["scalar"]
    assert held.types == (type,) * 3
    state = {name: value.detach() for name, value in model.state_dict().items()}
    gate_up, down = state[f"{KEY}.gate_up_proj"], state[f"{KEY}.down_proj"]
    wanted = {"gate": gate_up[..., 0::2], "up": gate_up[..., 1::2], "down": down}
    for matrix, want in wanted.items():
        rows, cols = want.shape[2], want.shape[1]
        for expert in range(held.experts):
            got = native.unpack(getattr(held, matrix)[expert], type, rows, cols)
            assert torch.equal(got, want[expert].mT), (matrix, expert)
    bias = state[f"{KEY}.gate_up_proj_bias"]
    assert torch.equal(held.gate_bias, bias[:, 0::2]) and torch.equal(held.up_bias, bias[:, 1::2])
    assert torch.equal(held.down_bias, state[f"{KEY}.down_proj_bias"])
    assert (held.alpha, held.limit) == (1.702, 7.0)


@pytest.mark.parametrize("form", FORMS)
def test_from_a_checkpoint_to_logits(checkpoints: Any, form: str) -> None:
    checkpoint, model = checkpoints[form]
    ids = tiny.ids(1, 19)
    fast = ktcompile.load(checkpoint, target=HOST, dtype="fp32", context=64)
    with torch.no_grad():
        want = model(ids).logits
    assert (fast(ids).logits - want).norm() <= 1e-5 * want.norm()
    rows = [row for plan in fast.plans.values() for row in plan.rows if row.op == "moe"]
    stored = {"plain": "f32", "mxfp4": "mxfp4"}.get(form, form.split()[-1])
    assert len(rows) == 4 and {row.encoding for row in rows} == {stored}
    assert {row.kernel for row in rows} <= {k.name for k in CPU}
    assert fast.store.nbytes == {use.device: use.weights for use in fast.plans["decode"].uses}


def test_bf16_from_mxfp4(checkpoints: Any) -> None:
    """The compute type that gpt-oss was published for; without a loss of the weights on the way."""
    checkpoint, model = checkpoints["mxfp4"]
    ids = tiny.ids(1, 19)
    fast = ktcompile.load(checkpoint, target=HOST, dtype="bf16", context=64)
    with torch.no_grad():
        want = model(ids).logits
    assert (fast(ids).logits.float() - want).norm() <= 2 * CHAIN["bf16"] * want.norm()


def test_the_second_start_reads_biases_too(checkpoints: Any, tmp_path: Path) -> None:
    checkpoint, _ = checkpoints["mxfp4"]
    ids = tiny.ids(1, 7)
    logits = []
    for loaded in (0, 2):
        again = ktcompile.load(checkpoint, target=HOST, dtype="fp32", context=64, packed_cache=tmp_path / "packed")
        assert again.store.cache.loaded == loaded and again.store.cache.notes == []
        logits.append(again(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("wanted", "types"),
    [
        ("int8", ("q8_0",) * 3),
        ("int8_row", ("int8_row",) * 3),
        ("int4_32", ("q4_0",) * 3),
        ("int4_64", ("int4_64", "int4_64", "q4_0")),  # rows of 96 do not divide into 64
        ("int4", ("q5_0",) * 3),
    ],
)
def test_quantised_along_what_is_summed(checkpoints: Any, wanted: str, types: tuple[str, ...]) -> None:
    """Blocks of a matrix that is stored as [in, out] lie along `in`."""
    checkpoint, _ = checkpoints["plain"]
    region = region_of(checkpoint, torch.float32, wanted)
    kernel = available()["scalar"]
    assert refusal(kernel, region, HOST) is None
    held = packed_by(kernel, checkpoint, region).shape[0][kernel.isa]
    assert held.types == types
    plan = explain(checkpoint, settings_for(checkpoint, target=HOST, context=64, quantize=wanted))[-1]
    made = "+".join(dict.fromkeys((types[0], types[2])))
    assert f"# lossy: f32 weights quantised to {made} while loading" in plan.text()


def test_a_users_own_model() -> None:
    """torch.compile: the experts implementation `ktrans` is understood, and reads the model's own parameters."""
    model = made()
    ids = tiny.ids(1, 9)
    with torch.no_grad():
        want = model(ids).logits
    model.set_experts_implementation("ktrans")
    torch.compiler.reset()
    dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="ktrans", options={"target": HOST})(ids, use_cache=False).logits
    assert {row.kernel for plan in dynamo.plans() for row in plan.rows if row.op == "moe"} <= {k.name for k in CPU}
    assert sum(row.op == "moe" for plan in dynamo.plans() for row in plan.rows) == 2
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_why_not(checkpoints: Any) -> None:
    region = region_of(checkpoints["mxfp4"][0], torch.float32)
    for name, family in (("amx", "bf16"), ("avx512_vnni", "int16")):
        why = refusal(available()[name], region, HOST)
        missing = native.isas()[name]
        wanted = f"it computes in {family}, this model in fp32; --dtype bf16 allows it"
        assert why is not None and (missing is not None or why == wanted)
    region = region_of(checkpoints["plain"][0], torch.bfloat16)
    assert refusal(available()["amx_int8"], region, HOST) is not None
