"""Qwen3-30B-A3B and its larger sisters."""

from ktcompile.gguf_config.access import Fields
from ktcompile.gguf_config.family import SOFTMAX, Family, Row, gqa_rows, guessed_expert_width


def _fixed(layers: int) -> Fields:
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,  # llama.cpp: every layer has experts
        "mlp_only_layers": [],
    }


QWEN3MOE = Family(
    "qwen3moe",
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        *gqa_rows("num_experts", alias="num_local_experts"),
        Row("feed_forward_length", "intermediate_size"),
        Row("expert_feed_forward_length", "moe_intermediate_size", default=guessed_expert_width),
        Row("expert_weights_norm", "norm_topk_prob", "flag", default=lambda m: True),  # llama.cpp always normalises
    ),
    _fixed,
    SOFTMAX,
    {},
)
