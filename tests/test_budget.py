"""Budget: what a step needs is counted before a weight is read, and a plan that does not fit says what would."""

import gc
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONTEXT, GPU, TWO, captured_plain, placed, rewritten, with_capacity
from test_simulated_gpu import gpu, without_planes
from test_triton_mla import SIMULATED
from torch import fx

from ktcompile import CapacityError, Device, RulesError, Target, explain, load, regions
from ktcompile.backends.triton_mla import interpreted
from ktcompile.cache import PagedCache
from ktcompile.checkpoint import open_checkpoint
from ktcompile.fake import allocated
from ktcompile.kernel import available
from ktcompile.memory import workspace
from ktcompile.model import PHASES, Phase, capture_phase, empty_model, run_pipeline, settings_for
from ktcompile.passes.choose_kernels import ChooseKernels
from ktcompile.plan import Plan
from ktcompile.runtime import Step, Store, lower
from ktcompile.symbols import sizes
from ktcompile.target import CONTEXT_BYTES, LIBRARY_BYTES, detect, fake, with_vram
from ktcompile.weights import MixedSource, ModuleSource

KIB, MIB = 1 << 10, 1 << 20

# ------------------------------------------------------------------------------------------------ what kernels say


class _Measured(fx.Interpreter):
    """Runs a lowered graph; `over` names the regions that allocated more than `said`."""

    def __init__(self, gm: fx.GraphModule, said: Mapping[str, int]) -> None:
        super().__init__(gm)
        self.said, self.over, self.seen = said, dict[str, tuple[int, int]](), 0

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        step = self.fetch_attr(target)
        if not isinstance(step, Step):
            return super().call_module(target, args, kwargs)
        found = [step(*args)]  # the pool of threads keeps its scratch memory, some 100 KiB a thread
        took = allocated(lambda: found.append(step(*args)))
        self.seen += 1
        most = self.said[step.call.path]
        if step.kernel.name.startswith("triton") and interpreted():  # it copies what a kernel reads
            most += step.packed.nbytes + sum(a.nbytes for a in args if isinstance(a, torch.Tensor))
        if took > most:
            self.over[step.call.path] = took, most
        return found[0]


def said(gm: fx.GraphModule, known: Mapping[str, int]) -> dict[str, int]:
    kernels = available()
    return {r.path: kernels[str(r.kernel)].workspace_bytes(r, known) for r in regions(gm)}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "gpt_oss", "glm4_moe"])
def test_a_kernel_allocates_no_more_than_it_says(name: str, phase: Phase) -> None:
    """Captured code, and the experts in C."""
    plain = captured_plain(name, phase)
    kernels = ChooseKernels(moe=("avx2", "scalar", "reference"), mla=("reference",), other=("reference",))
    gm, _ = rewritten(plain.gm, TWO, *placed({"*": "cpu"}, kernels))
    store = Store(ModuleSource({k: v.detach() for k, v in plain.keys.items()}), TWO, available())
    lowered = lower(gm, Plan("", phase, 1, 0, "", (), (), 0, ()), store).gm
    run = _Measured(lowered, said(gm, {}))
    with torch.inference_mode():
        run.run(*(a for n, a in zip(plain.nodes, plain.fresh(), strict=True) if "weight" not in n.meta))
    assert run.seen > 10 and not run.over


@SIMULATED
@pytest.mark.parametrize(("phase", "tokens"), [("decode", 1), ("prefill", 20), ("prefill", 60)])
def test_a_kernel_of_a_gpu_allocates_no_more_than_it_says(phase: Phase, tokens: int, tmp_path: Path) -> None:
    """Weights decoded at each call, attention in Triton: of 20 tokens in the absorbed form, of 60 in the expanded."""
    checkpoint = open_checkpoint()
    chosen = settings_for(checkpoint, target=gpu(24 << 20), dtype="fp32", context=64, rules=without_planes(tmp_path))
    hollow = empty_model(checkpoint.config, chosen.dtype)
    gm, (plan,) = run_pipeline(capture_phase(hollow, phase, chosen, checkpoint), chosen, "", phase, tokens)
    tables = ModuleSource({k: b for k, b in hollow.named_buffers() if not b.isnan().any()})
    assert checkpoint.source is not None
    executable = lower(gm, plan, Store(MixedSource(checkpoint.source, tables), chosen.target, available()))
    pools = PagedCache(checkpoint.config, context=64, ragged=True)
    pools.begin([tokens])
    pools.page_table = pools.all_pages
    values = {"ids": torch.ones(1, tokens, dtype=torch.int64), "positions": torch.arange(tokens)[None]}
    values |= {f"cache.{k}": getattr(pools, k) for k in ("page_table", "seq_len", "query_start")}
    values |= {"keep": torch.tensor([tokens - 1])}
    values |= {f"cache.layers.{i}.pool": pool for i, pool in enumerate(pools.pools)}
    args = [values[i] if isinstance(i, str) else values[i[0]].shape[i[1]] for i in executable.inputs]
    run = _Measured(executable.gm, said(gm, sizes(gm, tokens, 64)))
    with torch.inference_mode():
        run.run(*args)
    assert {r.kernel for r in regions(gm)} >= {"triton_encoded", "encoded", "reference"}
    assert run.seen > 10 and not run.over


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_step_allocates_no_more_than_the_page_says(name: str) -> None:
    """All regions one after another, with the values that they leave to later ones."""
    plain = captured_plain(name, "prefill")
    gm, _ = rewritten(plain.gm, TWO, *placed({"*": "cpu"}))
    args, lines = plain.fresh(), workspace(gm, {})
    store = Store(ModuleSource({k: v.detach() for k, v in plain.keys.items()}), TWO, available())
    executable = lower(gm, Plan("", "prefill", 1, 0, "", (), (), 0, ()), store)
    given = [a for n, a in zip(plain.nodes, args, strict=True) if "weight" not in n.meta]
    took = allocated(lambda: executable.flat(*given))
    assert took <= lines["cpu"] <= 4 * took


