"""A whole model on a "GPU" that is the CPU: copies, Triton's kernels interpreted, weights decoded or encoded.

`torch.device("cpu:1")` computes on the CPU, and a device of kind `cuda` gets the kernels of one.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from models import checkpoint as tiny
from models import hollow
from torch import Tensor
from transformers import PreTrainedModel

from ktcompile import Device, Target
from ktcompile.cache import PagedCache
from ktcompile.checkpoint import open_checkpoint
from ktcompile.generate import Sampling, Session, stop_tokens
from ktcompile.model import PHASES, capture_phase, load, run_pipeline, settings_for
from ktcompile.plan import Plan, Row
from ktcompile.target import detect, fake
from ktcompile.weights import ImaginedSource

HOST = detect().host
CLOSE = 1e-4  # relative: |got - want| / |want|
C_KERNELS = {"amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "scalar"}

WITHOUT_PLANES = """extends: deepseek-v3
pipeline:
  - choose-kernels:
      mla: [triton_encoded, triton, encoded, reference]
      linear: [encoded, reference]
      mlp: [encoded, reference]
"""
MIXED = (
    WITHOUT_PLANES
    + """  - place:
      rules:
        "layers.{0..2}.self_attn": cpu
        "layers.3.mlp.experts": gpu
        "*.experts": cpu
        "*": gpu
"""
)


def gpu(capacity: int) -> Target:
    return Target((Device("cpu:1", "cuda", capacity, 1e12), HOST))


@cache
def model(name: str) -> PreTrainedModel:
    """The embedded model in fp32, a context of 256: on the `cpu` alone, or on a GPU with much or little memory."""
    target = {"cpu": Target((HOST,)), "decoded": gpu(1 << 30), "encoded": gpu(25 << 20), "planes": gpu(1 << 30)}[name]
    if name == "planes":
        return load(target=target, dtype="fp32", context=256)
    with TemporaryDirectory() as folder:
        return load(target=target, dtype="fp32", context=256, rules=without_planes(Path(folder)))


def without_planes(folder: Path) -> Path:
    """Rules as they are where no weight is quantised as a whole."""
    path = folder / "without_planes.yaml"
    path.write_text(WITHOUT_PLANES)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Attention of three layers on the CPU, of three on the GPU; the experts of layer 3 there too."""
    path: Path = tmp_path_factory.mktemp("rules") / "mixed.yaml"
    path.write_text(MIXED)
    return load(target=gpu(1 << 30), rules=path, dtype="fp32", context=256)


GPUS = ("decoded", "encoded", "planes")
RUN = ("decoded", "encoded")  # the interpreter takes minutes for a model in planes: `make gpu-test` runs that
KERNELS = {
    "decoded": {"mla": "triton"},
    "encoded": {"mla": "triton_encoded", "embed": "encoded", "linear": "encoded", "mlp": "encoded"},
    "planes": {"mla": "triton_planes", "linear": "triton_linear", "mlp": "triton_mlp"},
}
"""The kernels of ops whose weights are quantised; others run as `reference`."""

NOT_QUANTISED = {"norm": "triton_norm", "add_norm": "triton_add_norm", "router": "triton_router"}
"""The kernels of ops whose weights never are, likewise."""


def rows(plan: Plan, op: str) -> list[Row]:
    return [r for r in plan.rows if r.op == op]


def forced(count: int, seed: int = 0) -> Tensor:
    """A sequence that no model chose."""
    return torch.randint(2, 6000, (count,), generator=torch.Generator().manual_seed(seed))


def at_once(given: Any, ids: Tensor) -> Tensor:
    logits: Tensor = given(ids[None]).logits[0]
    return logits


def stepwise(given: Any, ids: Tensor, first: int) -> Tensor:
    """Logits of a prefill of `first` tokens, then of one token a step."""
    pools: PagedCache = given.new_cache(1)
    found = [given.step(ids[:first], torch.arange(first), [first], torch.arange(first), pools)]
    for i in range(first, len(ids)):
        found.append(given.step(ids[i : i + 1], torch.arange(i, i + 1), [1], torch.tensor([0]), pools))
    assert pools.lengths == [len(ids)]
    return torch.cat(found)


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.isfinite().all()
    off = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert off.max() <= CLOSE, f"off by {off.max():.1e}"


def check_forced(given: PreTrainedModel) -> None:
    ids = forced(20)
    want = at_once(model("cpu"), ids)
    close(at_once(given, ids), want)
    close(stepwise(given, ids, 14), want)


# ------------------------------------------------------------------------------------------------ right answers


@pytest.mark.parametrize("name", RUN)
def test_paris(name: str) -> None:
    checkpoint = open_checkpoint()
    tokenizer = checkpoint.tokenizer
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    stop = stop_tokens(tokenizer, checkpoint.generation)
    session = Session(model(name), tokenizer, Sampling(temperature=0), stop)
    assert "".join(session.stream(prompt, 20)) == "The capital of France is Paris."


@pytest.mark.parametrize("name", RUN)
def test_logits_are_those_of_the_cpu(name: str) -> None:
    """20 tokens in one prefill, and the last 6 of them one by one."""
    check_forced(model(name))


