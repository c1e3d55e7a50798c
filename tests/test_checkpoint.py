"""Opening models of every kind, and the numbers that come out of Hugging Face's model with our weights in it."""
# ruff: noqa: SIM118  (a weight source has keys(), but is no mapping to iterate over)

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ktcompile
from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.errors import ModelFileError
from ktcompile.gguf_config import config_fields, generation_fields
from ktcompile.weights import GGUFSource, SafetensorsSource, values
from ktcompile.weights.gguf_header import Value

DATA = Path(__file__).parent / "data"
FOLDER = DATA / "tiny-deepseek-v3"
GGUF = Path(str(files("ktcompile.assets") / "tiny-deepseek-v3-Q4_K_M.gguf"))
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))

# Fields of config.json that only training, other software or the layer that is not in the GGUF read.
NO_MATTER = {"aux_loss_alpha", "ep_size", "dtype", "seq_aux", "moe_layer_freq", "num_nextn_predict_layers"}


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    return open_checkpoint()


@pytest.fixture(scope="module")
def folder() -> Checkpoint:
    return open_checkpoint(FOLDER)


def loaded(checkpoint: Checkpoint) -> DeepseekV3ForCausalLM:
    """Hugging Face's model in fp32 with every parameter and buffer from the source, none left over."""
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).to(torch.float32).eval()
    assert checkpoint.source is not None
    state = {key: values(checkpoint.source, key) for key in checkpoint.source.keys()}
    model.load_state_dict(state, strict=True)
    return model