# ------------------------------------------------------------------------------------------------ what would fit


def bare(**capacities: int) -> Target:
    """An imagined GPU whose driver takes nothing, so that small sizes mean something."""
    devices = tuple(replace(d, reserved=0) for d in fake().devices)
    return with_capacity(replace(fake(), devices=devices), **capacities)


def plan(target: Target, phase: Phase = "decode", encoding: str | None = None, **chosen: Any) -> Plan:
    checkpoint = open_checkpoint()
    return explain(checkpoint, settings_for(checkpoint, target=target, **chosen), phase, encoding=encoding)[-1]


def refused(target: Target, phase: Phase = "decode", encoding: str | None = None, **chosen: Any) -> str:
    with pytest.raises(CapacityError) as error:
        plan(target, phase, encoding, **chosen)
    return f"{error.value}\n"


def test_a_shorter_context(golden: Golden) -> None:
    """The longest that fits: a page of 16 tokens more does not."""
    roomy = plan(bare(cuda_0=6 * MIB)).uses[0]
    target = bare(cuda_0=roomy.total - 200 * KIB)
    told = refused(target)
    golden("context", told)
    context = int(re.findall(r"--context (\d+)", told)[0])
    assert plan(target, context=context).uses[0].total <= target.main.capacity
    assert "cuda:0 needs" in refused(target, context=context + 16)


def test_a_shorter_context_for_two_gpus() -> None:
    """The second is still too small where the first is not any more."""
    both = fake("2x24G")
    both = replace(both, devices=tuple(replace(d, reserved=0) for d in both.devices))
    first, second, _ = plan(with_capacity(both, cuda_0=6 * MIB, cuda_1=6 * MIB)).uses
    assert first.cache and second.cache
    small = with_capacity(both, cuda_0=first.total - 40 * KIB, cuda_1=second.total - 60 * KIB)
    context = int(re.findall(r"--context (\d+)", refused(small))[0])
    assert all(u.total <= u.capacity for u in plan(small, context=context).uses)
    refused(small, context=context + 16)


def test_fewer_bits(golden: Golden) -> None:
    """Attention keeps its context: the cache is elsewhere, and no other context would help."""
    target = bare(cpu=20 * MIB)
    told = refused(target, encoding="bf16")
    golden("bits", told)
    rules = re.findall(r"--quantize '(.*)'", told)[0]
    assert plan(target, encoding="bf16", quantize=rules).uses[1].total <= target.host.capacity


@pytest.mark.parametrize("device", ["cuda_0", "cpu"])
def test_another_place(device: str, golden: Golden, tmp_path: Path) -> None:
    """The last layers move, no more of them than are needed."""
    small = {"cuda_0": 3 * MIB, "cpu": 7 * MIB}[device]
    target = bare(**{device: small})
    context = {"cuda_0": 64, "cpu": 1024}[device]
    told = refused(target, context=context)
    golden(f"place_{device}", told)
    glob, to = re.findall(r'first rule of place, "(.*)": (\w+)', told)[0]
    file = tmp_path / "moved.yaml"
    file.write_text(
        "extends: deepseek-v3\npipeline:\n  - place:\n      rules:\n"
        f'        "{glob}": {to}\n        "*.experts": cpu\n        "*": gpu\n'
    )
    assert all(u.total <= u.capacity for u in plan(target, context=context, rules=file).uses)


def test_nothing_helps(golden: Golden) -> None:
    golden("nothing", refused(bare(cuda_0=64 * KIB, cpu=64 * KIB)))


