"""Open a model: configuration, tokenizer, generation defaults and weights, from a GGUF file or a folder.

The only file here that imports transformers. Nothing that a model brings along is ever run.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from ktcompile.errors import ModelFileError
from ktcompile.gguf_config import Fields, config_fields, generation_fields
from ktcompile.graph import matches
from ktcompile.tokenizer import special_tokens, tokenizer_from_gguf
from ktcompile.weights import GGUFSource, MixedSource, SafetensorsSource, WeightSource
from ktcompile.weights.json import load_json
from ktcompile.weights.names import expected_unused
from ktcompile.weights.quantization import scale_block
from ktcompile.weights.quoted import listed, plain, quoted

EMBEDDED = "tiny-deepseek-v3-Q4_K_M.gguf"

MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20  # the largest known has 33 MB

_LIMITS = {  # field -> (least, most); far above any model, low enough that nothing is allocated for nonsense
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "num_hidden_layers": (1, 4096),
    "intermediate_size": (1, 1 << 24),
    "moe_intermediate_size": (1, 1 << 24),
    "num_attention_heads": (1, 1 << 16),
    "num_key_value_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    "kv_lora_rank": (1, 1 << 20),
    "q_lora_rank": (1, 1 << 20),
    "qk_nope_head_dim": (1, 1 << 16),
    "qk_rope_head_dim": (1, 1 << 16),
    "v_head_dim": (1, 1 << 16),
    "max_position_embeddings": (1, 1 << 30),
    "n_routed_experts": (1, 1 << 16),
    "num_experts": (1, 1 << 16),
    "num_local_experts": (1, 1 << 16),
    "n_shared_experts": (0, 1 << 10),
    "num_experts_per_tok": (1, 1 << 16),
    "n_group": (1, 1 << 16),
    "topk_group": (1, 1 << 16),
    "first_k_dense_replace": (0, 4096),
}
_SAME_AS = {"kimi_k2": "deepseek_v3"}  # model_type of a repository that brings its own code -> the class it is
_NOT_DATA = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config")


ROUTED_EXPERTS = ("*.mlp.experts.*",)
"""What a GGUF file beside a folder gives, whatever the folder has."""


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be built: `source` is None if only a configuration was given."""

    name: str
    path: str
    config: PretrainedConfig
    source: WeightSource | None
    generation: GenerationConfig
    load_tokenizer: Callable[[], PreTrainedTokenizerFast] = field(repr=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer with its chat template, built at first use; ModelFileError if there is none."""
        return self.load_tokenizer()


def open_checkpoint(
    model: str | Path | None = None,
    gguf: str | Path | None = None,
    from_gguf: Sequence[str] = ROUTED_EXPERTS,
) -> Checkpoint:
    """Open a model; reads headers and small JSON files, no weights.

    `model` is a .gguf file, which has everything in it, or a folder with config.json, tokenizer.json and safetensors
    (the last may be absent). Neither: the embedded tiny DeepSeek-V3.
    `gguf` beside a folder gives the parameters whose names match a glob of `from_gguf`, by default the routed experts,
    and all that the folder's safetensors lack; `("*",)` takes all from it.
    Raises ModelFileError if a file is missing, damaged, not known or does not fit the others.
    """
    if model is None:
        return _open_gguf(Path(gguf) if gguf is not None else Path(str(files("ktcompile.assets") / EMBEDDED)))
    path = Path(model)
    if path.is_dir():
        return _open_folder(path, None if gguf is None else Path(gguf), from_gguf)
    if gguf is not None:
        raise ModelFileError(f"{path}: beside gguf={str(gguf)!r} the model must be a folder with config.json")
    return _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    source = _gguf_source(path)
    where = str(path)
    name = source.metadata.get("general.name")
    return Checkpoint(
        name=name if isinstance(name, str) and name else path.stem,
        path=where,
        config=_config(config_fields(source.metadata, where, source.stored()), where),
        source=source,
        generation=_generation(generation_fields(source.metadata, where), where),
        load_tokenizer=partial(_gguf_tokenizer, source, where),
    )


def _open_folder(path: Path, gguf: Path | None, from_gguf: Sequence[str]) -> Checkpoint:
    config_path = path / "config.json"
    if not config_path.is_file():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"give the file itself: {path}/{plain(inside[0])}" if inside else "a model folder has one"
        raise ModelFileError(f"{path}: no config.json in this folder; {hint}")
    fields = load_json(config_path, MAX_CONFIG_BYTES)
    config = _config(fields, str(config_path))
    sources: list[WeightSource] = []
    if any(path.glob("*.safetensors*")):
        block = scale_block(fields.get("quantization_config"), str(config_path))
        sources.append(SafetensorsSource(path, block=block, layers=config.num_hidden_layers))
    if gguf is not None:
        sources.append(_matching_gguf(gguf, config, config_path))
    defaults = path / "generation_config.json"
    chosen = load_json(defaults, MAX_CONFIG_BYTES) if defaults.is_file() else _ids(config)
    return Checkpoint(
        name=path.resolve().name,
        path=str(path),
        config=config,
        source=_mixed(sources, from_gguf) if len(sources) > 1 else next(iter(sources), None),
        generation=_generation(chosen, str(defaults)),
        load_tokenizer=partial(_folder_tokenizer, path),
    )


def _mixed(sources: Sequence[WeightSource], from_second: Sequence[str]) -> MixedSource:
    """Two sources as one; the second gives what matches one of the globs."""
    return MixedSource(*sources, prefer=lambda key: int(any(matches(key, pattern) for pattern in from_second)))


def _gguf_source(path: Path) -> GGUFSource:
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder; give a .gguf file or a folder with config.json")
    if path.is_dir():
        raise ModelFileError(f"{path}: is a folder; a .gguf file is needed here")
    if path.suffix != ".gguf":
        raise ModelFileError(f"{path}: neither a .gguf file nor a folder (with config.json and *.safetensors)")
    source = GGUFSource(path)
    unread = source.unused()
    expected = expected_unused(source.architecture, source.metadata, unread)
    if strange := sorted(set(unread) - set(expected)):
        raise ModelFileError(
            f"{path}: {listed(strange)}: tensors that a {source.architecture} model here has no use for; "
            "without them it would not be the same model"
        )
    return source


def _matching_gguf(path: Path, config: PretrainedConfig, config_path: Path) -> GGUFSource:
    """The GGUF file, checked to be of the same sizes as the folder's configuration."""
    source = _gguf_source(path)
    stored = config_fields(source.metadata, str(path), source.stored())
    for name in ("model_type", *_LIMITS):
        ours, theirs = getattr(config, name, None), stored.get(name)
        if name != "max_position_embeddings" and ours is not None and theirs is not None and ours != theirs:
            raise ModelFileError(f"{path}: {name} is {theirs}, {config_path} says {ours}: not the same model")
    return source


def _config(fields: Mapping[str, object], where: str) -> PretrainedConfig:
    """The config class of `model_type`, without anything that would load code or quantise, checked for sense."""
    model_type = fields.get("model_type")
    kept = {k: v for k, v in fields.items() if k not in _NOT_DATA and k != "model_type" and not k.startswith("_")}
    if not isinstance(model_type, str) or not model_type.isprintable():
        raise ModelFileError(
            f"{where}: model_type is {repr(model_type)[:80]}; config.json must name one that transformers knows"
        )
    _check_text(kept, f"{where}: ")
    _check(fields, where)
    try:
        config: PretrainedConfig = AutoConfig.for_model(_SAME_AS.get(model_type, model_type), **kept)
    except Exception as error:  # config classes raise whatever they like about a field; all of it is about this file
        raise ModelFileError(f"{where}: no valid {model_type!r} configuration: {str(error)[:400]}") from error
    _check(config.to_dict(), where)  # again, with the defaults of the class
    return config


def _check_text(value: object, where: str) -> None:
    """Refuse text that moves a terminal's cursor: transformers repeats it in warnings."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_text(name, where)
            _check_text(inner, f"{where}{name}.")
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner, where)
    elif isinstance(value, str) and not re.sub(r"[\n\t]", "", value).isprintable():
        raise ModelFileError(f"{where.rstrip('.: ')}: {quoted(value)} holds what cannot be printed")


def _check(fields: Mapping[str, object], where: str) -> None:
    """Refuse sizes that no model has and numbers that contradict each other."""
    for name, (least, most) in _LIMITS.items():
        value = fields.get(name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise ModelFileError(f"{where}: {name} is {str(value)[:80]}; an integer from {least} to {most} is allowed")
    experts = next((fields[k] for k in ("n_routed_experts", "num_experts", "num_local_experts") if fields.get(k)), None)
    _at_most(fields, where, "num_experts_per_tok", experts)
    _at_most(fields, where, "topk_group", fields.get("n_group"))
    groups = fields.get("n_group")
    if isinstance(groups, int) and isinstance(experts, int) and experts % groups:
        raise ModelFileError(f"{where}: n_group is {groups}; {experts} experts do not split into equal groups")
    for name in ("rope_parameters", "rope_scaling"):
        inner = fields.get(name)
        _check_numbers(inner if isinstance(inner, Mapping) else {}, where, f"{name}.")
    numbers = ("rope_theta", "rms_norm_eps", "routed_scaling_factor")
    _check_numbers({k: fields[k] for k in numbers if k in fields}, where, "")


def _at_most(fields: Mapping[str, object], where: str, name: str, most: object) -> None:
    value = fields.get(name)
    if isinstance(value, int) and isinstance(most, int) and value > most:
        raise ModelFileError(f"{where}: {name} is {value}, more than the {most} there are")


def _check_numbers(fields: Mapping[str, object], where: str, prefix: str) -> None:
    for name, value in fields.items():
        if isinstance(value, float) and (not math.isfinite(value) or value < 0):
            raise ModelFileError(f"{where}: {prefix}{name} is {value}; a finite number from 0 up is needed")


def _ids(config: PretrainedConfig) -> Fields:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(config, name, None) for name in names}


def _generation(fields: Mapping[str, object], where: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_dict(dict(fields))
    except Exception as error:  # as for the config classes
        raise ModelFileError(f"{where}: no valid generation defaults: {str(error)[:400]}") from error


def _gguf_tokenizer(source: GGUFSource, where: str) -> PreTrainedTokenizerFast:
    template = source.metadata.get("tokenizer.chat_template")
    context = source.metadata.get(f"{source.architecture}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_from_gguf(source.metadata, where),
        chat_template=template if isinstance(template, str) else None,
        model_max_length=context if isinstance(context, int) else None,
        clean_up_tokenization_spaces=False,
        **special_tokens(source.metadata, where),
    )


_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""What transformers reads beside tokenizer.json."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _folder_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer.json as it is: the class that tokenizer_config.json names may rebuild it differently."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelFileError(f"{path}: no tokenizer.json in this folder; it is in the original model's repository")
    for other in ("tokenizer.json", *_TOKENIZER_FILES):
        size, most = _size(path / other), MAX_TOKENIZER_BYTES if other == "tokenizer.json" else MAX_CONFIG_BYTES
        if size > most:
            raise ModelFileError(f"{path / other}: {size} bytes; {most} are allowed")
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise ModelFileError(f"{file}: cannot be read: {str(error)[:400]}") from error
    return tokenizer
