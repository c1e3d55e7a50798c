"""GLM-4.5, 4.5-Air and 4.6."""

from ktcompile.gguf_config.access import Fields
from ktcompile.gguf_config.family import SIGMOID, Family, Row, gqa_rows


def _fixed(layers: int) -> Fields:
    return {"hidden_act": "silu"}


GLM4MOE = Family(
    "glm4moe",
    "glm4_moe",
    "Glm4MoeForCausalLM",
    (
        *gqa_rows("n_routed_experts", alias="num_local_experts"),
        Row("feed_forward_length", "intermediate_size"),
        Row("expert_feed_forward_length", "moe_intermediate_size"),
        Row("expert_shared_count", "n_shared_experts"),
        Row("leading_dense_block_count", "first_k_dense_replace", default=lambda m: 0),
        Row("expert_group_count", "n_group", default=lambda m: 1),
        Row("expert_group_used_count", "topk_group", default=lambda m: 1),
        Row("expert_weights_norm", "norm_topk_prob", "flag", default=lambda m: False),
        Row("expert_weights_scale", "routed_scaling_factor", "number", default=lambda m: 1.0),
    ),
    _fixed,
    SIGMOID,
    {
        "attention_bias": ("blk.0.attn_q.bias", True),
        "use_qk_norm": ("blk.0.attn_q_norm.weight", False),  # the 355B models have it
    },
    "partial",
    has_nextn=True,
)