def test_prompts_of_different_length() -> None:
    """A padded batch, then one more token of each: the last logits of each prompt alone."""
    given: Any = model("encoded")
    prompts = [forced(17, 1), forced(3, 2)]  # one crosses a page of 16
    ids, mask = torch.zeros(2, 17, dtype=torch.int64), torch.zeros(2, 17, dtype=torch.int64)
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, 17 - len(prompt) :], mask[row, 17 - len(prompt) :] = prompt, 1
    out = given(ids, attention_mask=mask, logits_to_keep=1, use_cache=True)
    more = forced(2, 3)
    then = given(more[:, None], past_key_values=out.past_key_values, logits_to_keep=1)
    for row, prompt in enumerate(prompts):
        want = at_once(model("cpu"), torch.cat([prompt, more[row : row + 1]]))
        close(out.logits[row, -1], want[-2])
        close(then.logits[row, -1], want[-1])


# ------------------------------------------------------------------------------------------------ where it runs


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", GPUS)
def test_kernels(name: str, phase: str) -> None:
    plan = model(name).plans[phase]
    kernels = KERNELS[name]
    assert [(r.device, r.kernel) for r in rows(plan, "mla")] == [("cpu:1", kernels["mla"])] * 6
    experts = rows(plan, "moe")
    assert len(experts) == 5 and {r.device for r in experts} == {"cpu"} and {r.kernel for r in experts} <= C_KERNELS
    quantised = [r for r in plan.rows if "q" in r.encoding and r.op not in ("mla", "moe")]
    assert len(quantised) == 8  # embedding, head, a dense MLP, five shared experts
    assert all((r.device, r.kernel) == ("cpu:1", kernels.get(r.op, "reference")) for r in quantised)
    rest = [r for r in plan.rows if r.op != "copy" and "q" not in r.encoding]
    assert all((r.device, r.kernel) == ("cpu:1", NOT_QUANTISED.get(r.op, "reference")) for r in rest)


@pytest.mark.parametrize("phase", PHASES)
def test_nobody_makes_a_mask(phase: str, mixed: PreTrainedModel) -> None:
    """Triton's kernels need none; captured attention does, and it is copied there once."""

    def masks(plan: Plan) -> list[str]:
        return [r.name for r in plan.rows if r.name.split("@")[0] == "mask"]

    assert masks(model("cpu").plans[phase]) == ["mask"]
    assert all(masks(model(name).plans[phase]) == [] for name in GPUS)
    assert masks(mixed.plans[phase]) == ["mask", "mask@cpu"]


def test_bytes_are_those_of_the_plan(mixed: PreTrainedModel) -> None:
    """Both phases share one copy of every weight, on the device that the page says."""
    for given in (model("cpu"), *map(model, GPUS), mixed):
        for phase in PHASES:
            assert given.store.nbytes == {u.device: u.weights for u in given.plans[phase].uses}


def test_encoded_is_smaller() -> None:
    small, planes, large = (model(name).store.nbytes for name in ("encoded", "planes", "decoded"))
    assert small["cpu:1"] < large["cpu:1"] / 4 and small["cpu"] == large["cpu"]
    assert small["cpu:1"] < planes["cpu:1"] < large["cpu:1"]


@pytest.mark.parametrize("name", GPUS)
def test_cache_is_where_attention_is(name: str) -> None:
    pools: Any = model(name).new_cache(2)
    plan = model(name).plans["decode"]
    assert {u.device: u.cache for u in plan.uses} == {"cpu:1": pools.nbytes // 2, "cpu": 0}


def test_more_memory_never_fits_less(tmp_path: Path) -> None:
    """A plan that fits a GPU fits one with 4 KiB more: weights are decoded only where the cache still fits."""
    base = tiny("deepseek_v3")
    source = ImaginedSource({k: tuple(v.shape) for k, v in hollow("deepseek_v3").state_dict().items()}, "q8_0", 3)
    given = replace(base, source=source)
    rules = without_planes(tmp_path)
    driver = fake().main.reserved
    roomy = settings_for(given, target=fake(driver + (1 << 26)), dtype="fp32", context=256, rules=rules)
    gm = capture_phase(hollow("deepseek_v3"), "decode", roomy, given)

    def weights(capacity: int) -> int:
        settings = replace(roomy, target=fake(driver + capacity))
        return run_pipeline(gm, settings, "tiny", "decode", 1)[1][-1].uses[0].weights

    enough = weights(1 << 26) * 5 // 4  # decoded they are four fifths of this
    assert weights(enough - 2048) < enough // 2
    assert weights(enough + 2048) < enough


# ------------------------------------------------------------------------------------------------ mixed placements


def test_mixed_logits(mixed: PreTrainedModel) -> None:
    check_forced(mixed)


@pytest.mark.parametrize("phase", PHASES)
def test_mixed_kernels(mixed: PreTrainedModel, phase: str) -> None:
    plan = mixed.plans[phase]
    on_cpu, on_gpu = [("cpu", "reference")] * 3, [("cpu:1", "triton")] * 3
    assert [(r.device, r.kernel) for r in rows(plan, "mla")] == on_cpu + on_gpu
    experts = {r.name: (r.device, r.kernel) for r in rows(plan, "moe")}
    assert experts.pop("L3.experts") == ("cpu:1", "reference")
    assert {d for d, _ in experts.values()} == {"cpu"} and {k for _, k in experts.values()} <= C_KERNELS
    caches = {u.device: u.cache for u in plan.uses}
    assert caches["cpu"] == caches["cpu:1"] > 0
