"""The model configuration that GGUF metadata describes, as fields of a Hugging Face config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import overload

from ktcompile.errors import ModelFileError
from ktcompile.weights.gguf_header import Value

Fields = dict[str, object]

_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func
_V3_EXPERTS, _V3_GROUPS, _V3_TOPK_GROUPS = 256, 8, 4  # what files from before expert_group_count leave out


@dataclass(frozen=True)
class _Metadata:
    """Typed access to `<architecture>.<name>`; errors name the file and the key."""

    values: Mapping[str, Value]
    where: str
    prefix: str

    @overload
    def integer(self, name: str) -> int: ...
    @overload
    def integer(self, name: str, default: int) -> int: ...
    @overload
    def integer(self, name: str, default: None) -> int | None: ...
    def integer(self, name: str, default: int | None = -1) -> int | None:
        value = self.values.get(self.prefix + name)
        if value is None and default != -1:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelFileError(f"{self.where}: {self.prefix + name} is {_short(value)}, an integer is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(self.prefix + name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelFileError(f"{self.where}: {self.prefix + name} is {_short(value)}, a number is needed")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(self.prefix + name, False)
        if not isinstance(value, bool):
            raise ModelFileError(f"{self.where}: {self.prefix + name} is {_short(value)}, true or false is needed")
        return value


def config_fields(metadata: Mapping[str, Value], where: str) -> Fields:
    """Fields of the config class, `model_type` among them, from the metadata of the file `where`.

    Raises ModelFileError for an unknown architecture and for keys that are missing or of another type.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ModelFileError(f"{where}: general.architecture is {_short(architecture)}; known are {known}")
    fields = _ARCHITECTURES[architecture](_Metadata(metadata, where, f"{architecture}."))
    return fields | _special_ids(_Metadata(metadata, where, "tokenizer.ggml."))


def generation_fields(metadata: Mapping[str, Value], where: str) -> Fields:
    """Fields of generation_config.json: special token ids, and sampling defaults if the file has any."""
    sampling = _Metadata(metadata, where, "general.sampling.")
    ids = _Metadata(metadata, where, "tokenizer.ggml.")
    fields = _special_ids(ids)
    ends = [ids.integer(name, None) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    distinct = list(dict.fromkeys(i for i in ends if i is not None))
    if len(distinct) > 1:
        fields["eos_token_id"] = distinct
    for name, field in (("temp", "temperature"), ("top_p", "top_p"), ("min_p", "min_p")):
        if sampling.prefix + name in metadata:
            fields[field] = sampling.number(name)
    if sampling.prefix + "top_k" in metadata:
        fields["top_k"] = sampling.integer("top_k")
    temperature = fields.get("temperature")
    if temperature == 0.0:
        del fields["temperature"]  # greedy; transformers refuses a temperature of zero
    elif temperature is not None:
        fields["do_sample"] = True
    return fields


def _special_ids(ids: _Metadata) -> Fields:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {field: ids.integer(name, None) for field, name in names.items()}


def _deepseek2(m: _Metadata) -> Fields:
    """DeepSeek V2, V3 and R1: V3's config class for a sigmoid router, V2's for softmax.

    llama.cpp wrote no expert_group_count before 2025-09; a sigmoid router with 256 experts then has DeepSeek-V3's
    published 8 groups, of which 4 are used, any other has one group.
    """
    gating = m.integer("expert_gating_func", _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise ModelFileError(
            f"{m.where}: {m.prefix}expert_gating_func is {gating}; 1 (softmax) and 2 (sigmoid) are known"
        )
    experts = m.integer("expert_count")
    is_v3_unmarked = gating == _SIGMOID and experts == _V3_EXPERTS
    heads = m.integer("attention.head_count")
    rope = m.integer("rope.dimension_count")
    key_length = m.integer("attention.key_length_mla", None) or m.integer("attention.key_length")
    fields: Fields = {
        "vocab_size": m.integer("vocab_size"),
        "hidden_size": m.integer("embedding_length"),
        "num_hidden_layers": m.integer("block_count") - m.integer("nextn_predict_layers", 0),
        "num_nextn_predict_layers": m.integer("nextn_predict_layers", 0),
        "intermediate_size": m.integer("feed_forward_length"),
        "moe_intermediate_size": m.integer("expert_feed_forward_length"),
        "n_routed_experts": experts,
        "n_shared_experts": m.integer("expert_shared_count"),
        "num_experts_per_tok": m.integer("expert_used_count"),
        "first_k_dense_replace": m.integer("leading_dense_block_count", 0),
        "n_group": m.integer("expert_group_count", _V3_GROUPS if is_v3_unmarked else 1),
        "topk_group": m.integer("expert_group_used_count", _V3_TOPK_GROUPS if is_v3_unmarked else 1),
        "norm_topk_prob": m.flag("expert_weights_norm"),
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,  # the file says 1: it counts latents
        "q_lora_rank": m.integer("attention.q_lora_rank", None),
        "kv_lora_rank": m.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key_length - rope,
        "v_head_dim": m.integer("attention.value_length_mla", None) or m.integer("attention.value_length"),
        "max_position_embeddings": m.integer("context_length"),
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(m),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,  # a file without output.weight gives the embedding for lm_head
    }
    return fields | (_v3_router() if gating == _SIGMOID else _v2_router(m, fields))


def _v3_router() -> Fields:
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,  # llama.cpp leaves DeepSeek's interleaved order as it is
    }


def _v2_router(m: _Metadata, fields: Fields) -> Fields:
    if fields["norm_topk_prob"]:
        raise ModelFileError(
            f"{m.where}: {m.prefix}expert_weights_norm is true with a softmax router; DeepSeek-V2 does not normalise"
        )
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "scoring_func": "softmax",
        "topk_method": "greedy" if fields["n_group"] == 1 else "group_limited_greedy",
    }


def _rope(m: _Metadata) -> Fields:
    """rope_parameters: plain, or YaRN with DeepSeek's mscale.

    llama.cpp stores yarn_log_multiplier = 0.1 * mscale_all_dim and scales only the attention logits, never cos and sin:
    the same as mscale = mscale_all_dim, or as attention_factor = 1 without it.
    """
    theta = m.number("rope.freq_base", 10000.0)
    kind = m.values.get(f"{m.prefix}rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "yarn":
        raise ModelFileError(f"{m.where}: {m.prefix}rope.scaling.type is {_short(kind)}; none and yarn are known")
    factor = m.number("rope.scaling.yarn_attn_factor", 1.0)
    if factor != 1.0:
        raise ModelFileError(f"{m.where}: {m.prefix}rope.scaling.yarn_attn_factor is {factor}; only 1 is known")
    mscale = float(f"{10 * m.number('rope.scaling.yarn_log_multiplier', 0.0):.6g}")
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": m.number("rope.scaling.factor"),
        "original_max_position_embeddings": m.integer("rope.scaling.original_context_length"),
        "beta_fast": m.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": m.number("rope.scaling.yarn_beta_slow", 1.0),
        **({"mscale": mscale, "mscale_all_dim": mscale} if mscale else {"attention_factor": 1.0}),
    }


def _short(value: object) -> str:
    """A value for an error message, cut to one line."""
    return "missing" if value is None else repr(value)[:80]


_ARCHITECTURES: Mapping[str, Callable[[_Metadata], Fields]] = {"deepseek2": _deepseek2}
