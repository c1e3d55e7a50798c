"""What goes with the weights: configuration, tokenizer and generation defaults, for a GGUF file or a folder."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ktcompile.checkpoint import Checkpoint
from ktcompile.convert import to_gguf, to_safetensors
from ktcompile.gguf_config import metadata_fields
from ktcompile.tokenizer import tokenizer_metadata
from ktcompile.weights import GGUFSource
from ktcompile.weights.gguf_header import Value

TOKENIZER_FILES = re.compile(
    r"tokenizer(_config)?\.json|(special_tokens_map|added_tokens|vocab|chat_template)\.json|chat_template\.jinja"
    r"|merges\.txt|tokenizer\.model"
)


def config_fields(checkpoint: Checkpoint) -> dict[str, object]:
    """The model's configuration as config.json has it."""
    fields: dict[str, object] = json.loads(checkpoint.config.to_json_string(use_diff=False))
    return fields


def gguf_metadata(checkpoint: Checkpoint, to: str) -> dict[str, Value]:
    """The header: what the source says in general, the tokenizer, and the configuration by llama.cpp's names."""
    source, folder = checkpoint.source, Path(checkpoint.path)
    config = config_fields(checkpoint)
    fields: dict[str, Value] = {"general.type": "model", "general.name": checkpoint.name}
    has_tokenizer = isinstance(source, GGUFSource) and not folder.is_dir()
    if isinstance(source, GGUFSource):
        kept = ("general.", "tokenizer.") if has_tokenizer else "general."
        fields |= {key: value for key, value in source.metadata.items() if key.startswith(kept)}
    else:
        fields |= _sampling(checkpoint)
    fields |= metadata_fields(config, checkpoint.path)
    if not has_tokenizer:
        rows = config.get("vocab_size")
        near = folder if folder.is_dir() else None
        fields |= tokenizer_metadata(checkpoint.tokenizer, near, rows if isinstance(rows, int) else None)
    fields.pop("general.alignment", None)
    numbers = {"quantization_version": to_gguf.QUANTIZATION_VERSION, "file_type": to_gguf.FILE_TYPES[to]}
    return fields | {f"general.{name}": number for name, number in numbers.items()}


def _sampling(checkpoint: Checkpoint) -> dict[str, Value]:
    """The sampling defaults of the folder, as llama.cpp names them."""
    chosen = json.loads(checkpoint.generation.to_json_string())
    names = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    if not chosen.get("do_sample"):
        return {}
    return {f"general.sampling.{ours}": chosen[name] for name, ours in names.items() if chosen.get(name) is not None}


def folder_config(checkpoint: Checkpoint, to: str, tensors: Sequence[to_safetensors.Planned]) -> dict[str, object]:
    """config.json: the model's, with how its weights are stored now."""
    fields = config_fields(checkpoint) | {"dtype": "bfloat16"}
    fields.pop("quantization_config", None)
    if "num_nextn_predict_layers" in fields:
        fields["num_nextn_predict_layers"] = 0  # their tensors are not written
    if to == "fp8":
        plain = {
            t.key.removesuffix(".weight") for t in tensors if t.encoding != to_safetensors.FP8 and len(t.where) > 1
        }
        fields["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [to_safetensors.FP8_BLOCK] * 2,
            "modules_to_not_convert": sorted(plain),
        }
    return fields


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer's files as they are, or, of a GGUF file, as transformers writes them."""
    there = Path(checkpoint.path)
    files = [file for file in there.iterdir() if TOKENIZER_FILES.fullmatch(file.name)] if there.is_dir() else []
    if not any(file.name == "tokenizer.json" for file in files):
        checkpoint.tokenizer.save_pretrained(str(folder))
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