@torch.inference_mode()
def forced(model: DeepseekV3ForCausalLM, ids: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [n, vocabulary] at the n steps that choose `tokens` after `ids`."""
    logits = model(torch.tensor([ids + tokens])).logits[0].float()
    return logits[len(ids) - 1 : -1].log_softmax(-1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices on busy cores: a second thread waits far longer than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- configurations


def test_every_parameter_of_the_model_is_there(embedded: Checkpoint, folder: Checkpoint) -> None:
    for checkpoint in (embedded, folder):
        with torch.device("meta"):
            want = {k: tuple(v.shape) for k, v in DeepseekV3ForCausalLM(checkpoint.config).state_dict().items()}
        assert checkpoint.source is not None
        assert {k: checkpoint.source.spec(k).shape for k in checkpoint.source.keys()} == want
    assert isinstance(embedded.source, GGUFSource) and embedded.source.unused() == ()
    assert isinstance(folder.source, SafetensorsSource)
    assert all(name.startswith("model.layers.6.") for name in folder.source.unused())


def test_config_from_the_gguf_is_that_of_the_folder(embedded: Checkpoint, folder: Checkpoint) -> None:
    ours, theirs = embedded.config.to_dict(), folder.config.to_dict()
    different = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    assert different <= NO_MATTER
    assert isinstance(embedded.config, DeepseekV3Config) and not hasattr(folder.config, "quantization_config")
    assert embedded.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_generation_defaults_are_those_of_the_folder(embedded: Checkpoint, folder: Checkpoint) -> None:
    assert embedded.generation.to_dict() == folder.generation.to_dict()
    assert embedded.generation.temperature == 0.6 and embedded.generation.do_sample


def test_names_and_paths(embedded: Checkpoint, folder: Checkpoint) -> None:
    assert (embedded.name, embedded.path) == ("Tiny DeepSeek-V3", str(GGUF))
    assert (folder.name, folder.path) == ("tiny-deepseek-v3", str(FOLDER))


def test_the_ways_to_open_the_same_model() -> None:
    for checkpoint in (open_checkpoint(str(GGUF)), open_checkpoint(gguf=GGUF)):
        assert isinstance(checkpoint.source, GGUFSource) and checkpoint.path == str(GGUF)


def test_tokenizers_agree_through_transformers(embedded: Checkpoint, folder: Checkpoint) -> None:
    ours, theirs = embedded.tokenizer, folder.tokenizer
    assert embedded.tokenizer is ours  # built once
    for prompt in EXPECTED["prompts"].values():
        assert ours(prompt["prompt"], add_special_tokens=False).input_ids == prompt["ids"]
        if "messages" not in prompt:
            continue
        for tokenizer in (ours, theirs):
            text = tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True, tokenize=False)
            assert text == prompt["prompt"]
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    for options in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
        assert ours(text, verbose=False, **options).input_ids == theirs(text, verbose=False, **options).input_ids
    marked = "<think>a</think><｜User｜>"
    assert ours(marked, split_special_tokens=True).input_ids == theirs(marked, split_special_tokens=True).input_ids
    ids = ours(text, add_special_tokens=False, verbose=False).input_ids
    assert ours.decode(ids) == theirs.decode(ids) == text
    assert (ours.model_max_length, ours.eos_token_id, ours.pad_token_id) == (1024, 1, 2)


# ---- what comes out


def test_fp8_gives_the_expected_tokens(folder: Checkpoint, one_thread: None) -> None:
    model = loaded(folder)
    want = EXPECTED["tiny-deepseek-v3 (FP8, dequantised to fp32, top-8), transformers"]["greedy"]
    name = next(iter(EXPECTED["prompts"]))
    ids = list(EXPECTED["prompts"][name]["ids"])
    tokens: list[int] = []
    with torch.inference_mode():
        for _ in range(16):
            tokens.append(int(model(torch.tensor([ids + tokens])).logits[0, -1].argmax()))
    assert tokens == want[name]["tokens"][:16]
    for prompt, result in want.items():
        steps = forced(model, EXPECTED["prompts"][prompt]["ids"], result["tokens"])
        got = steps[torch.arange(len(steps)), torch.tensor(result["tokens"])]
        assert (got - torch.tensor(result["logprobs"])).abs().max() < 1e-3, prompt


def test_gguf_gives_the_expected_log_probabilities(embedded: Checkpoint, one_thread: None) -> None:
    model = loaded(embedded)
    for prompt, result in EXPECTED["tiny-deepseek-v3-Q4_K_M.gguf, llama.cpp"]["greedy"].items():
        steps = forced(model, EXPECTED["prompts"][prompt]["ids"], result["tokens"])
        got = steps[torch.arange(len(steps)), torch.tensor(result["tokens"])]
        assert (got - torch.tensor(result["logprobs"])).abs().mean() < 0.05, prompt


# ---- a GGUF beside a folder


EXPERT_TYPES = {"q4_k", "q5_0", "q8_0"}


def encodings(checkpoint: Checkpoint) -> dict[str, str]:
    assert checkpoint.source is not None
    return {key: checkpoint.source.spec(key).encoding for key in checkpoint.source.keys()}


@pytest.fixture(scope="module")
def mixed() -> Checkpoint:
    return open_checkpoint(FOLDER, GGUF)


def test_routed_experts_come_from_the_gguf(embedded: Checkpoint, folder: Checkpoint, mixed: Checkpoint) -> None:
    assert mixed.name == "tiny-deepseek-v3" and mixed.source is not None
    found, ours, theirs = encodings(mixed), encodings(folder), encodings(embedded)
    assert found.keys() == ours.keys() == theirs.keys()
    for key, encoding in found.items():
        experts = ".mlp.experts." in key
        assert encoding == (theirs if experts else ours)[key]
        assert not experts or encoding in EXPERT_TYPES
        chosen = (embedded if experts else folder).source
        assert chosen is not None and torch.equal(values(mixed.source, key), values(chosen, key)), key
    assert found["model.layers.3.self_attn.o_proj.weight"] == "fp8_block128"
    assert found["model.layers.3.mlp.shared_experts.up_proj.weight"] == "fp8_block128"
    assert found["model.layers.3.mlp.experts.gate_up_proj"] == "q4_k"
    assert found["model.layers.3.mlp.experts.down_proj"] in ("q5_0", "q8_0")


def test_the_mixed_model_answers(mixed: Checkpoint) -> None:
    model = ktcompile.load(mixed)
    ids = mixed.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    out = model.generate(ids, max_new_tokens=20, do_sample=False)
    text = mixed.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_what_the_gguf_gives_can_be_said(embedded: Checkpoint, folder: Checkpoint) -> None:
    ours, theirs = encodings(folder), encodings(embedded)
    assert encodings(open_checkpoint(FOLDER, GGUF, from_gguf=("*",))) == theirs
    assert encodings(open_checkpoint(FOLDER, GGUF, from_gguf=())) == ours
    found = encodings(open_checkpoint(FOLDER, GGUF, from_gguf=("layers.{1,2}.mlp.experts.*", "lm_head.*")))
    for key, encoding in found.items():
        second = key in ("lm_head.weight",) or ".1.mlp.experts." in key or ".2.mlp.experts." in key
        assert encoding == (theirs if second else ours)[key], key


def test_a_folder_without_safetensors_takes_all_from_the_gguf(model_folder: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(model_folder(), GGUF)
    assert isinstance(checkpoint.source, GGUFSource)


def test_a_folder_with_attention_alone_takes_the_rest_from_the_gguf(
    model_folder: Callable[..., Path], embedded: Checkpoint, folder: Checkpoint
) -> None:
    path = model_folder()
    tensors = {}
    for shard in FOLDER.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if ".self_attn." in name}
    save_file(tensors, path / "model.safetensors")
    ours, theirs = encodings(folder), encodings(embedded)
    for key, encoding in encodings(open_checkpoint(path, GGUF)).items():
        assert encoding == (ours if ".self_attn." in key else theirs)[key], key


def test_a_folder_with_another_models_sizes_is_refused(model_folder: Callable[..., Path]) -> None:
    path = model_folder(hidden_size=512)
    shutil.copy(FOLDER / "model-00001-of-00002.safetensors", path / "model.safetensors")
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path, GGUF)
    assert str(GGUF) in str(caught.value) and str(path / "config.json") in str(caught.value)
    assert "hidden_size is 256" in str(caught.value) and "says 512" in str(caught.value)


# ---- folders as repositories have them


def test_kimi_k2_is_deepseek_v3_with_packed_experts(model_folder: Callable[..., Path]) -> None:
    """Kimi-K2-Thinking: its own model_type and code, experts of compressed-tensors, attention in bf16."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    path = model_folder(
        model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        quantization_config={**quantization, "ignore": ["lm_head", "re:.*self_attn.*"]},
    )  # fmt: skip
    tensors = {"model.layers.1.self_attn.o_proj.weight": torch.ones(256, 256).bfloat16()}
    for expert in range(2):
        for name in ("gate_proj", "up_proj"):
            at = f"model.layers.1.mlp.experts.{expert}.{name}.weight_"
            tensors[at + "packed"] = torch.full((128, 32), 0x7A7A7A7A, dtype=torch.int32)  # 2, -1, 2, -1, …
            tensors[at + "scale"] = torch.full((128, 8), 0.5 + expert).bfloat16()
            tensors[at + "shape"] = torch.tensor([128, 256])
    save_file(tensors, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint.config, DeepseekV3Config) and isinstance(checkpoint.source, SafetensorsSource)
    key = "model.layers.1.mlp.experts.gate_up_proj"
    assert set(checkpoint.source.keys()) == {key, "model.layers.1.self_attn.o_proj.weight"}
    assert checkpoint.source.spec(key).encoding == "int4_group32"
    want = torch.tensor([2.0, -1.0]).repeat(128) * torch.tensor([0.5, 1.5])[:, None, None]
    assert torch.equal(values(checkpoint.source, key), want.expand(2, 256, 256))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_folder_gives_the_models_own_logits(tmp_path: Path, family: str) -> None:
    """Names and layouts that repositories have, into the classes that the configuration names."""
    model = tiny.model(family)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.source is not None
    again = AutoModelForCausalLM.from_config(checkpoint.config)
    again.load_state_dict({key: values(checkpoint.source, key) for key in checkpoint.source.keys()}, strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(tiny.ids(1, 9)).logits, model(tiny.ids(1, 9)).logits)


