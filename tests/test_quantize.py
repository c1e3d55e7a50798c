"""quantize: weights get fewer bits while they are loaded, and the page says so."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from models import captured_plain, rewritten
from torch import Tensor
from transformers import PreTrainedModel

import ktcompile
from ktcompile import CapacityError, Device, Region, RulesError, Target, regions, value_of
from ktcompile.backends import native
from ktcompile.backends.cpu_moe import AmxInt8, Scalar
from ktcompile.backends.encoded import Encoded, decoded
from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.kernel import Parts, refusal
from ktcompile.model import explain, settings_for
from ktcompile.passes.fold import Fold
from ktcompile.passes.quantize import ENCODINGS, Quantize
from ktcompile.plan import Plan
from ktcompile.target import detect
from ktcompile.weights import ModuleSource, decode, values

FP8 = Path(__file__).parent / "data" / "tiny-deepseek-v3"
HOST = Target((detect().host,))
CARD = Target((Device("cpu:1", "cuda", 24 << 30, 1e12), detect().host))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(FP8)


def plan_of(checkpoint: Checkpoint, quantize: str, target: Target = HOST) -> Plan:
    return explain(checkpoint, settings_for(checkpoint, quantize=quantize, target=target))[-1]


def test_the_page_names_it(checkpoint: Checkpoint) -> None:
    plan = plan_of(checkpoint, "int4")
    assert "# lossy: fp8_block128 weights quantised to q4_k+q5_0 while loading" in plan.text()
    moe = [r for r in plan.rows if r.op == "moe"]
    assert {r.encoding for r in moe} == {"fp8_block128>q4_k+q5_0"}
    packed = 2 * native.packed_bytes("q4_k", 128, 256) + native.packed_bytes("q5_0", 256, 128)
    assert {r.nbytes for r in moe} == {32 * packed}


def test_what_would_not_shrink_stays() -> None:
    plan = plan_of(open_checkpoint(), "int8")
    assert plan.lossy == () and "stays as stored: q8_0 would not make it smaller" in plan.text()


def test_fp8_becomes_int8(checkpoint: Checkpoint) -> None:
    """As large, and lossy: but a CPU multiplies integers faster."""
    plan = plan_of(checkpoint, "int8")
    assert {r.encoding for r in plan.rows if r.op == "moe"} == {"fp8_block128>q8_0"}


NAMES = {
    "int8": "q8_0",
    "int8_row": "int8_row",
    "int4": "q4_k+q5_0",  # rows of 128 do not divide into 256
    "int4_32": "q4_0",
    "int4_64": "int4_64",
    "int4_128": "int4_128",
    "q4_0": "q4_0",
    "fp8": "fp8_block128",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with rows of 256 and 128, stored as it is."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.model("qwen3_moe", hidden_size=256, moe_intermediate_size=128).save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize("wanted", NAMES)
def test_every_name_reaches_the_kernel(plain: Checkpoint, wanted: str) -> None:
    """The page says what was made; the kernel packs as many bytes as the page says."""
    model = ktcompile.load(plain, quantize=wanted, target=HOST, context=64)
    plan: Plan = model.plans["decode"]
    assert f"# lossy: f32 weights quantised to {NAMES[wanted]} while loading" in plan.text()
    rows = [r for r in plan.rows if r.op == "moe"]
    assert {r.encoding for r in rows} == {f"f32>{NAMES[wanted]}"}
    gate, *_, down = NAMES[wanted].split("+") * 2
    packed = 2 * native.packed_bytes(gate, 128, 256) + native.packed_bytes(down, 256, 128)
    assert {r.nbytes for r in rows} == {16 * packed}
    assert model.store.nbytes == {use.device: use.weights for use in plan.uses}


def test_rows_that_do_not_divide(tmp_path: Path) -> None:
    """Smaller groups; and where 32 is too many, weights stay, with the reason, unless a scale is a row's."""
    tiny.model("qwen3_moe", hidden_size=64, moe_intermediate_size=24).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    page = plan_of(checkpoint, "int4_128").text()
    assert "weights quantised to int4_64 while loading" in page
    page = plan_of(checkpoint, "int8_row").text()
    assert "f32 weights quantised to int8_row while loading" in page
    tiny.model("qwen3_moe", hidden_size=48, moe_intermediate_size=24).save_pretrained(tmp_path)
    page = plan_of(open_checkpoint(tmp_path), "int4_128").text()
    assert "lossy" not in page
    assert "stays as stored: rows of 24 values do not divide into blocks of int4_128, nor into 32" in page


def test_int8_rows_are_what_amx_int8_takes() -> None:
    missing = native.isas()["amx_int8"]
    for wanted, why in (("int8_row", None), ("int8", "amx_int8 computes in int8 and does not take q8_0 weights")):
        gm, _ = rewritten(captured_plain("deepseek_v3_wide").gm, HOST, Fold(), Quantize({"*.experts": wanted}))
        region = next(regions(gm, op="moe"))
        region.place("cpu")
        assert refusal(AmxInt8(), region, HOST) == why or missing


def test_on_a_gpu_only_what_it_can_decode() -> None:
    gm, _ = rewritten(captured_plain("deepseek_v3_wide").gm, CARD, Fold(), Quantize({"*": "int4_64"}))
    region = next(r for r in regions(gm) if r.quantized)
    region.place("cpu:1")
    assert refusal(Encoded(), region, CARD) == (
        "it does not quantise weights to int4_64; it does to q8_0, q4_0, q5_0, q4_k, q5_k, q6_k, fp8_block128"
    )


