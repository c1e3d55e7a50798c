"""Qwen1.5-MoE and Qwen2-57B-A14B: every layer has experts, and one shared expert with a gate of its own."""

from ktcompile.weights.names.common import ATTENTION, EXPERTS, NORMS, QKV_BIAS, table
from ktcompile.weights.names.forms import OneRow

QWEN2MOE = table(
    NORMS
    | ATTENTION
    | QKV_BIAS
    | EXPERTS
    | {
        "mlp.shared_expert_gate.weight": OneRow(("ffn_gate_inp_shexp.weight",)),
        "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
        "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
        "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    }
)