@given(data=st.data())
@settings(max_examples=4)
def test_what_is_told_fits(data: st.DataObject) -> None:
    """Whatever the capacities: the change that the error names makes the plan fit."""
    size = st.integers(2 * MIB, 12 * MIB)
    target = bare(cuda_0=data.draw(size), cpu=data.draw(size))
    phase = data.draw(st.sampled_from(PHASES))
    try:
        found = plan(target, phase)
    except CapacityError as error:
        told = str(error)
    else:
        assert all(u.total <= u.capacity for u in found.uses)
        return
    context, quantize = re.findall(r"--context (\d+)", told), re.findall(r"--quantize '(.*)'", told)
    if context or quantize:
        found = plan(
            target, phase, context=int(context[0]) if context else None, quantize=quantize[0] if quantize else None
        )
        assert all(u.total <= u.capacity for u in found.uses)
    else:
        assert "first rule of place" in told or told.endswith("No one change was found that fits")


def test_a_graph_that_is_measured_stays_as_it_is() -> None:
    """A search plans with other contexts; the pools of the captured graph are the ones that it had."""
    chosen = settings_for(open_checkpoint(), target=bare(cuda_0=2 * MIB), context=CONTEXT)
    given = open_checkpoint()
    gm = capture_phase(empty_model(given.config, chosen.dtype), "decode", chosen, given)
    pools = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.meta.get("state")]
    with pytest.raises(CapacityError):
        run_pipeline(gm, chosen, "", "decode", 1, source=given.source)
    assert [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.meta.get("state")] == pools


# ------------------------------------------------------------------------------------------------ --vram


def test_vram_limits_every_gpu_and_nothing_else() -> None:
    two = Target((Device("cuda:0", "cuda", 80 << 30, 1e12), Device("cuda:1", "cuda", 8 << 30, 1e12), *TWO.devices[:1]))
    assert [d.capacity for d in with_vram(two, "24G").devices] == [24 << 30, 8 << 30, TWO.host.capacity]
    assert with_vram(two, "24G").about == "at most 24G of each GPU's memory"
    assert with_vram(TWO, "24G").about == "no GPU that 24G would limit"
    with pytest.raises(RulesError, match="'24' is no size"):
        with_vram(two, "24")


def test_vram_in_the_command_and_in_load(ktrans: Any) -> None:
    _, out, _ = ktrans("explain", "--gpu", "24G", "--ram", "512G", "--vram", "12G")
    assert "# cuda:0  671 MiB of 12.0 GiB: " in out and "at most 12G of each GPU's memory" in out
    code, _, err = ktrans("chat", "-p", "a", "--vram", "12X")
    assert code == 2 and "'12X' is no size" in err
    with pytest.raises(CapacityError, match=r"cpu:1 needs .* and has 1\.0 MiB"):
        load(target=gpu(1 << 30), vram="1M")


# ------------------------------------------------------------------------------------------------ what is measured


@cache
def machine() -> Target:
    """A real GPU where there is one, held to 24 GiB; else one that is the CPU."""
    return with_vram(detect(), "24G") if torch.cuda.is_available() else gpu(1 << 30)


def test_a_loaded_model_holds_what_the_page_says(tmp_path: Path) -> None:
    """Weights and cache to the byte; on a GPU torch's allocator never gave out more than the page says."""
    target = machine()
    real = target.main.torch.type == "cuda"
    if real:
        torch.cuda.reset_peak_memory_stats()
    model: Any = load(target=target, context=1024, rules=None if real else without_planes(tmp_path))
    pools = model.new_cache()
    tokens = 512 if real else 4
    ids = torch.arange(2, tokens + 2)
    model.step(ids, torch.arange(tokens), [tokens], torch.tensor([tokens - 1]), pools)
    for i in range(tokens, tokens + 3):
        model.step(torch.tensor([7]), torch.tensor([i]), [1], torch.tensor([0]), pools)
    found = model.memory()
    for phase in PHASES:
        for use in model.plans[phase].uses:
            assert (found[use.device].weights, found[use.device].cache) == (use.weights, use.cache)
    planned = {u.device: u.total for phase in PHASES for u in model.plans[phase].uses}
    peaks = {name: held.peak for name, held in found.items() if held.peak is not None}
    assert all(peak <= planned[name] - CONTEXT_BYTES for name, peak in peaks.items()), (peaks, planned)
    assert list(peaks) == ([d.name for d in target.devices if d.kind == "cuda"] if real else [])
    del pools
    gc.collect()
    assert sum(held.cache for held in model.memory().values()) == 0


def test_what_a_driver_takes_is_counted() -> None:
    assert fake("24G").main.reserved == CONTEXT_BYTES + LIBRARY_BYTES == GPU.main.reserved
    assert fake("24G").host.reserved == 0
