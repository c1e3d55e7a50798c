"""The model configuration as GGUF metadata and as fields of a Hugging Face config.json, in both directions.

One file an architecture; each has one table that is read both ways.
"""

from collections.abc import Callable, Collection, Mapping

from ktcompile.errors import ModelFileError
from ktcompile.gguf_config.access import Config, Fields, Metadata, short
from ktcompile.gguf_config.deepseek2 import V2, V3, deepseek2_fields, deepseek2_metadata
from ktcompile.gguf_config.glm4moe import GLM4MOE
from ktcompile.gguf_config.gpt_oss import GPT_OSS
from ktcompile.gguf_config.llama import MIXTRAL, llama_fields
from ktcompile.gguf_config.olmoe import OLMOE
from ktcompile.gguf_config.qwen2moe import QWEN2MOE
from ktcompile.gguf_config.qwen3moe import QWEN3MOE
from ktcompile.weights.gguf_header import Value

__all__ = ["Fields", "config_fields", "generation_fields", "metadata_fields"]

_READ: Mapping[str, Callable[[Metadata], Fields]] = {
    "deepseek2": deepseek2_fields,
    "glm4moe": GLM4MOE.fields,
    "gpt-oss": GPT_OSS.fields,
    "llama": llama_fields,
    "olmoe": OLMOE.fields,
    "qwen2moe": QWEN2MOE.fields,
    "qwen3moe": QWEN3MOE.fields,
}
_FAMILIES = {f.model_type: f for f in (V2, V3, GLM4MOE, GPT_OSS, MIXTRAL, OLMOE, QWEN2MOE, QWEN3MOE)}


def config_fields(metadata: Mapping[str, Value], where: str, tensors: Collection[str] = ()) -> Fields:
    """Fields of the config class, `model_type` among them, from the metadata of the file `where`.

    `tensors`: names of all tensors of the file. Tied embeddings, attention biases and norms of queries and keys show in
    nothing else; without names the published models' are taken, and embeddings are not tied.
    Raises ModelFileError for an unknown architecture and for keys that are missing or of another type.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _READ:
        known = ", ".join(sorted(_READ))
        raise ModelFileError(f"{where}: general.architecture is {short(architecture)}; known are {known}")
    fields = _READ[architecture](Metadata(metadata, where, f"{architecture}.", tensors))
    return fields | _special_ids(Metadata(metadata, where, "tokenizer.ggml."))


def metadata_fields(config: Mapping[str, object], where: str = "config") -> dict[str, Value]:
    """`general.architecture` and all `<architecture>.*` for a config's `to_dict()`: what config_fields reads back.

    Layers for multi-token prediction are not counted: their tensors are not among a model's parameters.
    Raises ModelFileError for a model type without an architecture, and for a field that GGUF cannot say.
    """
    c = Config(config, where)
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise c.wrong("model_type", f"known are {', '.join(sorted(_FAMILIES))}")
    found = deepseek2_metadata(c) if family.architecture == "deepseek2" else family.metadata(c)
    named: dict[str, Value] = {f"{family.architecture}.{key}": value for key, value in found.items()}
    return {"general.architecture": family.architecture} | named


def generation_fields(metadata: Mapping[str, Value], where: str) -> Fields:
    """Fields of generation_config.json: special token ids, and sampling defaults if the file has any."""
    sampling = Metadata(metadata, where, "general.sampling.")
    ids = Metadata(metadata, where, "tokenizer.ggml.")
    fields = _special_ids(ids)
    ends = [ids.integer(name, None) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    distinct = list(dict.fromkeys(i for i in ends if i is not None))
    if len(distinct) > 1:
        fields["eos_token_id"] = distinct
    for name, field in (("temp", "temperature"), ("top_p", "top_p"), ("min_p", "min_p")):
        if sampling.has(name):
            fields[field] = sampling.number(name)
    if sampling.has("top_k"):
        fields["top_k"] = sampling.integer("top_k")
    temperature = fields.get("temperature")
    if temperature == 0.0:
        del fields["temperature"]  # greedy; transformers refuses a temperature of zero
    elif temperature is not None:
        fields["do_sample"] = True
    return fields


def _special_ids(ids: Metadata) -> Fields:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {field: ids.integer(name, None) for field, name in names.items()}