def test_a_model_with_packed_experts_runs(tmp_path: Path) -> None:
    """int4 experts and FP8 attention with a scale a row, from the folder to the logits of the same values in eager."""
    tiny.model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [k for k in tensors if ".experts." in k or ".self_attn." in k]:
        rows, cols = tensors[key].shape
        if ".experts." in key:
            del tensors[key]
            tensors[f"{key}_packed"] = torch.randint(-(1 << 31), 1 << 31, (rows, cols // 8)).int()
            tensors[f"{key}_scale"] = torch.rand(rows, cols // 32).bfloat16() * cols**-0.5 / 4
        else:
            tensors[f"{key}_scale"] = torch.rand(rows, 1) + 0.5
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.source is not None
    assert {"int4_group32", "fp8_row"} <= set(encodings(checkpoint).values())
    model = AutoModelForCausalLM.from_config(checkpoint.config).eval()
    model.load_state_dict({key: values(checkpoint.source, key) for key in checkpoint.source.keys()}, strict=True)
    ids = tiny.ids(1, 9)
    with torch.no_grad():
        want = model(ids).logits
    off = ktcompile.load(checkpoint, dtype="fp32", context=64)(ids).logits - want
    assert off.norm() <= 1e-5 * want.norm()


def test_gpt_oss_with_its_packed_experts(tmp_path: Path) -> None:
    """As OpenAI published it: MXFP4 blocks and scales in place of the experts' matrices, biases in bf16."""
    model = tiny.model("gpt_oss")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    tensors, want = {}, {}
    for key, tensor in model.state_dict().items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            tensors[key] = want[key] = tensor
            continue
        experts, cols, rows = tensor.shape
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(120, 125, (experts, rows, cols // 32), dtype=torch.uint8)
        want[key] = convert_moe_packed_tensors(tensors[f"{key}_blocks"], tensors[f"{key}_scales"], dtype=torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint.source, SafetensorsSource) and checkpoint.source.unused() == ()
    assert set(checkpoint.source.keys()) == set(want)
    for key, tensor in want.items():
        assert checkpoint.source.spec(key).shape == tensor.shape
        assert torch.equal(values(checkpoint.source, key), tensor), key
    assert checkpoint.source.spec("model.layers.0.mlp.experts.gate_up_proj").encoding == "mxfp4"


# ---- configurations from other metadata


@pytest.fixture(scope="module")
def metadata(embedded: Checkpoint) -> dict[str, Value]:
    assert isinstance(embedded.source, GGUFSource)
    return dict(embedded.source.metadata)


def changed(metadata: dict[str, Value], **values: Value | None) -> dict[str, object]:
    new = {f"deepseek2.{k.replace('__', '.')}": v for k, v in values.items()}
    return config_fields({k: v for k, v in (metadata | new).items() if v is not None}, "x.gguf")


def test_yarn_as_deepseek_v3_has_it(metadata: dict[str, Value]) -> None:
    yarn: dict[str, Value] = {
        "rope__scaling__type": "yarn", "rope__scaling__factor": 40.0, "rope__scaling__original_context_length": 4096,
        "rope__scaling__yarn_log_multiplier": 0.1, "context_length": 163840,
    }  # fmt: skip
    rope = changed(metadata, **yarn)["rope_parameters"]
    assert rope == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    rope = changed(metadata, **{**yarn, "rope__scaling__yarn_log_multiplier": 0.0707})["rope_parameters"]
    assert isinstance(rope, dict) and rope["mscale"] == rope["mscale_all_dim"] == 0.707
    rope = changed(metadata, **{**yarn, "rope__scaling__yarn_log_multiplier": None})["rope_parameters"]
    assert isinstance(rope, dict) and rope["attention_factor"] == 1.0 and "mscale" not in rope
    with pytest.raises(ModelFileError, match=r"rope.scaling.type is 'longrope'; none and yarn are known"):
        changed(metadata, rope__scaling__type="longrope")


def test_old_files(metadata: dict[str, Value]) -> None:
    old: dict[str, Value | None] = {"attention__key_length_mla": None, "attention__value_length_mla": None}
    old |= {"attention__key_length": 192, "attention__value_length": 128, "rope__dimension_count": 64}
    old |= {"expert_group_count": None, "expert_group_used_count": None}
    fields = changed(metadata, **old)
    assert (fields["qk_nope_head_dim"], fields["v_head_dim"], fields["n_group"]) == (128, 128, 1)
    fields = changed(metadata, **old, expert_count=256)
    assert (fields["n_group"], fields["topk_group"]) == (8, 4)


def test_softmax_router_is_deepseek_v2(metadata: dict[str, Value]) -> None:
    lite = changed(metadata, expert_gating_func=None, expert_weights_norm=None, attention__q_lora_rank=None,
                   expert_group_count=None, expert_group_used_count=None)  # fmt: skip
    assert (lite["model_type"], lite["topk_method"], lite["q_lora_rank"]) == ("deepseek_v2", "greedy", None)
    with pytest.raises(ModelFileError, match="does not normalise"):
        changed(metadata, expert_gating_func=1)
    with pytest.raises(ModelFileError, match="expert_gating_func is 3"):
        changed(metadata, expert_gating_func=3)


def test_metadata_of_another_type_is_named(metadata: dict[str, Value]) -> None:
    for value in (None, "x", True, 1.5, np.zeros(3)):
        with pytest.raises(ModelFileError, match=r"x.gguf: deepseek2.block_count is .* an integer is needed"):
            changed(metadata, block_count=value)
    with pytest.raises(ModelFileError, match="a number is needed"):
        changed(metadata, attention__layer_norm_rms_epsilon="x")
    with pytest.raises(ModelFileError, match="true or false is needed"):
        changed(metadata, expert_weights_norm=1)


def test_several_ends_and_greedy(metadata: dict[str, Value]) -> None:
    more: dict[str, Value] = {"tokenizer.ggml.eot_token_id": 5, "general.sampling.temp": 0.0}
    fields = generation_fields(metadata | more, "x.gguf")
    assert fields["eos_token_id"] == [1, 5] and "temperature" not in fields and "do_sample" not in fields


# ---- what is refused


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder with the tiny model's config.json, changed; a value of None removes the field."""

    def write(**fields: object) -> Path:
        config = json.loads((FOLDER / "config.json").read_text()) | fields
        kept = {k: v for k, v in config.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        return tmp_path

    return write


def test_a_folder_with_only_a_config(model_folder: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(model_folder())
    assert checkpoint.source is None and checkpoint.generation.eos_token_id == 1
    with pytest.raises(ModelFileError, match=r"no tokenizer.json in this folder"):
        _ = checkpoint.tokenizer


def test_remote_code_is_neither_run_nor_kept(model_folder: Callable[..., Path]) -> None:
    path = model_folder(auto_map={"AutoConfig": "evil.Config"}, _attn_implementation="someone/kernel")
    (path / "evil.py").write_text("raise SystemExit('remote code was run')")
    config = open_checkpoint(path).config
    assert not hasattr(config, "auto_map") and config._attn_implementation in (None, "eager", "sdpa")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": None}, "model_type is None"),
        ({"model_type": "evil"}, "no valid 'evil' configuration"),
        ({"n_routed_experts": 10**9}, "n_routed_experts is 1000000000; an integer from 1 to 65536"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"hidden_size": "256"}, "hidden_size is 256; an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok is 33, more than the 32"),
        ({"topk_group": 5}, "topk_group is 5, more than the 4"),
        ({"n_group": 5, "topk_group": 1}, "32 experts do not split into equal groups"),
        ({"rope_theta": float("nan")}, "holds NaN"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "holds Infinity"),
        ({"rope_scaling": {"type": "yarn", "factor": -1.0}}, "rope_scaling.factor is -1.0"),
        ({"hidden_act": 7}, "no valid 'deepseek_v3' configuration"),
    ],
)
def test_configs_that_make_no_sense(model_folder: Callable[..., Path], fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(model_folder(**fields))
    assert message in str(caught.value) and "config.json" in str(caught.value)


def test_a_quantisation_that_is_not_known(model_folder: Callable[..., Path]) -> None:
    path = model_folder(quantization_config={"quant_method": "gptq", "bits": 4})
    shutil.copy(FOLDER / "model-00001-of-00002.safetensors", path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"config.json: quantization_config: quant_method 'gptq' is not supported"):
        open_checkpoint(path)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    for call, message in (
        (lambda: open_checkpoint(tmp_path / "none"), "no such file or folder; give a .gguf file or a folder"),
        (lambda: open_checkpoint("deepseek-ai/DeepSeek-V3"), "no such file or folder"),
        (lambda: open_checkpoint(FOLDER / "config.json"), "neither a .gguf file nor a folder"),
        (lambda: open_checkpoint(tmp_path), "no config.json in this folder"),
        (lambda: open_checkpoint(GGUF, GGUF), "the model must be a folder with config.json"),
        (lambda: open_checkpoint(FOLDER, tmp_path), "is a folder; a .gguf file is needed here"),
    ):
        with pytest.raises(ModelFileError, match=message):
            call()
    shutil.copy(GGUF, tmp_path / "a.gguf")
    with pytest.raises(ModelFileError, match=r"give the file itself: .*a\.gguf"):
        open_checkpoint(tmp_path)


def test_weights_of_another_model(model_folder: Callable[..., Path]) -> None:
    path = model_folder(hidden_size=512)
    with pytest.raises(ModelFileError, match=r"hidden_size is 256, .*config.json says 512: not the same model"):
        open_checkpoint(path, GGUF)


def test_damaged_tokenizers(model_folder: Callable[..., Path]) -> None:
    path = model_folder()
    (path / "tokenizer.json").write_text('{"version": "1.0", "model": 7}')
    with pytest.raises(ModelFileError, match=r"tokenizer.json: cannot be read"):
        _ = open_checkpoint(path).tokenizer
    with (path / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelFileError, match=r"tokenizer.json: 1073741824 bytes"):
        _ = open_checkpoint(path).tokenizer