def test_off_by_default_and_keep(checkpoint: Checkpoint) -> None:
    gm, ctx = rewritten(captured_plain("deepseek_v3").gm, HOST, Fold(), Quantize())
    assert [n.why for n in ctx.notes if n.by == "quantize"] == [
        "off: weights are packed from the encoding that they are stored in"
    ]
    gm, ctx = rewritten(captured_plain("deepseek_v3").gm, HOST, Fold(), Quantize({"*.experts": "keep", "*": "q8_0"}))
    assert not any(r.quantized for r in regions(gm, "*.experts")) and any(r.quantized for r in regions(gm))
    assert not any(r.quantized for r in regions(gm, op="router")), "a router is exact"


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (
            {"*.experts": "int3"},
            "no encoding 'int3'; there are int8, int4, fp8, int8_row, int4_32, int4_64, int4_128",
        ),
        ({"*.expert": "int4"}, r"rule '\*.expert' matches no region; did you mean '\*.experts'\?"),
    ],
)
def test_rules_that_do_not_fit(rules: dict[str, str], why: str) -> None:
    with pytest.raises(RulesError, match=why):
        rewritten(captured_plain("deepseek_v3").gm, HOST, Fold(), Quantize(rules))


def test_no_kernel_is_an_error_that_says_why(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        RulesError, match=r"no kernel takes model.layers.0.self_attn.*does not quantise weights to q4_k"
    ):
        plan_of(checkpoint, "*.self_attn=int4")


def test_it_fits_by_the_bytes_that_it_will_have(checkpoint: Checkpoint) -> None:
    """A model too large as stored fits if its experts are to be quantised."""
    (use,) = plan_of(checkpoint, "*=keep").uses
    tight = Target((replace(detect().host, capacity=use.total - (1 << 20)),))
    with pytest.raises(CapacityError):
        plan_of(checkpoint, "*=keep", tight)
    assert plan_of(checkpoint, "int4", tight).uses[0].weights < use.weights - (1 << 20)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(torch.arange(3, 40)[None]).logits
    return found


BOUND = {"q8_0": 0.02, "q6_k": 0.05, "q5_0": 0.12, "q4_k": 0.2} | {
    "int8_row": 0.05,
    "int4_32": 0.3,
    "int4_64": 0.3,
    "int4_128": 0.3,
}
"""Relative error of logits of a random two-layer model: about the error of a weight times the depth."""


def rounded(rows: Tensor, encoding: str) -> Tensor:
    """The values that fp32 rows have in an encoding."""
    if encoding in native.LOSSY:
        return native.unpack(native.pack(rows, "f32", encoding, *rows.shape), encoding, *rows.shape)
    quantised = native.quantize(rows, encoding)
    assert isinstance(quantised, Tensor)
    return decode(quantised, encoding)


@pytest.mark.parametrize("encoding", BOUND)
def test_a_model_quantised_at_load_is_the_model_of_quantised_weights(encoding: str, tmp_path: Path) -> None:
    original = tiny.model("qwen3_moe", hidden_size=256, moe_intermediate_size=256)
    original.save_pretrained(tmp_path)
    made = ktcompile.load(tmp_path, quantize=encoding, target=HOST)
    expected = 0.0
    with torch.no_grad():
        assert relative(logits(made), logits(original)) < BOUND[encoding]
        for key, parameter in original.named_parameters():
            if ".experts." in key:
                rows = parameter.data.flatten(0, -2).contiguous()
                wanted = rounded(rows, ENCODINGS[encoding]).view(parameter.shape)
                expected = max(expected, relative(wanted, parameter))
                parameter.copy_(wanted)
        assert relative(logits(made), logits(original)) < 1e-5
    assert expected > 1e-4, "something was rounded"


@pytest.mark.parametrize("wanted", [name for name, made in ENCODINGS.items() if made in Encoded.quantizes])
def test_on_a_gpu_weights_stay_quantised(wanted: str) -> None:
    """Packed bytes are those of the plan; decoded, they are the quantised weights."""
    captured = captured_plain("deepseek_v3_wide")
    gm, _ = rewritten(captured.gm, CARD, Fold(), Quantize({"*": wanted}))
    source = ModuleSource({k: v.detach() for k, v in captured.keys.items()})
    seen = 0
    for region in regions(gm):
        region.place("cpu:1")
        if not region.quantized:
            continue
        kernel = Encoded()
        assert refusal(kernel, region, CARD) is None
        keys = {leaf: str(node.meta["weight"]) for leaf, node in region.weights.items()}
        packed = kernel.pack(Parts(source, keys), region, CARD)
        assert packed.nbytes == kernel.packed_bytes(region)
        for leaf, encoding in region.quantized.items():
            seen += 1
            exact = values(source, keys[leaf])
            rows = exact.flatten(0, -2)
            got = decoded(packed, leaf).float()
            assert relative(got, exact) < 0.12
            if exact.dim() == 2 or encoding != "fp8_block128":
                made = native.quantize(rows, encoding)
                want = decode(made, encoding) if isinstance(made, Tensor) else decode(made[0], encoding, made[1])
                assert torch.equal(got.flatten(0, -2), want)
    assert seen >= 8


def test_kernels_that_cannot_refuse() -> None:
    gm, _ = rewritten(captured_plain("deepseek_v3_wide").gm, HOST, Fold(), Quantize({"*.experts": "q4_0"}))
    (region, *_) = regions(gm, op="moe")
    assert isinstance(region, Region) and value_of(region.weights["down_proj"]).dim() == 3
    region.place("cpu")

    class Plain(Scalar):
        quantizes = ()

    assert refusal(Plain(), region, HOST) == "it does not quantise weights to q4_0"
