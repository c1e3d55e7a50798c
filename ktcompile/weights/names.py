"""Which stored GGUF tensors make up each Hugging Face parameter, by architecture.

A new architecture is one more table. `{L}` stands for the layer number. A parameter lists its forms in order of
preference; the first whose tensors are all in the file is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Whole:
    """The parameter is one stored tensor."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """All stored tensors of this form."""
        return (self.name,)


@dataclass(frozen=True)
class Stacked:
    """Stored tensors one after the other along the rows (the last axis but one), e.g. gate and up."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class KeyValueHeads:
    """MLA's kv_b_proj [heads * (nope + v), lora] from k_b [heads, lora, nope] and v_b [heads, v, lora].

    For each head first its keys, transposed, then its values (llama.cpp splits and transposes them for absorption).
    """

    key: str
    value: str

    @property
    def names(self) -> tuple[str, ...]:
        """All stored tensors of this form."""
        return (self.key, self.value)


Form = Whole | Stacked | KeyValueHeads

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}

DEEPSEEK2: Mapping[str, tuple[Form, ...]] = {
    "model.embed_tokens.weight": (Whole("token_embd.weight"),),
    "model.norm.weight": (Whole("output_norm.weight"),),
    "lm_head.weight": (Whole("output.weight"), Whole("token_embd.weight")),  # absent = tied to the embedding
    **{f"model.layers.{{L}}.{key}": (Whole(f"blk.{{L}}.{name}"),) for key, name in _LAYER.items()},
    "model.layers.{L}.mlp.experts.gate_up_proj": (
        Stacked(("blk.{L}.ffn_gate_exps.weight", "blk.{L}.ffn_up_exps.weight")),
    ),
    "model.layers.{L}.self_attn.kv_b_proj.weight": (
        KeyValueHeads("blk.{L}.attn_k_b.weight", "blk.{L}.attn_v_b.weight"),
        Whole("blk.{L}.attn_kv_b.weight"),  # files from before llama.cpp split it (2025)
    ),
}

ARCHITECTURES: Mapping[str, Mapping[str, tuple[Form, ...]]] = {"deepseek2": DEEPSEEK2}
