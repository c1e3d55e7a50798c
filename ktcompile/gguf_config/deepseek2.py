"""DeepSeek-V2, V2-Lite, V3, R1 and Kimi-K2: V3's config class for a sigmoid router, V2's for softmax."""

from ktcompile.gguf_config.access import Config, Fields, Metadata
from ktcompile.gguf_config.family import SIGMOID, SOFTMAX, Family, Row
from ktcompile.weights.gguf_header import Value

_V3_EXPERTS, _V3_GROUPS, _V3_TOPK_GROUPS = 256, 8, 4  # what files from before expert_group_count leave out


def _is_v3_unmarked(m: Metadata) -> bool:
    """llama.cpp wrote no expert_group_count before 2025-09: 256 sigmoid experts then are DeepSeek-V3's.

    They have its published 8 groups, of which 4 are used; any other router has one group.
    """
    return m.integer("expert_gating_func", SOFTMAX) == SIGMOID and m.integer("expert_count") == _V3_EXPERTS


_ROWS = (
    Row("context_length", "max_position_embeddings"),
    Row("embedding_length", "hidden_size"),
    Row("feed_forward_length", "intermediate_size"),
    Row("expert_feed_forward_length", "moe_intermediate_size"),
    Row("expert_count", "n_routed_experts", alias="num_experts"),
    Row("expert_shared_count", "n_shared_experts"),
    Row("expert_used_count", "num_experts_per_tok"),
    Row("leading_dense_block_count", "first_k_dense_replace", default=lambda m: 0),
    Row("expert_group_count", "n_group", default=lambda m: _V3_GROUPS if _is_v3_unmarked(m) else 1),
    Row("expert_group_used_count", "topk_group", default=lambda m: _V3_TOPK_GROUPS if _is_v3_unmarked(m) else 1),
    Row("expert_weights_norm", "norm_topk_prob", "flag", default=lambda m: False),
    Row("expert_weights_scale", "routed_scaling_factor", "number", default=lambda m: 1.0),
    Row("attention.head_count", "num_attention_heads"),
    Row("attention.q_lora_rank", "q_lora_rank", default=lambda m: None),
    Row("attention.kv_lora_rank", "kv_lora_rank"),
    Row("attention.layer_norm_rms_epsilon", "rms_norm_eps", "number"),
    Row("rope.dimension_count", "qk_rope_head_dim"),
)


def _v3(layers: int) -> Fields:
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,  # llama.cpp leaves DeepSeek's interleaved order as it is
    }


def _v2(layers: int) -> Fields:
    return {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "scoring_func": "softmax"}


V2 = Family("deepseek2", "deepseek_v2", "DeepseekV2ForCausalLM", _ROWS, _v2, SOFTMAX, {}, "mla", has_nextn=True)
V3 = Family("deepseek2", "deepseek_v3", "DeepseekV3ForCausalLM", _ROWS, _v3, SIGMOID, {}, "mla", has_nextn=True)


def deepseek2_fields(m: Metadata) -> Fields:
    """Fields of DeepseekV2Config or DeepseekV3Config."""
    gating = m.integer("expert_gating_func", SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID):
        raise m.wrong("expert_gating_func", f"{SOFTMAX} (softmax) and {SIGMOID} (sigmoid) are known")
    fields = (V3 if gating == SIGMOID else V2).fields(m)
    if gating == SOFTMAX:
        if fields["norm_topk_prob"]:
            raise m.wrong("expert_weights_norm", "softmax is the router of DeepSeek-V2, which does not normalise")
        fields["topk_method"] = "greedy" if fields["n_group"] == 1 else "group_limited_greedy"
    key = m.integer("attention.key_length_mla", None) or m.integer("attention.key_length")
    return fields | {
        "num_key_value_heads": fields["num_attention_heads"],  # the file says 1: it counts latents
        "qk_nope_head_dim": key - m.integer("rope.dimension_count"),
        "v_head_dim": m.integer("attention.value_length_mla", None) or m.integer("attention.value_length"),
    }


def deepseek2_metadata(c: Config) -> dict[str, Value]:
    """Keys after `deepseek2.` for a DeepseekV2Config or DeepseekV3Config."""
    is_v3 = c.values.get("model_type") == V3.model_type
    out = (V3 if is_v3 else V2).metadata(c)
    heads, rope, lora = (c.integer(n) for n in ("num_attention_heads", "qk_rope_head_dim", "kv_lora_rank"))
    if c.first("num_key_value_heads") not in (None, heads):
        raise c.wrong("num_key_value_heads", f"num_attention_heads = {heads} is needed with MLA")
    if not is_v3:
        method = c.first("topk_method")
        if method not in ("greedy", "group_limited_greedy"):
            raise c.wrong("topk_method", "greedy and group_limited_greedy can be written")
        if c.first("norm_topk_prob"):
            raise c.wrong("norm_topk_prob", "DeepSeek-V2 does not normalise")
        if method == "greedy":  # as if there were one group, whatever the config says
            out |= {"expert_group_count": 1, "expert_group_used_count": 1}
    return out | {
        "attention.head_count_kv": 1,
        "attention.key_length": lora + rope,  # of the latents, which llama.cpp caches
        "attention.value_length": lora,
        "attention.key_length_mla": c.integer("qk_nope_head_dim") + rope,
        "attention.value_length_mla": c.integer("v_head_dim"),
    }
