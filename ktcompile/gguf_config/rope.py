"""Rotary positions in both directions: plain, linear and YaRN.

llama.cpp's YaRN multiplies cos and sin by attn_factor * yarn_attn_factor * (1 + 0.1 ln factor); Hugging Face's by
`attention_factor`, which is 1 + 0.1 ln factor unless the config says otherwise.
"""

import math

from ktcompile.gguf_config.access import Config, Fields, Metadata
from ktcompile.weights.gguf_header import Value

_THETA = 10000.0  # llama.cpp's, if a file has none
_FAST, _SLOW = 32.0, 1.0


def rope_fields(m: Metadata, *, is_mla: bool = False, truncate: bool = True) -> Fields:
    """rope_parameters. `truncate`: whether the model rounds YaRN's bounds to whole dimensions; no file says it."""
    theta = m.number("rope.freq_base", _THETA)
    factor = m.number("rope.scaling.factor", m.number("rope.scale_linear", 1.0)) or 1.0
    kind = m.values.get(f"{m.prefix}rope.scaling.type", "none" if factor == 1.0 else "linear")  # as llama.cpp has it
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" and not is_mla:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "yarn":
        raise m.wrong("rope.scaling.type", "none and yarn are known" if is_mla else "none, linear and yarn are known")
    if m.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise m.wrong("rope.scaling.yarn_ext_factor", "only 1 is known")
    fields: Fields = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": m.number("rope.scaling.factor"),
        "original_max_position_embeddings": m.integer(
            "rope.scaling.original_context_length", m.integer("context_length")
        ),
        "beta_fast": m.number("rope.scaling.yarn_beta_fast", _FAST),
        "beta_slow": m.number("rope.scaling.yarn_beta_slow", _SLOW),
    }
    if not truncate:
        fields["truncate"] = False
    return fields | (_mla_attention(m) if is_mla else _attention(m, factor))


def _attention(m: Metadata, factor: float) -> Fields:
    scale = m.number("rope.scaling.attn_factor", 1.0) * m.number("rope.scaling.yarn_attn_factor", 1.0)
    return {} if scale == 1.0 else {"attention_factor": scale * _mscale(factor)}


def _mla_attention(m: Metadata) -> Fields:
    """DeepSeek's mscale.

    llama.cpp stores yarn_log_multiplier = 0.1 * mscale_all_dim and scales only the attention logits, never cos and sin:
    the same as mscale = mscale_all_dim, or as attention_factor = 1 without it.
    """
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if m.number(name, 1.0) != 1.0:
            raise m.wrong(name, "only 1 is known")
    mscale = float(f"{10 * m.number('rope.scaling.yarn_log_multiplier', 0.0):.6g}")
    return {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {"attention_factor": 1.0}


def rope_metadata(c: Config, *, is_mla: bool = False, truncate: bool = True) -> dict[str, Value]:
    """Keys after `<architecture>.` for a config's rope_parameters; ModelFileError for what GGUF cannot say."""
    p = c.inner("rope_parameters")
    out: dict[str, Value] = {"rope.freq_base": p.number("rope_theta")}
    kind = p.first("rope_type") or "default"
    if kind == "default":
        return out
    if kind == "linear" and not is_mla:
        return out | {"rope.scaling.type": "linear", "rope.scaling.factor": p.number("factor")}
    if kind != "yarn":
        raise p.wrong("rope_type", "default, linear and yarn can be written, with MLA default and yarn")
    if p.values.get("truncate", True) is not truncate:
        raise p.wrong("truncate", f"llama.cpp cannot say it: {truncate} is needed for this architecture")
    original = p.integer("original_max_position_embeddings")
    factor = p.number("factor") if p.first("factor") is not None else c.integer("max_position_embeddings") / original
    out |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": p.number("beta_fast") if p.first("beta_fast") else _FAST,
        "rope.scaling.yarn_beta_slow": p.number("beta_slow") if p.first("beta_slow") else _SLOW,
    }
    attention = _attention_factor(p, factor)
    if not is_mla:
        scale = attention / _mscale(factor)
        return out if math.isclose(scale, 1.0, rel_tol=1e-9) else out | {"rope.scaling.yarn_attn_factor": scale}
    if not math.isclose(attention, 1.0, rel_tol=1e-6):
        raise p.wrong("mscale", f"cos and sin times {attention:.6g}: MLA in llama.cpp never scales them")
    if p.first("mscale_all_dim"):
        out["rope.scaling.yarn_log_multiplier"] = 0.1 * p.number("mscale_all_dim")
    return out


def _attention_factor(p: Config, factor: float) -> float:
    """What Hugging Face multiplies cos and sin by."""
    if p.first("attention_factor") is not None:
        return p.number("attention_factor")
    if p.first("mscale") and p.first("mscale_all_dim"):
        return _mscale(factor, p.number("mscale")) / _mscale(factor, p.number("mscale_all_dim"))
    return _mscale(factor)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
