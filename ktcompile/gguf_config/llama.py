"""Mixtral, a llama with experts."""

from ktcompile.gguf_config.access import Fields, Metadata
from ktcompile.gguf_config.family import SOFTMAX, Family, Row, gqa_rows


def _fixed(layers: int) -> Fields:
    return {"hidden_act": "silu", "sliding_window": None}


MIXTRAL = Family(
    "llama",
    "mixtral",
    "MixtralForCausalLM",
    (*gqa_rows("num_local_experts", alias="num_experts"), Row("feed_forward_length", "intermediate_size")),
    _fixed,
    SOFTMAX,
    {},
)


def llama_fields(m: Metadata) -> Fields:
    """Fields of MixtralConfig; ModelFileError for a llama without experts."""
    if not m.integer("expert_count", 0):
        raise m.wrong("expert_count", "of llama only models with experts (Mixtral) are known")
    return MIXTRAL.fields(m)
