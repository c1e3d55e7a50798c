"""Opening models of every kind, and the numbers that come out of Hugging Face's model with our weights in it."""
# ruff: noqa: SIM118  (a weight source has keys(), but is no mapping to iterate over)

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

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
    both = open_checkpoint(FOLDER, GGUF)
    assert isinstance(both.source, GGUFSource) and both.name == "tiny-deepseek-v3"


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


@pytest.mark.parametrize(
    "quantization",
    [
        "x",
        {"quant_method": "gptq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128, 64]},
    ],
)
def test_quantisations_that_are_not_known(model_folder: Callable[..., Path], quantization: object) -> None:
    path = model_folder(quantization_config=quantization)
    shutil.copy(FOLDER / "model-00001-of-00002.safetensors", path / "model.safetensors")
    with pytest.raises(ModelFileError, match="quantization_config: "):
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
