"""GGUF architectures: what is written of a Hugging Face model and read again is that model, to the last logit."""
# ruff: noqa: SIM118  (a weight source has keys(), but is no mapping to iterate over)

import importlib
import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import ktcompile
from ktcompile.errors import ModelFileError
from ktcompile.gguf_config import config_fields, metadata_fields
from ktcompile.target import Target, detect
from ktcompile.weights import GGUFSource, ModuleSource, values
from ktcompile.weights.gguf_header import Value
from ktcompile.weights.names import ARCHITECTURES, Export, expected_unused, exports

PROMPT = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(5))

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0,
          "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}  # fmt: skip
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
_GQA = {"num_key_value_heads": 2, "head_dim": 12}
_WIDE = {"intermediate_size": 40, "moe_intermediate_size": 14, "num_experts_per_tok": 3}
_SHARED = _WIDE | {"num_hidden_layers": 3, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
         "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
_V2 = _SIZES | _MLA | _SHARED | {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
_V3 = _SIZES | _MLA | _SHARED | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
_QWEN2 = _SIZES | _WIDE | {"num_key_value_heads": 2, "num_experts": 8, "shared_expert_intermediate_size": 18}
_QWEN3 = _SIZES | _GQA | _WIDE | {"num_experts": 8, "norm_topk_prob": True}
_GLM = _SIZES | _GQA | _SHARED | {"n_shared_experts": 1, "attention_bias": True, "routed_scaling_factor": 1.5}
_MIXTRAL = _SIZES | _GQA | {"intermediate_size": 18, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = _MIXTRAL | {"sliding_window": 8, "num_hidden_layers": 3}
_OLMOE = _SIZES | {"num_key_value_heads": 2, "intermediate_size": 14, "num_experts": 8, "num_experts_per_tok": 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek v2": ("deepseek_v2", _V2 | {"q_lora_rank": 20, "routed_scaling_factor": 16.0}),
    "deepseek v2 lite": ("deepseek_v2", _V2 | {
        "q_lora_rank": None, "topk_method": "greedy",  # which does not look at groups
        "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    "deepseek v3": ("deepseek_v3", _V3 | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek v3, no q lora": ("deepseek_v3", _V3 | {"q_lora_rank": None, "norm_topk_prob": False}),
    "deepseek v3, tied": ("deepseek_v3", _V3 | {"tie_word_embeddings": True}),
    "kimi k2": ("deepseek_v3", _V3 | {
        "n_routed_experts": 24, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 2.827,
        "rope_parameters": _YARN | {"rope_theta": 5e4, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "qwen2moe": ("qwen2_moe", _QWEN2),
    "qwen2moe, own head size, no biases": ("qwen2_moe", _QWEN2 | {"head_dim": 12, "qkv_bias": False}),
    "qwen2moe, tied": ("qwen2_moe", _QWEN2 | {"tie_word_embeddings": True, "norm_topk_prob": True}),
    "qwen3moe": ("qwen3_moe", _QWEN3),
    "qwen3moe, yarn, tied": ("qwen3_moe", _QWEN3 | {"rope_parameters": _YARN, "tie_word_embeddings": True}),
    "qwen3moe, weights as they are": ("qwen3_moe", _QWEN3 | {
        "norm_topk_prob": False, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}),
    "glm4moe": ("glm4_moe", _GLM),
    "glm4moe, large": ("glm4_moe", _GLM | {"use_qk_norm": True, "n_group": 2, "topk_group": 1}),
    "glm4moe, tied, no biases": ("glm4_moe", _GLM | {
        "attention_bias": False, "tie_word_embeddings": True, "norm_topk_prob": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1 / 3}}),
    "mixtral": ("mixtral", _MIXTRAL),
    "mixtral, tied": ("mixtral", _MIXTRAL | {"head_dim": None, "tie_word_embeddings": True}),
    "gpt-oss": ("gpt_oss", _GPT),
    "gpt-oss, tied": ("gpt_oss", _GPT | {
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    "olmoe": ("olmoe", _OLMOE),
    "olmoe, tied, clipped": ("olmoe", _OLMOE | {"tie_word_embeddings": True, "clip_qkv": 0.5, "norm_topk_prob": True}),
}  # fmt: skip


def configured(model_type: str, fields: Mapping[str, Any]) -> PretrainedConfig:
    """A new config object: classes change the dictionaries that they are given."""
    copied = {k: dict(v) if isinstance(v, dict) else v for k, v in fields.items() if k != "model_type"}
    return AutoConfig.for_model(model_type, **copied)


def built(config: PretrainedConfig) -> PreTrainedModel:
    """The model as its definition computes, in fp32."""
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@cache
def model(case: str) -> PreTrainedModel:
    """A random model of a case: no two of its values agree, norms and biases included."""
    torch.manual_seed(0)
    made = built(configured(*CASES[case]))
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if name.endswith(("norm.weight", "layernorm.weight")):
                tensor.normal_(1.0, 0.2)
            elif not name.endswith("inv_freq"):
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.3)
    return made


def parameters(of: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers; a tied head once, as the embedding."""
    tied = of.config.tie_word_embeddings
    return {k: v.detach() for k, v in of.state_dict().items() if not (tied and k == "lm_head.weight")}


def exported(of: PreTrainedModel) -> tuple[Export, ...]:
    """The tensors to write."""
    fields = of.config.to_dict()
    architecture = metadata_fields(fields)["general.architecture"]
    assert isinstance(architecture, str)
    return exports(architecture, {k: tuple(v.shape) for k, v in parameters(of).items()}, fields)


@cache
def arrays(case: str) -> dict[str, np.ndarray]:
    """The tensors of the GGUF file, read a few rows at a time."""
    source = ModuleSource(parameters(model(case)))
    out = {}
    for e in exported(model(case)):
        rows = [e.read(source, slice(at, min(at + 3, e.shape[0]))) for at in range(0, e.shape[0], 3)]
        out[e.name] = torch.cat(rows).numpy()
        assert out[e.name].shape == e.shape
    return out


def write(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, np.ndarray]) -> Path:
    """A GGUF file by the gguf package, with a tokenizer of which only the number of tokens matters."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in metadata.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(case: str) -> dict[str, Value]:
    ids: dict[str, Value] = {f"tokenizer.ggml.{k}_token_id": i for i, k in enumerate(("bos", "eos", "padding"))}
    return metadata_fields(model(case).config.to_dict()) | ids


def reread(path: Path) -> tuple[GGUFSource, PreTrainedModel]:
    """A fresh model of what the file says, every parameter and persistent buffer of it from the file."""
    source = GGUFSource(path)
    fields = config_fields(source.metadata, str(path), source.stored())
    fresh = built(AutoConfig.for_model(**fields))
    state = {key: values(source, key) for key in source.keys()}
    fresh.load_state_dict(state, strict=True)
    return source, fresh


@torch.no_grad()
def same_logits(a: PreTrainedModel, b: PreTrainedModel) -> None:
    want, got = (m(PROMPT).logits for m in (a, b))
    assert want.std() > 0.05  # else nothing was compared
    assert (got - want).abs().max() < 1e-5


# ---- there and back


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_as_the_same_model(case: str, tmp_path: Path) -> None:
    source, fresh = reread(write(tmp_path / "m.gguf", metadata_of(case), arrays(case)))
    assert source.unused() == ()
    assert set(source.keys()) == set(fresh.state_dict())
    assert fresh.config.tie_word_embeddings == model(case).config.tie_word_embeddings
    for key, tensor in parameters(model(case)).items():
        assert torch.equal(values(source, key), tensor), key
    same_logits(model(case), fresh)


@pytest.mark.parametrize("case", CASES)
def test_any_rows_of_an_export_are_those_of_the_whole(case: str) -> None:
    source = ModuleSource(parameters(model(case)))
    for e in exported(model(case)):
        whole = e.read(source, slice(None))
        assert np.array_equal(whole.numpy(), arrays(case)[e.name])
        middle = slice(e.shape[0] // 3, e.shape[0] - e.shape[0] // 4)
        assert torch.equal(e.read(source, middle), whole[middle])
        assert len(e.read(source, slice(1, 1))) == 0


@pytest.mark.parametrize("case", ["deepseek v2 lite", "deepseek v3", "kimi k2"])
def test_deepseek_from_before_kv_b_was_split(case: str, tmp_path: Path) -> None:
    new = metadata_of(case)
    c = model(case).config
    old = {k: v for k, v in new.items() if not k.endswith("_mla")} | {
        "deepseek2.attention.key_length": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "deepseek2.attention.value_length": c.v_head_dim,
        "deepseek2.attention.head_count_kv": c.num_attention_heads,
    }
    tensors = {k: v for k, v in arrays(case).items() if "attn_k_b" not in k and "attn_v_b" not in k}
    for layer in range(c.num_hidden_layers):
        key = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        tensors[f"blk.{layer}.attn_kv_b.weight"] = parameters(model(case))[key].numpy()
    source, fresh = reread(write(tmp_path / "m.gguf", old, tensors))
    assert source.unused() == ()
    same_logits(model(case), fresh)


@pytest.mark.parametrize("case", ["mixtral", "mixtral, tied"])
def test_mixtral_from_before_experts_were_one_tensor(case: str, tmp_path: Path) -> None:
    tensors = {}
    for name, array in arrays(case).items():
        if "_exps" not in name:
            tensors[name] = array
            continue
        for expert, matrix in enumerate(array):
            tensors[name.replace("_exps", f".{expert}")] = matrix
    assert "blk.1.ffn_down.3.weight" in tensors
    source, fresh = reread(write(tmp_path / "m.gguf", metadata_of(case), tensors))
    assert source.unused() == ()
    same_logits(model(case), fresh)
    del tensors["blk.1.ffn_up.2.weight"]
    source = GGUFSource(write(tmp_path / "n.gguf", metadata_of(case), tensors))
    with pytest.raises(ModelFileError, match=r"n.gguf: no parameter 'model.layers.1.mlp.experts.gate_up_proj': the f"):
        source.parts("model.layers.1.mlp.experts.gate_up_proj")


def test_the_gate_of_a_shared_expert_may_have_two_axes(tmp_path: Path) -> None:
    tensors = {k: v[None] if "gate_inp_shexp" in k else v for k, v in arrays("qwen2moe").items()}
    assert tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (1, 32)
    same_logits(model("qwen2moe"), reread(write(tmp_path / "m.gguf", metadata_of("qwen2moe"), tensors))[1])


@pytest.mark.parametrize("case", ["glm4moe", "deepseek v3"])
def test_layers_for_multi_token_prediction_stay_unread(case: str, tmp_path: Path) -> None:
    metadata = metadata_of(case)
    architecture = str(metadata["general.architecture"])
    metadata |= {f"{architecture}.block_count": 4, f"{architecture}.nextn_predict_layers": 1}
    more = {k.replace("blk.2.", "blk.3."): v for k, v in arrays(case).items() if k.startswith("blk.2.")}
    more |= {f"blk.3.nextn.{name}.weight": np.ones(32, np.float32) for name in ("enorm", "hnorm")}
    source, fresh = reread(write(tmp_path / "m.gguf", metadata, arrays(case) | more))
    assert fresh.config.num_hidden_layers == 3
    assert set(source.unused()) == set(more)
    assert expected_unused(architecture, source.metadata, source.unused()) == source.unused()
    assert expected_unused(architecture, source.metadata, ("blk.2.odd", "odd", "blk.3.a")) == ("blk.3.a",)
    assert expected_unused(architecture, metadata_of(case), ("blk.2.odd", "odd", "blk.3.a")) == ()
    same_logits(model(case), fresh)


# ---- names as the gguf package and llama.cpp have them


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_the_gguf_packages(architecture: str) -> None:
    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == architecture)
    known = {TENSOR_NAMES[t].replace("{bid}", "{L}") for t in MODEL_TENSORS[arch]}
    for forms in ARCHITECTURES[architecture].values():
        for name in (n for form in forms for n in form.names):
            stem = name.replace(".{E}", "_exps").removesuffix(".weight").removesuffix(".bias")
            assert name != stem and stem in known, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_names_are_where_the_gguf_package_maps_them(architecture: str) -> None:
    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == architecture)
    mapping = gguf.get_tensor_name_map(arch, 1)
    seen = 0
    for key, forms in ARCHITECTURES[architecture].items():
        hf = key.replace("{L}", "0").replace("e_score_correction_bias", "e_score_correction.bias")
        want = mapping.get_name(hf, try_suffixes=(".weight", ".bias"))
        if len(forms[0].names) == 1 and ".experts." not in key:
            name = forms[0].names[0].replace("{L}", "0")
            assert (name if "sinks" not in key else name.removesuffix(".weight")) == want, key
            seen += 1
    assert seen > 8


def test_order_is_the_ends_then_layer_by_layer() -> None:
    names = [e.name for e in exported(model("deepseek v3"))]
    assert names[:3] == ["output.weight", "output_norm.weight", "token_embd.weight"]
    layers = [int(n.split(".")[1]) for n in names[3:]]
    assert layers == sorted(layers) and len(set(names)) == len(names)


def test_vectors_biases_and_routers_are_kept_exact() -> None:
    exact = {e.name for e in exported(model("gpt-oss")) if e.exact and e.name.startswith("blk.0.")}
    assert exact == {f"blk.0.{n}" for n in (
        "attn_norm.weight", "post_attention_norm.weight", "attn_sinks.weight", "ffn_gate_inp.weight",
        "ffn_gate_inp.bias", "ffn_gate_exps.bias", "ffn_up_exps.bias", "ffn_down_exps.bias", "attn_q.bias",
        "attn_k.bias", "attn_v.bias", "attn_output.bias")}  # fmt: skip


def test_mixtral_rows_are_permuted_as_llama_cpps_converter_does() -> None:
    for name, heads in (("q", 4), ("k", 2)):
        weight = parameters(model("mixtral"))[f"model.layers.0.self_attn.{name}_proj.weight"].numpy()
        want = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        assert np.array_equal(arrays("mixtral")[f"blk.0.attn_{name}.weight"], want)


def test_gpt_oss_experts_are_split_and_turned() -> None:
    weight = parameters(model("gpt-oss"))["model.layers.0.mlp.experts.gate_up_proj"].numpy()
    bias = parameters(model("gpt-oss"))["model.layers.0.mlp.experts.gate_up_proj_bias"].numpy()
    for i, name in enumerate(("gate", "up")):
        got = arrays("gpt-oss")
        assert np.array_equal(got[f"blk.0.ffn_{name}_exps.weight"], weight[..., i::2].transpose(0, 2, 1))
        assert np.array_equal(got[f"blk.0.ffn_{name}_exps.bias"], bias[..., i::2])


# ---- what cannot be written


def test_a_parameter_without_a_place_is_refused() -> None:
    for architecture, key in (("qwen3moe", "model.layers.0.mlp.extra.weight"), ("olmoe", "model.extra")):
        with pytest.raises(ModelFileError, match=f"{key}: architecture {architecture} has no tensor"):
            exports(architecture, {key: (4, 4)}, {})
    with pytest.raises(ModelFileError, match=r"'mamba' cannot be written; known are deepseek2, glm4moe, gpt-oss, llam"):
        exports("mamba", {}, {})


@pytest.mark.parametrize(
    ("architecture", "key", "shape", "message"),
    [
        ("deepseek2", "self_attn.kv_b_proj.weight", (30, 8), "does not split into 4 heads"),
        ("llama", "self_attn.q_proj.weight", (20, 8), "rows for 4 heads"),
        ("qwen3moe", "mlp.experts.gate_up_proj", (4, 7, 8), "does not split into 2"),
        ("gpt-oss", "mlp.experts.gate_up_proj", (4, 8, 7), "does not split into 2"),
        ("qwen2moe", "mlp.shared_expert_gate.weight", (2, 8), "one row is needed"),
    ],
)
def test_a_parameter_of_another_shape_is_refused(
    architecture: str, key: str, shape: tuple[int, ...], message: str
) -> None:
    key = f"model.layers.0.{key}"
    with pytest.raises(ModelFileError, match=f"{key}: .*{message}"):
        exports(architecture, {key: shape}, {"num_attention_heads": 4, "qk_nope_head_dim": 4})


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("qwen3moe", {"model_type": "mamba"}, "model_type is 'mamba'; known are deepseek_v2, deepseek_v3, glm4_moe"),
        ("qwen3moe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; qwen3moe can only say silu"),
        ("qwen3moe", {"hidden_size": "32"}, "hidden_size is '32'; an integer is needed"),
        ("qwen3moe", {"rms_norm_eps": None}, "rms_norm_eps is missing; a number is needed"),
        ("qwen3moe", {"attention_bias": True}, "attention_bias is True; qwen3moe can only say False"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ("qwen3moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; true or false is needed"),
        ("qwen3moe", {"rope_parameters": None}, "rope_parameters is missing; fields are needed"),
        ("qwen3moe", {"rope_parameters": _YARN | {"truncate": False}}, "truncate is False; llama.cpp cannot say it"),
        ("qwen3moe", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type is 'llama3'; default"),
        ("qwen3moe", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "turns whole heads"),
        ("qwen2moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096; llama can only say None"),
        ("gpt-oss", {"layer_types": ["full_attention"] * 3}, "layer_types is ['full_attention'"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
        ("gpt-oss", {"rope_parameters": _YARN}, "truncate is missing; llama.cpp cannot say it: False is needed"),
        ("olmoe", {"head_dim": 12}, "head_dim is 12; hidden_size / num_attention_heads = 8 is needed"),
        ("deepseek v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("deepseek v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2; num_attention_heads = 4 is needed"),
        ("deepseek v3", {"rope_parameters": _YARN}, "mscale is missing; cos and sin times 1.2"),
        ("deepseek v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek v2", {"norm_topk_prob": True}, "norm_topk_prob is True; DeepSeek-V2 does not normalise"),
    ],
)
def test_a_config_that_gguf_cannot_say_is_refused(case: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        metadata_fields(model(case).config.to_dict() | fields, "config.json")
    assert message in str(caught.value) and str(caught.value).startswith("config.json: ")


# ---- configurations, both ways

# Fields that say nothing about logits, or that are compared otherwise.
NO_MATTER = {
    "architectures", "dtype", "initializer_range", "use_cache", "attention_dropout", "router_aux_loss_coef",
    "output_router_logits", "pretraining_tp", "max_window_layers", "num_nextn_predict_layers", "router_jitter_noise",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "scoring_func",
}  # fmt: skip


def rotation(config: PretrainedConfig) -> tuple[Tensor, float, float]:
    """Frequencies, the factor of cos and sin, and that of the attention logits."""
    kind = config.model_type
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    made = getattr(module, f"{''.join(p.title() for p in kind.split('_'))}RotaryEmbedding")(config)
    logits = module.yarn_apply_mscale(config.rope_parameters, 1.0) if "deepseek" in kind else 1.0
    return made.inv_freq, made.attention_scaling, logits


def relevant(config: PretrainedConfig) -> dict[str, object]:
    """What logits depend on, but for positions."""
    fields = {k: v for k, v in config.to_dict().items() if k not in NO_MATTER}
    if fields.get("head_dim") is None:
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    if config.model_type == "deepseek_v2" and config.topk_method == "greedy":
        fields |= {"n_group": 1, "topk_group": 1}  # not looked at
    if config.model_type == "deepseek_v3":
        fields.pop("topk_method", None)  # a field of config.json that the class does not read
    if config.model_type == "gpt_oss":
        fields = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0} | fields  # transformers 5.17 has them in its code
    return fields


@st.composite
def ropes(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    theta = draw(st.sampled_from([1e4, 5e4, 150000.0, 1e6, 12345.5]))
    mla = kind.startswith("deepseek")
    partial = {"partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0]))} if kind == "glm4_moe" else {}
    rope = draw(st.sampled_from(["default", "yarn"] if mla else ["default", "linear", "yarn"]))
    if rope == "default":
        return {"rope_type": rope, "rope_theta": theta} | partial
    factor = draw(st.sampled_from([1.0, 2.0, 40.0, 3.7]))
    if rope == "linear":
        return {"rope_type": rope, "rope_theta": theta, "factor": factor} | partial
    mscale = draw(st.sampled_from([0.707, 1.0]))
    attention = draw(
        st.sampled_from(
            [{"mscale": mscale, "mscale_all_dim": mscale}, {"attention_factor": 1.0}]
            + ([] if mla else [{}, {"attention_factor": 1.3}, {"mscale": 1.0, "mscale_all_dim": 0.5}])
        )
    )
    return _YARN | partial | attention | {
        "rope_theta": theta, "factor": factor, "beta_fast": draw(st.sampled_from([32.0, 1.0])),
        "truncate": kind != "gpt_oss", "original_max_position_embeddings": draw(st.sampled_from([32, 4096])),
    }  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> PretrainedConfig:
    """A config near a case's, with other sizes, flags and positions."""
    kind, fields = CASES[draw(st.sampled_from(sorted(CASES)))]
    size = st.integers(3, 5000)
    changes: dict[str, Any] = {"rope_parameters": draw(ropes(kind)), "vocab_size": draw(size)}
    changes |= {k: draw(size) for k in fields if k.endswith(("intermediate_size", "_lora_rank")) and fields[k]}
    changes["num_hidden_layers"] = draw(st.integers(1, 70))
    changes["rms_norm_eps"] = draw(st.sampled_from([1e-5, 1e-6, 3e-6]))
    changes["max_position_embeddings"] = draw(size)
    if kind in ("qwen2_moe", "qwen3_moe", "glm4_moe", "olmoe", "deepseek_v3"):
        changes["norm_topk_prob"] = draw(st.booleans())
    for flag in {"qwen2_moe": ("qkv_bias",), "glm4_moe": ("attention_bias", "use_qk_norm")}.get(kind, ()):
        changes[flag] = draw(st.booleans())
    if kind == "mixtral":
        changes["head_dim"] = draw(st.sampled_from([8, 12]))  # without one, transformers itself fails on YaRN
    if "routed_scaling_factor" in fields:
        changes["routed_scaling_factor"] = draw(st.sampled_from([1.0, 2.5, 2.827, 16.0]))
    return configured(kind, fields | changes)


@given(config=configs())
@example(config=configured(*CASES["glm4moe, tied, no biases"]))
@example(config=configured("gpt_oss", {}))
@example(config=configured("deepseek_v3", {}))
@example(config=configured("qwen2_moe", {}))
def test_metadata_is_the_inverse_of_fields(config: PretrainedConfig) -> None:
    metadata = metadata_fields(config.to_dict())
    shown = {"output.weight"}
    if getattr(config, "qkv_bias", False) or getattr(config, "attention_bias", False):
        shown.add("blk.0.attn_q.bias")
    if getattr(config, "use_qk_norm", False):
        shown.add("blk.0.attn_q_norm.weight")
    again = AutoConfig.for_model(**config_fields(metadata, "x.gguf", shown))
    assert type(again) is type(config)
    assert relevant(again) == relevant(config)
    for got, want in zip(rotation(again), rotation(config), strict=True):
        assert torch.allclose(torch.as_tensor(got), torch.as_tensor(want), rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_all_keys_are_the_gguf_packages(case: str) -> None:
    keys = {v for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope) for v in vars(group).values()}
    metadata = metadata_of(case)
    architecture = metadata["general.architecture"]
    for key in metadata:
        if key.startswith(f"{architecture}."):
            assert key.replace(f"{architecture}.", "{arch}.", 1) in keys, key


# ---- older and damaged files


def changed(case: str, **changes: Value | None) -> dict[str, object]:
    metadata = metadata_of(case)
    architecture = metadata["general.architecture"]
    new = {f"{architecture}.{k.replace('__', '.')}": v for k, v in changes.items()}
    return config_fields({k: v for k, v in (metadata | new).items() if v is not None}, "x.gguf")


def test_what_older_files_leave_out_is_what_llama_cpp_takes() -> None:
    fields = changed("qwen2moe", expert_feed_forward_length=None, expert_shared_feed_forward_length=None,
                     feed_forward_length=60, expert_weights_norm=None, rope__freq_base=None)  # fmt: skip
    assert (fields["moe_intermediate_size"], fields["shared_expert_intermediate_size"]) == (20, 60)
    assert fields["norm_topk_prob"] is False
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    fields = changed("qwen3moe", expert_weights_norm=None, attention__key_length=None, attention__value_length=None,
                     rope__dimension_count=None, attention__head_count_kv=None)  # fmt: skip
    assert (fields["norm_topk_prob"], fields["head_dim"], fields["num_key_value_heads"]) == (True, 8, 4)
    fields = changed("glm4moe", expert_group_count=None, expert_gating_func=None, expert_weights_scale=None,
                     leading_dense_block_count=None)  # fmt: skip
    assert (fields["n_group"], fields["routed_scaling_factor"], fields["first_k_dense_replace"]) == (1, 1.0, 0)
    fields = changed("gpt-oss", expert_feed_forward_length=None, rope__scaling__yarn_beta_fast=None)
    rope = fields["rope_parameters"]
    assert fields["intermediate_size"] == 18 and isinstance(rope, dict)
    assert (rope["beta_fast"], rope["truncate"]) == (32.0, False)
    assert changed("qwen3moe", rope__scale_linear=4.0)["rope_parameters"] == {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0,
    }  # fmt: skip


def test_without_a_size_the_vocabulary_is_the_tokens() -> None:
    metadata = {k: v for k, v in metadata_of("olmoe").items() if k != "olmoe.vocab_size"}
    assert config_fields(metadata | {"tokenizer.ggml.tokens": ["a"] * 77}, "x.gguf")["vocab_size"] == 77
    with pytest.raises(ModelFileError, match=r"x.gguf: olmoe.vocab_size is missing; an integer is needed"):
        config_fields(metadata, "x.gguf")


def test_without_names_the_published_models_are_taken() -> None:
    assert changed("qwen2moe")["qkv_bias"] is True and changed("qwen2moe")["tie_word_embeddings"] is False
    glm = changed("glm4moe")
    assert (glm["attention_bias"], glm["use_qk_norm"]) == (True, False)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen3moe", {"block_count": "x"}, "qwen3moe.block_count is 'x'; an integer is needed"),
        ("qwen3moe", {"expert_count": None}, "qwen3moe.expert_count is missing; an integer is needed"),
        ("qwen3moe", {"expert_weights_norm": 1}, "qwen3moe.expert_weights_norm is 1; true or false is needed"),
        ("qwen3moe", {"rope__freq_base": "x"}, "qwen3moe.rope.freq_base is 'x'; a number is needed"),
        ("qwen3moe", {"attention__head_count": 0}, "qwen3moe.attention.head_count is 0; 1 or more is needed"),
        ("qwen3moe", {"attention__value_length": 9}, "value_length is 9; attention.key_length is 12"),
        ("qwen3moe", {"rope__dimension_count": 4}, "rope.dimension_count is 4; all 12 of a head"),
        ("qwen3moe", {"expert_gating_func": 2}, "expert_gating_func is 2; 1 is needed for qwen3_moe"),
        ("qwen3moe", {"rope__scaling__type": "longrope"}, "rope.scaling.type is 'longrope'; none, linear and yarn"),
        ("qwen3moe, yarn, tied", {"rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5; only 1 is known"),
        ("glm4moe", {"rope__dimension_count": 13}, "rope.dimension_count is 13; 1 to 12 of a head"),
        ("mixtral", {"expert_count": None}, "llama.expert_count is missing; of llama only models with experts"),
        ("olmoe", {"attention__key_length": 12, "attention__value_length": 12}, "embedding_length / head_count = 8"),
        ("gpt-oss", {"attention__sliding_window": None}, "gpt-oss.attention.sliding_window is missing"),
    ],
)
def test_damaged_metadata_is_refused_by_key(case: str, changes: dict[str, Value | None], message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        changed(case, **changes)
    assert message in str(caught.value) and str(caught.value).startswith("x.gguf: ")


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"general.architecture": "mamba"}, {"x": np.ones(32, np.float32)})
    message = "'mamba'; known are deepseek2, glm4moe, gpt-oss, llama, olmoe, qwen2moe, qwen3moe"
    for call in (lambda: GGUFSource(path), lambda: config_fields({"general.architecture": "mamba"}, str(path))):
        with pytest.raises(ModelFileError) as caught:
            call()
        assert str(path) in str(caught.value) and message in str(caught.value)


def test_counts_of_another_type_are_refused_when_opened(tmp_path: Path) -> None:
    for key, value in (("attention.head_count", "x"), ("expert_count", 1 << 20), ("block_count", [1, 2])):
        path = write(tmp_path / "m.gguf", metadata_of("mixtral") | {f"llama.{key}": value}, arrays("mixtral"))
        with pytest.raises(ModelFileError, match=rf"m.gguf: llama\.{key} is "):
            GGUFSource(path)


def test_counting_experts_that_are_not_there_costs_nothing(tmp_path: Path) -> None:
    layers = {f"blk.{i}.ffn_gate.0.weight": np.zeros((1, 32), np.float32) for i in range(5000)}
    metadata: dict[str, Value] = {"general.architecture": "llama", "llama.expert_count": 65536}
    start = time.process_time()
    source = GGUFSource(write(tmp_path / "m.gguf", metadata, layers))
    assert time.process_time() - start < 5
    assert list(source.keys()) == [] and len(source.unused()) == 5000


@pytest.mark.parametrize(
    ("case", "tensor", "key"),
    [
        ("deepseek v3", "attn_v_b.weight", "self_attn.kv_b_proj.weight"),
        ("qwen2moe", "ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight"),
        ("mixtral", "attn_q.weight", "self_attn.q_proj.weight"),
        ("gpt-oss", "ffn_up_exps.bias", "mlp.experts.gate_up_proj_bias"),
        ("glm4moe", "ffn_up_exps.weight", "mlp.experts.gate_up_proj"),
    ],
)
def test_a_missing_tensor_and_one_of_another_shape_are_named(case: str, tensor: str, key: str, tmp_path: Path) -> None:
    tensor, key = f"blk.1.{tensor}", f"model.layers.1.{key}"
    others = {k: v for k, v in arrays(case).items() if k != tensor}
    source = GGUFSource(write(tmp_path / "m.gguf", metadata_of(case), others))
    assert key not in source.keys()
    with pytest.raises(ModelFileError) as caught:
        source.parts(key)
    assert str(tmp_path / "m.gguf") in str(caught.value) and key in str(caught.value) and tensor in str(caught.value)
    wrong = np.zeros((3, 5), np.float32)
    source = GGUFSource(write(tmp_path / "n.gguf", metadata_of(case), others | {tensor: wrong}))
    with pytest.raises(ModelFileError) as caught:
        values(source, key)
    assert str(tmp_path / "n.gguf") in str(caught.value) and key in str(caught.value) and tensor in str(caught.value)


def test_quantised_rows_are_permuted_and_interleaved_too(tmp_path: Path) -> None:
    q8 = gguf.GGMLQuantizationType.Q8_0
    rng = np.random.default_rng(0)
    for architecture, key, names in (
        ("llama", "self_attn.q_proj.weight", ("attn_q",)),
        ("gpt-oss", "mlp.experts.gate_up_proj", ("ffn_gate_exps", "ffn_up_exps")),
    ):
        shape = (24, 64) if architecture == "llama" else (3, 5, 64)
        writer = gguf.GGUFWriter(tmp_path / f"{architecture}.gguf", architecture)
        writer.add_head_count(4)
        plain = {n: rng.normal(size=shape).astype(np.float32) for n in names}
        for name, array in plain.items():
            writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(array, q8), raw_dtype=q8)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        source = GGUFSource(tmp_path / f"{architecture}.gguf")
        got = values(source, f"model.layers.0.{key}").numpy()
        decoded = [gguf.quants.dequantize(gguf.quants.quantize(a, q8), q8) for a in plain.values()]
        if architecture == "llama":
            want = decoded[0].reshape(4, 3, 2, 64).swapaxes(1, 2).reshape(shape)
        else:
            want = np.stack([d.transpose(0, 2, 1) for d in decoded], -1).reshape(3, 64, 10)
        assert np.array_equal(got, want)
        assert source.spec(f"model.layers.0.{key}").nbytes == len(names) * math.prod(shape) // 32 * 34


# ---- compiled


COMPILED = ("deepseek v2 lite", "deepseek v3", "qwen2moe", "qwen3moe", "glm4moe", "mixtral", "gpt-oss", "olmoe")


@pytest.mark.parametrize("case", COMPILED)
def test_the_compiled_model_has_the_same_logits(case: str, tmp_path: Path) -> None:
    """From the file through the passes and the kernels of this machine's CPU."""
    path = write(tmp_path / "model.gguf", metadata_of(case), arrays(case))
    same_logits(model(case), ktcompile.load(path, target=Target((detect().host,)), context=64))
