"""Tiny models of every family, captured once a configuration. No pass changes a captured graph: refold it freely."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GenerationConfig,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from ktcompile import Context, Device, Pipeline, Target
from ktcompile.cache import PAGE, PagedCache
from ktcompile.capture import EXPERTS, annotate, annotate_weights, empty_model
from ktcompile.checkpoint import Checkpoint
from ktcompile.kernel import available
from ktcompile.model import Phase, Settings, capture_phase, run_pipeline
from ktcompile.passes.choose_kernels import ChooseKernels
from ktcompile.passes.fold import Fold
from ktcompile.passes.insert_copies import InsertCopies
from ktcompile.passes.place import Place
from ktcompile.plan import Plan
from ktcompile.runtime import Executable, Store, lower
from ktcompile.target import fake
from ktcompile.weights import ModuleSource

torch.set_num_threads(1)

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": 0,
    "pad_token_id": None,
}
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_GQA = {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
_WIDTHS = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts_per_tok": 4}
_SHARED = _WIDTHS | {"num_hidden_layers": 3, "n_shared_experts": 1, "n_routed_experts": 16, "first_k_dense_replace": 1}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def _deepseek_v3(**changes: Any) -> PretrainedConfig:
    return DeepseekV3Config(**_SIZES | _MLA | _SHARED | {"n_group": 4, "topk_group": 2, "q_lora_rank": 24} | changes)


def _deepseek_v2(**changes: Any) -> PretrainedConfig:
    lite = {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "q_lora_rank": None}
    return DeepseekV2Config(**_SIZES | _MLA | _SHARED | lite | changes)


def _qwen3_moe() -> PretrainedConfig:
    return Qwen3MoeConfig(
        **_SIZES | _GQA | _WIDTHS, num_experts=16, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]
    )


def _mixtral() -> PretrainedConfig:
    return MixtralConfig(
        **_SIZES | _GQA, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    )


def _glm4_moe() -> PretrainedConfig:
    return Glm4MoeConfig(**_SIZES | _GQA | _SHARED, n_group=1, topk_group=1)


def _gpt_oss() -> PretrainedConfig:
    return GptOssConfig(
        **_SIZES | _GQA,
        intermediate_size=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )


CONFIGS: Mapping[str, Callable[[], PretrainedConfig]] = {
    "deepseek_v3": _deepseek_v3,
    "deepseek_v3_q": lambda: _deepseek_v3(q_lora_rank=None),
    "deepseek_v3_wide": lambda: _deepseek_v3(hidden_size=256, moe_intermediate_size=256, intermediate_size=512),
    "deepseek_v3_yarn": lambda: _deepseek_v3(rope_parameters=_YARN),
    "deepseek_v3_tied": lambda: _deepseek_v3(num_hidden_layers=2, tie_word_embeddings=True),
    "deepseek_v2": _deepseek_v2,
    "deepseek_v2_yarn": lambda: _deepseek_v2(q_lora_rank=24, rope_parameters=_YARN | {"mscale": 0.7}),
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
}
"""Two or three layers, the first one dense where the family has that."""

CONTEXT = 64
"""Tokens a request may hold in every test."""


@cache
def config(name: str) -> PretrainedConfig:
    """The tiny configuration of a family. Shared: change a deepcopy."""
    return CONFIGS[name]()


# ------------------------------------------------------------------------------------------------ targets

GPU = fake("24G", "512G")
"""A machine one does not have: plans are made for it, nothing runs."""

TWO = Target((Device("cpu", "cpu", 1 << 30, 1e11), Device("cpu:1", "cpu", 1 << 30, 1e11)))
"""Two devices that both run here: torch takes cpu:1 for the CPU."""


# ------------------------------------------------------------------------------------------------ as `load` captures


@cache
def hollow(name: str) -> PreTrainedModel:
    """The model without weights."""
    return empty_model(config(name), torch.float32)


@cache
def real(name: str, experts: str = EXPERTS) -> PreTrainedModel:
    """The model with random weights (std 0.1), ready to run; its experts are the marker that `load` captures."""
    torch.manual_seed(0)
    attention = "eager" if name == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(
        deepcopy(config(name)), dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.normal_(0, 0.1)
    return model.eval()


def checkpoint(name: str, source: Any = None) -> Checkpoint:
    """A checkpoint of the tiny model, without weights unless `source` has them."""

    def no_tokenizer() -> Any:
        raise AssertionError("a tiny model has no tokenizer")

    return Checkpoint(name, name, config(name), source, GenerationConfig(), no_tokenizer)


def settings(target: Target, *passes: Any) -> Settings:
    """fp32, a context of 64, and these passes."""
    return Settings(target, Pipeline(tuple(passes)), torch.float32, CONTEXT)


@cache
def captured(name: str, phase: Phase = "decode") -> fx.GraphModule:
    """The annotated graph that `ktcompile.load` makes of a model without weights."""
    return capture_phase(hollow(name), phase, settings(GPU), checkpoint(name))


def plan(name: str, target: Target, *passes: Any, phase: Phase = "decode", every: bool = False) -> list[Plan]:
    """The plans of the passes on a captured model."""
    return run_pipeline(
        captured(name, phase), settings(target, *passes), name, phase, 1 if phase == "decode" else 32, every=every
    )[1]


def rewritten(gm: fx.GraphModule, target: Target, *passes: Any) -> tuple[fx.GraphModule, Context]:
    """The graph after the passes, and what they skipped. The captured graph stays as it is."""
    ctx = Context(target)
    return Pipeline(tuple(passes)).run(gm, ctx), ctx


def placed(rules: Mapping[str, str], kernels: Any = None) -> tuple[Any, ...]:
    """The usual passes: fold, place by these rules, copy, and run everything by its captured code."""
    return (
        Fold(),
        Place(rules),
        InsertCopies(),
        kernels or ChooseKernels(moe=("reference",), mla=("reference",), other=("reference",)),
    )


# ------------------------------------------------------------------------------------------------ graphs that run


@dataclass(frozen=True)
class Plain:
    """A captured graph of a real model, with the inputs of the call in dynamo's order, before it wrote to them."""

    gm: fx.GraphModule
    args: tuple[Any, ...]
    name: str
    phase: Phase
    keys: Mapping[str, Tensor] = field(repr=False)

    @property
    def nodes(self) -> list[fx.Node]:
        """The placeholders, in the order of the inputs."""
        return [n for n in self.gm.graph.nodes if n.op == "placeholder"]

    def fresh(self) -> list[Any]:
        """The inputs, with copies of those that the graph writes."""
        return [a.clone() if n.meta.get("state") else a for n, a in zip(self.nodes, self.args, strict=True)]

    def run(self) -> list[Tensor]:
        """What the captured graph returns and leaves in the cache."""
        args = self.fresh()
        with torch.no_grad():
            out = self.gm(*args)
        return [*out, *self._state(args)]

    def run_rewritten(self, gm: fx.GraphModule) -> list[Tensor]:
        """What a rewritten graph returns and leaves in the cache, before any kernel is chosen."""
        args = self.fresh()
        with torch.no_grad():
            out = fx.Interpreter(gm).run(*args)
        return [*out, *self._state(args)]

    def run_lowered(self, gm: fx.GraphModule, target: Target) -> list[Tensor]:
        """The same, through kernels with packed weights."""
        source = ModuleSource({k: v.detach() for k, v in self.keys.items()})
        executable: Executable = lower(gm, _NO_PLAN, Store(source, target, available()))
        args = self.fresh()
        values = [a for n, a in zip(self.nodes, args, strict=True) if "weight" not in n.meta]
        with torch.no_grad():
            out = executable.flat(*values)
        return [*out, *self._state(args)]

    def _state(self, args: Sequence[Any]) -> list[Tensor]:
        return [a for n, a in zip(self.nodes, args, strict=True) if n.meta.get("state")]


