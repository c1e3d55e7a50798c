"""The Triton RMSNorm agrees with `ktrans::rms_norm`, which agrees with Hugging Face's modules.

On a GPU if there is one, else in Triton's interpreter; `test_compiles_for_hopper` needs neither.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIGS, GPU, captured, captured_plain, plan, rewritten
from test_triton_mla import DEVICE, H100, HERE, SIMULATED, Recorder, randn, run_here
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from ktcompile import Context, Kernel, Region, Target, regions
from ktcompile.backends import triton_norm as kernels
from ktcompile.backends.triton_language import triton
from ktcompile.capture import annotate, annotate_weights
from ktcompile.kernel import available, refusal
from ktcompile.ops.plain import NormShape
from ktcompile.ops.plain import rms_norm as definition
from ktcompile.passes.choose_kernels import ChooseKernels
from ktcompile.passes.fold import Fold
from ktcompile.passes.insert_copies import InsertCopies
from ktcompile.passes.place import Place
from ktcompile.target import Device

# Triton's interpreter cuts a float32 to bfloat16 where torch and a GPU round it, here twice.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}
DTYPES = tuple(TOLERANCE)
MODULES: dict[type[nn.Module], NormShape] = {
    DeepseekV3RMSNorm: NormShape(1e-5),
    GptOssRMSNorm: NormShape(1e-5, late=True),
    GemmaRMSNorm: NormShape(1e-5, 1.0, late=True),
}
ON_GPU = Target((Device("cpu:1", "cuda", 1 << 34, 1e12), Device("cpu", "cpu", 1 << 34, 1e11)))
"""Its GPU is the CPU."""


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=1e-6)


def module_of(cls: type[nn.Module], width: int, dtype: torch.dtype) -> Any:
    module: Any = cls(width, eps=1e-5).to(DEVICE, dtype)
    nn.init.normal_(module.weight, 1.0, 0.3)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", MODULES)
def test_the_definition_is_hugging_faces(cls: type[nn.Module], dtype: torch.dtype) -> None:
    module, shape, x = module_of(cls, 100, dtype), MODULES[cls], randn(2, 3, 100, dtype=dtype)
    with torch.no_grad():
        got = torch.ops.ktrans.rms_norm(x, module.weight, shape.eps, shape.offset, shape.late)
        assert torch.equal(got, module(x))


@HERE
@given(
    rows=st.sampled_from([(), (0,), (1,), (3,), (2, 5), (2, 0, 3)]),
    width=st.sampled_from([1, 7, 64, 100, 129, 1024]),
    dtype=st.sampled_from(DTYPES),
    cls=st.sampled_from(tuple(MODULES)),
    seed=st.integers(0, 99),
)
def test_any_size(rows: tuple[int, ...], width: int, dtype: torch.dtype, cls: type[nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    module, shape = module_of(cls, width, dtype), MODULES[cls]
    x = randn(*rows, width, dtype=dtype) * 3
    with torch.no_grad():
        close(kernels.rms_norm(x, module.weight, shape.eps, shape.offset, shape.late), module(x))


@HERE
def test_a_width_of_deepseek_and_other_strides() -> None:
    weight = randn(7168, dtype=torch.bfloat16)
    x = randn(1, 7168, dtype=torch.bfloat16)
    close(kernels.rms_norm(x, weight, 1e-6), definition(x, weight, 1e-6, 0, False))
    weight, big = randn(40), randn(6, 80, 4)
    views = big[:, ::2, 0], big[:, 20:60, 1], big.transpose(1, 2)[..., 40:], big[:0, :40, 0]
    for x in (*views, randn(3, 120)[:, 40:80], randn(40).expand(4, 40)):
        close(kernels.rms_norm(x, weight, 1e-6), definition(x, weight, 1e-6, 0, False))


@HERE
@given(
    rows=st.sampled_from([(0,), (1,), (2, 5)]),
    width=st.sampled_from([1, 100, 1024]),
    types=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from((*DTYPES, None))),
    seed=st.integers(0, 99),
)
def test_sums_of_any_types(rows: tuple[int, ...], width: int, types: tuple[Any, ...], seed: int) -> None:
    """With a type for the result the sum is float32, exactly; else of the type that both have in common."""
    torch.manual_seed(seed)
    x, r = (randn(*rows, width, dtype=t) for t in types[:2])
    weight = randn(width, dtype=torch.bfloat16)
    got = kernels.add_rms_norm(x, r, weight, 1e-6, 0.5, True, types[2])
    want = torch.ops.ktrans.add_rms_norm(x, r, weight, 1e-6, 0.5, True, types[2])
    if types[2] is not None:
        assert got[0].dtype == torch.float32 and torch.equal(got[0], want[0])
    for a, b in zip(got, want, strict=True):
        close(a, b)
    with pytest.raises(ValueError, match="both must be one"):
        kernels.add_rms_norm(x, r[..., :-1], weight, 1e-6)


@HERE
def test_types_that_differ_are_promoted() -> None:
    x, weight = randn(2, 32, dtype=torch.bfloat16), randn(32)
    got = kernels.rms_norm(x, weight, 1e-6)
    want = definition(x, weight, 1e-6, 0.0, False)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)


# ------------------------------------------------------------------------------------------------ bindings


def folded(module: nn.Module, *size: int) -> Region:
    """The region that one module becomes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = module

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(x)
            return out

    found: list[torch.fx.GraphModule] = []

    def record(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(Model(), backend=record, dynamic=False)(torch.randn(*size))
    annotate(found[0])
    annotate_weights(found[0], None)
    (region,) = regions(rewritten(found[0], ON_GPU, Fold(), Place({"*": "cpu:1"}))[0], op="norm")
    return region


class HalfNorm(DeepseekV3RMSNorm):
    """Has every operation of an RMSNorm, wired in another way."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32)
        return self.weight * (hidden_states * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + self.variance_epsilon))


class SumNorm(DeepseekV3RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).clamp(max=1e6)


@pytest.mark.parametrize("cls", MODULES)
def test_binds(cls: type[nn.Module]) -> None:
    region = folded(cls(32, eps=1e-5), 2, 3, 32)
    assert region.binding.shape == MODULES[cls]
    assert refusal(kernels.TritonNorm(), region, ON_GPU) is None


@pytest.mark.parametrize("module", [nn.LayerNorm(32), HalfNorm(32), SumNorm(32)], ids=lambda m: type(m).__name__)
def test_keeps_the_code_of_other_norms(module: nn.Module) -> None:
    region = folded(module, 2, 3, 32)
    assert region.binding.shape is None
    why = refusal(kernels.TritonNorm(), region, ON_GPU)
    assert why == "its captured code is not that of an RMSNorm with a weight"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_binds(name: str) -> None:
    found = list(regions(rewritten(captured(name), GPU, Fold())[0], op="norm"))
    assert found and all(isinstance(r.binding.shape, NormShape) for r in found)


CHOICE = {"norm": ("triton_norm", "reference"), "router": ("triton_router", "reference")}


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """All kernels and these, also where no entry point names them yet."""
    found = available() | {"triton_norm": kernels.TritonNorm()}
    router: Any = import_module("ktcompile.backends.triton_router")
    found["triton_router"] = router.TritonRouter()
    for module in ("ktcompile.passes.choose_kernels", "models"):
        monkeypatch.setattr(f"{module}.available", lambda: found)
    return found


@HERE
@SIMULATED
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss"])
def test_whole_models(name: str, phase: Any, with_kernels: dict[str, Kernel]) -> None:
    """Norms and routers in Triton on a GPU that is the CPU: what the captured graph returns."""
    plain = captured_plain(name, phase)
    reference = ("reference",)
    choice = ChooseKernels(moe=reference, mla=reference, other=reference, ops=CHOICE)
    gm = rewritten(plain.gm, ON_GPU, Fold(), Place({"*": "cpu:1"}), InsertCopies(), choice)[0]
    for _ in range(2):  # choosing twice changes nothing
        assert {r.kernel for r in regions(gm, op="norm")} == {"triton_norm"}
        assert {r.kernel for r in regions(gm, op="router")} == {"reference" if name == "gpt_oss" else "triton_router"}
        gm = choice.run(gm, Context(ON_GPU))
    for got, want in zip(plain.run_lowered(gm, ON_GPU), plain.run(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_pages_of_a_cpu_do_not_change(with_kernels: dict[str, Kernel]) -> None:
    cpu = Target((Device("cpu", "cpu", 1 << 34, 1e11),))

    def page(choice: dict[str, tuple[str, ...]]) -> str:
        return plan("deepseek_v3", cpu, Fold(), Place(), InsertCopies(), ChooseKernels(ops=choice))[-1].text()

    told = [line for line in page(CHOICE).splitlines() if "triton_" not in line]
    assert not any(set(told) - set(page({}).splitlines()))


# ------------------------------------------------------------------------------------------------ the compiler


def test_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\n"
    code += "from ktcompile.backends import triton_norm as m; print(m.TritonNorm().missing(), m.interpreted())"
    assert run_here(code) == "triton is not installed False\n"


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    code = "import test_triton_norm as t; t.compile_for_hopper()"
    lines = run_here(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == ["_rms_norm"] * 4, lines
    assert all(int(line.split()[1]) <= H100.shared_bytes for line in lines), lines


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    here: Any = kernels
    here._rms_norm = Recorder(here._rms_norm)
    for rows, width, dtype, late in (
        (1, 7168, torch.bfloat16, False),
        (5, 7168, torch.bfloat16, True),
        (2, 100, torch.float32, False),
        (3, 65536, torch.float16, False),
    ):
        kernels.rms_norm(torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype), 1e-6, 0.0, late)
