"""Names that several architectures share. In tables a name without `blk.{L}.` is one of a layer."""

from collections.abc import Mapping
from dataclasses import replace

from ktcompile.weights.names.forms import EachExpert, Form, Rows

Table = Mapping[str, tuple[Form, ...]]
"""Parameter -> its forms in order of preference; `{L}` stands for the layer number. Written is the first."""

Layer = dict[str, str | Form]
"""The same for one layer, without its number: a name alone is a parameter that is stored as it is."""

ENDS: Table = {
    "lm_head.weight": (Rows(("output.weight",)), Rows(("token_embd.weight",))),  # absent = tied to the embedding
    "model.norm.weight": (Rows(("output_norm.weight",)),),
    "model.embed_tokens.weight": (Rows(("token_embd.weight",)),),
}

NORMS: Layer = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight"}

ATTENTION: Layer = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
QKV_BIAS: Layer = {
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
}
QK_NORM: Layer = {"self_attn.q_norm.weight": "attn_q_norm.weight", "self_attn.k_norm.weight": "attn_k_norm.weight"}

DENSE: Layer = {
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
EXPERTS: Layer = {
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.gate_up_proj": Rows(("ffn_gate_exps.weight", "ffn_up_exps.weight")),
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
EXPERTS_ONE_BY_ONE: Mapping[str, Form] = {
    "mlp.experts.gate_up_proj": EachExpert(("ffn_gate.{E}.weight", "ffn_up.{E}.weight")),
    "mlp.experts.down_proj": EachExpert(("ffn_down.{E}.weight",)),
}
SHARED_EXPERTS: Layer = {
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
SELECTION_BIAS: Layer = {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}


def table(layer: Layer, older: Mapping[str, Form] | None = None) -> Table:
    """The table of an architecture: the ends, and one layer with what older files have instead."""
    out = dict(ENDS)
    for key, form in layer.items():
        forms = (form, (older or {})[key]) if key in (older or {}) else (form,)
        out[f"model.layers.{{L}}.{key}"] = tuple(_of_layer(f) for f in forms)
    return out


def _of_layer(form: str | Form) -> Form:
    made = Rows((form,)) if isinstance(form, str) else form
    return replace(made, names=tuple(f"blk.{{L}}.{name}" for name in made.names))
