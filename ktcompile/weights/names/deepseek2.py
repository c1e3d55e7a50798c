"""DeepSeek-V2, V2-Lite, V3, R1 and Kimi-K2."""

from ktcompile.weights.names.common import DENSE, EXPERTS, NORMS, SELECTION_BIAS, SHARED_EXPERTS, table
from ktcompile.weights.names.forms import KeyValueHeads, Rows

DEEPSEEK2 = table(
    NORMS
    | {
        "self_attn.q_proj.weight": "attn_q.weight",
        "self_attn.q_a_proj.weight": "attn_q_a.weight",
        "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
        "self_attn.q_b_proj.weight": "attn_q_b.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
        "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
        "self_attn.kv_b_proj.weight": KeyValueHeads(("attn_k_b.weight", "attn_v_b.weight")),
        "self_attn.o_proj.weight": "attn_output.weight",
    }
    | DENSE
    | EXPERTS
    | SELECTION_BIAS
    | SHARED_EXPERTS,
    older={"self_attn.kv_b_proj.weight": Rows(("attn_kv_b.weight",))},  # before llama.cpp split it (2025)
)
