"""gpt-oss-20b and -120b."""

from ktcompile.gguf_config.access import Fields
from ktcompile.gguf_config.family import SOFTMAX_OF_CHOSEN, Family, Row, gqa_rows


def _fixed(layers: int) -> Fields:
    return {
        "hidden_act": "silu",
        "attention_bias": True,
        "swiglu_alpha": 1.702,  # constants in llama.cpp
        "swiglu_limit": 7.0,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
    }


GPT_OSS = Family(
    "gpt-oss",
    "gpt_oss",
    "GptOssForCausalLM",
    (
        *gqa_rows("num_local_experts", alias="num_experts"),
        Row("feed_forward_length", "intermediate_size", default=lambda m: m.integer("expert_feed_forward_length")),
        Row("expert_feed_forward_length", "intermediate_size", default=lambda m: m.integer("feed_forward_length")),
        Row("attention.sliding_window", "sliding_window"),
    ),
    _fixed,
    SOFTMAX_OF_CHOSEN,
    {},
    yarn_truncates=False,  # the published models do not, whatever llama.cpp computes
)
