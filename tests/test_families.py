"""Every architecture from a folder to logits: what `ktcompile.load` runs is Hugging Face's eager model."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_simulated_gpu import gpu
from test_triton_mla import SIMULATED
from tolerances import CHAIN
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import ktcompile
from ktcompile.cache import PAGE, PagedCache, windows
from ktcompile.capture import empty_model
from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.errors import ModelFileError
from ktcompile.model import PHASES, capture_phase, settings_for
from ktcompile.plan import Plan
from ktcompile.target import Target, detect

CLOSE = 1e-5
"""Relative L2 error of one token's logits, fp32."""

HOST = Target((detect().host,))
"""The CPU alone, also where there is a GPU."""

C_KERNELS = {"amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "scalar"}
WINDOW = 6

VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2_lite": (
        "deepseek_v2",
        {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v3": ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe_window": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "glm4_moe": ("glm4_moe", {"n_group": 2, "topk_group": 1, "use_qk_norm": True}),
    "glm4_moe_lite": ("glm4_moe_lite", {}),
    "mixtral": ("mixtral", {}),
    "mixtral_window": ("mixtral", {"sliding_window": WINDOW}),
    "olmoe": ("olmoe", {"clip_qkv": 1.0}),
    "gpt_oss": ("gpt_oss", {}),
}
"""Name -> (architecture, what differs from its tiny configuration)."""

LATENT = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "glm4_moe_lite")


@cache
def eager(name: str, experts: int | None = None) -> PreTrainedModel:
    """Hugging Face's model with random weights, every implementation the plain one; `experts` a token if given."""
    family, changes = VARIANTS[name]
    if experts is not None:
        changes = changes | {"num_experts_per_tok": experts}
    model = tiny.model(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, biases and sinks begin as ones and zeros, which hide mistakes
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def opened(name: str, folder: Path) -> Checkpoint:
    """The model as a folder that `save_pretrained` wrote."""
    eager(name).save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compiled model of a name, loaded once."""

    @cache
    def load(name: str) -> PreTrainedModel:
        checkpoint = opened(name, tmp_path_factory.mktemp(name))
        return ktcompile.load(checkpoint, target=HOST, dtype="fp32", context=64)

    return load


def close(got: Tensor, want: Tensor) -> None:
    """Every token's logits `[..., vocabulary]`."""
    assert got.shape == want.shape and got.isfinite().all()
    off = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)
    assert off.max() <= CLOSE, f"off by {off.max():.1e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(name: str, loaded: Any) -> None:
    """A prefill of 19 tokens, which is longer than a window and a page, and 8 decode steps."""
    check_one_prompt(name, loaded(name))


