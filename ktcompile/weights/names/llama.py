"""Mixtral, which has llama's names and llama's order of the rows of queries and keys."""

from ktcompile.weights.names.common import ATTENTION, EXPERTS, EXPERTS_ONE_BY_ONE, NORMS, table
from ktcompile.weights.names.forms import Rotated

LLAMA = table(
    NORMS
    | ATTENTION
    | {
        "self_attn.q_proj.weight": Rotated(("attn_q.weight",), "heads"),
        "self_attn.k_proj.weight": Rotated(("attn_k.weight",), "kv_heads"),
    }
    | EXPERTS,
    older=EXPERTS_ONE_BY_ONE,
)
