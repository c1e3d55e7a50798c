"""gpt-oss: biases everywhere, a sink for each head, experts transposed with gate and up in alternating columns."""

from ktcompile.weights.names.common import ATTENTION, QKV_BIAS, table
from ktcompile.weights.names.forms import Columns

GPT_OSS = table(
    {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
    }
    | ATTENTION
    | QKV_BIAS
    | {
        "self_attn.o_proj.bias": "attn_output.bias",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router.weight": "ffn_gate_inp.weight",
        "mlp.router.bias": "ffn_gate_inp.bias",
        "mlp.experts.gate_up_proj": Columns(("ffn_gate_exps.weight", "ffn_up_exps.weight"), transpose=True),
        "mlp.experts.gate_up_proj_bias": Columns(("ffn_gate_exps.bias", "ffn_up_exps.bias")),
        "mlp.experts.down_proj": Columns(("ffn_down_exps.weight",), transpose=True),
        "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    }
)
