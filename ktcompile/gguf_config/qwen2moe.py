"""Qwen1.5-MoE and Qwen2-57B-A14B."""

from ktcompile.gguf_config.access import Fields
from ktcompile.gguf_config.family import SOFTMAX, Family, Row, gqa_rows, guessed_expert_width


def _fixed(layers: int) -> Fields:
    return {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * layers,
        "decoder_sparse_step": 1,  # llama.cpp: every layer has experts
        "mlp_only_layers": [],
    }


QWEN2MOE = Family(
    "qwen2moe",
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    (
        *gqa_rows("num_experts", alias="num_local_experts"),
        Row("feed_forward_length", "intermediate_size"),
        Row("expert_feed_forward_length", "moe_intermediate_size", default=guessed_expert_width),
        Row(
            "expert_shared_feed_forward_length",
            "shared_expert_intermediate_size",
            default=lambda m: m.integer("feed_forward_length"),
        ),
        Row("expert_weights_norm", "norm_topk_prob", "flag", default=lambda m: False),
    ),
    _fixed,
    SOFTMAX,
    {"qkv_bias": ("blk.0.attn_q.bias", True)},
)