def check_one_prompt(name: str, fast: PreTrainedModel) -> None:
    model, ids = eager(name), tiny.ids(1, 19)
    with torch.no_grad():
        want = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True)
    got = fast(ids, use_cache=True)
    close(got.logits, want.logits)
    for _ in range(8):
        ids = want.logits[:, -1:].argmax(-1)
        with torch.no_grad():
            want = model(ids, past_key_values=want.past_key_values, use_cache=True)
        got = fast(ids, past_key_values=got.past_key_values, use_cache=True)
        close(got.logits, want.logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_prompts(name: str, loaded: Any) -> None:
    """A batch of prompts of 19 and 5 tokens, padded on the left, and 8 decode steps: each as if it were alone."""
    check_two_prompts(name, loaded(name))


def check_two_prompts(name: str, fast: PreTrainedModel) -> None:
    model = eager(name)
    whole = [tiny.ids(1, tokens + 8, seed)[0] for seed, tokens in ((1, 19), (2, 5))]
    with torch.no_grad():
        wanted = [model(ids[None]).logits[0] for ids in whole]
    ids, real = torch.zeros(2, 19, dtype=torch.int64), torch.zeros(2, 19, dtype=torch.int64)
    for row, prompt in enumerate(whole):
        ids[row, 8 - len(prompt) :], real[row, 8 - len(prompt) :] = prompt[:-8], 1
    got = fast(ids, attention_mask=real, use_cache=True)
    for row, want in enumerate(wanted):
        close(got.logits[row, 8 - len(want) :], want[:-8])
    for step in range(-8, 0):
        ids = torch.stack([prompt[step] for prompt in whole])[:, None]
        got = fast(ids, past_key_values=got.past_key_values, use_cache=True)
        close(got.logits[:, 0], torch.stack([want[step] for want in wanted]))


@SIMULATED
@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_on_a_gpu(name: str, tmp_path: Path) -> None:
    """All layers of both phases are taken by Triton's kernel, here in its interpreter, and none by captured code."""
    fast = ktcompile.load(opened(name, tmp_path), target=gpu(1 << 30), dtype="fp32", context=64)
    for phase in PHASES:
        kernels = [row.kernel for row in fast.plans[phase].rows if row.op in ("mla", "attention")]
        assert kernels == ["triton"] * eager(name).config.num_hidden_layers
    check_one_prompt(name, fast)
    check_two_prompts(name, fast)


def test_gpt_oss_in_bf16(tmp_path: Path) -> None:
    """The compute type of a GPU, in which transformers' own experts cannot be captured without weights."""
    ids = tiny.ids(1, 19)
    got = ktcompile.load(opened("gpt_oss", tmp_path), target=HOST, dtype="bf16", context=64)(ids).logits.float()
    with torch.no_grad():
        want = deepcopy(eager("gpt_oss")).bfloat16()(ids).logits.float()
    assert (got - want).norm() <= CHAIN["bf16"] * want.norm()


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen2_moe", "olmoe"])
def test_fewer_experts(name: str, tmp_path: Path) -> None:
    """3 of 4 experts: the model whose configuration says 3."""
    ids = tiny.ids(1, 12)
    fewer = ktcompile.load(opened(name, tmp_path), target=HOST, dtype="fp32", context=64, experts=3)
    with torch.no_grad():
        close(fewer(ids).logits, eager(name, experts=3)(ids).logits)
        assert not torch.allclose(fewer(ids).logits, eager(name)(ids).logits, atol=1e-2)


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize("name", VARIANTS)
def test_page(name: str, loaded: Any) -> None:
    """Every weight is in one row, every row has a kernel, and the experts one of the C kernels."""
    model = eager(name)
    weights = sum(t.nbytes for k, t in (*model.named_parameters(), *model.named_buffers()) if "inv_freq" not in k)
    layers = sum(k.endswith("experts.down_proj") for k, _ in model.named_parameters())
    for phase in PHASES:
        plan: Plan = loaded(name).plans[phase]
        assert all(row.kernel in C_KERNELS | {"reference", "torch_mla"} for row in plan.rows)
        assert weights == sum(row.nbytes for row in plan.rows if "rope" not in row.name)
        assert loaded(name).store.nbytes == {use.device: use.weights for use in plan.uses}
        experts = [row for row in plan.rows if row.op in ("moe", "experts")]
        assert len(experts) == layers
        assert all(row.op == "moe" and row.kernel in C_KERNELS for row in experts)


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("qwen2_moe", ["ragged_mask"]),
        ("mixtral_window", ["ragged_window_mask"]),
        ("gpt_oss", ["ragged_window_mask", "ragged_mask"]),
    ],
)
def test_masks_that_some_layer_reads(name: str, masks: list[str], tmp_path: Path) -> None:
    """A mask by kind of layer, and none for a kind that the model does not have."""
    checkpoint = opened(name, tmp_path)
    settings = settings_for(checkpoint, target=HOST, context=64)
    gm = capture_phase(empty_model(checkpoint.config, torch.float32), "prefill", settings, checkpoint)
    found = [str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes if n.op == "call_function"]
    assert [n.split(".")[0] for n in found if "mask" in n] == masks


def test_kinds_of_layers() -> None:
    """What a configuration says of windows, in each of the ways that families say it."""
    assert windows(tiny.config("mixtral")) == {"": None}
    assert windows(tiny.config("mixtral", sliding_window=6)) == {"": 6}
    assert windows(tiny.config("qwen3_moe", sliding_window=6)) == {"": None}  # use_sliding_window is false
    assert windows(tiny.config("qwen2_moe")) == {"full_attention": None}
    assert windows(tiny.config("gpt_oss")) == {"sliding_attention": 6, "full_attention": None}
    chunked = tiny.config("gpt_oss", layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ModelFileError, match="layer_types has 'chunked_attention'; known are full_attention, sliding"):
        windows(chunked)


@given(
    requests=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=3),
    window=st.integers(1, 30),
)
def test_window(requests: list[tuple[int, int]], window: int) -> None:
    """Token `i` of a request that had `n` sees that request's positions from `n + i - window + 1` to `n + i`."""
    cache = PagedCache(tiny.config("mixtral"), requests=len(requests), context=64, ragged=True)
    cache.lengths = [n for n, _ in requests]
    cache.begin([c for _, c in requests])
    tokens = sum(c for _, c in requests)
    positions = torch.zeros(1, tokens, dtype=torch.int64)
    mask = cache.masks(positions, {"": window}, additive=False)
    assert isinstance(mask, Tensor)
    width = cache.page_table.shape[1] * PAGE
    expected = [
        [r * width + p for p in range(max(0, n + i - window + 1), n + i + 1)]
        for r, (n, c) in enumerate(requests)
        for i in range(c)
    ]
    assert [row.nonzero()[:, 0].tolist() for row in mask[0, 0]] == expected
    added = cache.masks(positions, {"": window}, additive=True)
    assert isinstance(added, Tensor) and torch.equal(added == 0, mask)
    assert (added[~mask] == torch.finfo(torch.float32).min).all()