_NO_PLAN = Plan("", "decode", 1, 0, "", (), (), 0, ())


@cache
def captured_plain(name: str, phase: Phase = "prefill", dtype: torch.dtype = torch.float32) -> Plain:
    """Dynamo's graph of a really initialised model, and the inputs that it was called with.

    prefill: two requests of 5 and 3 tokens. decode: one more token of each, after that prefill.
    """
    model = real(name) if dtype == torch.float32 else deepcopy(real(name)).to(dtype)
    cache = PagedCache(model.config, requests=2, context=CONTEXT, ragged=True, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    if phase == "decode":
        prefill = captured_plain(name, "prefill", dtype)
        for layer, pool in zip(cache.layers, prefill._state(_after(prefill)), strict=True):
            layer.pool.copy_(pool)
        cache.lengths = [5, 3]
    counts = [5, 3] if phase == "prefill" else [1, 1]
    cache.begin(counts)
    ids = torch.randint(1, model.config.vocab_size, (1, sum(counts)), generator=generator)
    positions = torch.cat([n + torch.arange(c) for n, c in zip(cache.lengths, counts, strict=True)])[None]

    def step(ids: Tensor, positions: Tensor, cache: PagedCache) -> Tensor:
        mask = torch.ops.ktrans.ragged_mask(cache.page_table, cache.seq_len, cache.query_start, positions, PAGE)
        return model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache).logits

    return _recorded(step, (ids, positions, cache), name, phase, model)


@cache
def captured_user(name: str, experts: str = "grouped_mm") -> Plain:
    """Dynamo's graph of `torch.compile(model)(ids)`: Hugging Face's own experts and cache."""
    model = real(name, experts)
    ids = torch.randint(1, model.config.vocab_size, (1, 6), generator=torch.Generator().manual_seed(1))
    return _recorded(lambda ids: model(ids), (ids,), name, "prefill", model)


def _recorded(
    step: Callable[..., Any], given: tuple[Any, ...], name: str, phase: Phase, model: PreTrainedModel
) -> Plain:
    found: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(
            (
                gm,
                tuple(
                    i.clone() if isinstance(i, Tensor) and not isinstance(i, torch.nn.Parameter) else i for i in inputs
                ),
            )
        )
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(step, backend=record, fullgraph=True, dynamic=False)(*given)
    ((gm, args),) = found
    annotate(gm)
    annotate_weights(gm, None)
    keys = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return Plain(gm, args, name, phase, keys)


def _after(plain: Plain) -> list[Any]:
    args = plain.fresh()
    with torch.no_grad():
        plain.gm(*args)
    return args


def with_capacity(target: Target, **capacities: int) -> Target:
    """The target with other capacities, in bytes, by kind or name with `_` for `:`."""
    return replace(
        target,
        devices=tuple(
            replace(d, capacity=capacities.get(d.name.replace(":", "_"), d.capacity)) for d in target.devices
        ),
    )
