"""OLMoE-1B-7B."""

from ktcompile.gguf_config.access import Fields
from ktcompile.gguf_config.family import SOFTMAX, Family, Row, gqa_rows


def _fixed(layers: int) -> Fields:
    return {"hidden_act": "silu", "attention_bias": False}


OLMOE = Family(
    "olmoe",
    "olmoe",
    "OlmoeForCausalLM",
    (
        *gqa_rows("num_experts", alias="num_local_experts"),
        Row("feed_forward_length", "intermediate_size"),
        Row("expert_weights_norm", "norm_topk_prob", "flag", default=lambda m: False),  # llama.cpp never normalises
        Row("attention.clamp_kqv", "clip_qkv", "number", default=lambda m: None),
    ),
    _fixed,
    SOFTMAX,
    {},
    has_head_dim=False,
)
