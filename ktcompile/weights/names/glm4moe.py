"""GLM-4.5 and 4.6: leading dense layers; only the large ones normalise queries and keys."""

from ktcompile.weights.names.common import (
    ATTENTION,
    DENSE,
    EXPERTS,
    QK_NORM,
    QKV_BIAS,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    table,
)

GLM4MOE = table(
    {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
    }
    | ATTENTION
    | QKV_BIAS
    | QK_NORM
    | DENSE
    | EXPERTS
    | SELECTION_BIAS
    | SHARED_EXPERTS
)
