"""Which stored GGUF tensors make up each Hugging Face parameter, by architecture, for reading and for writing.

A new architecture is one more file with one table.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping

from ktcompile.errors import ModelFileError
from ktcompile.weights.names.common import Table
from ktcompile.weights.names.deepseek2 import DEEPSEEK2
from ktcompile.weights.names.export import Export
from ktcompile.weights.names.forms import Form, Piece, Shape, Sizes
from ktcompile.weights.names.glm4moe import GLM4MOE
from ktcompile.weights.names.gpt_oss import GPT_OSS
from ktcompile.weights.names.llama import LLAMA
from ktcompile.weights.names.olmoe import OLMOE
from ktcompile.weights.names.qwen2moe import QWEN2MOE
from ktcompile.weights.names.qwen3moe import QWEN3MOE
from ktcompile.weights.quoted import plain

__all__ = ["ARCHITECTURES", "Export", "Form", "Piece", "Sizes", "absent", "expected_unused", "exports", "find_forms"]

ARCHITECTURES: Mapping[str, Table] = {
    "deepseek2": DEEPSEEK2,
    "glm4moe": GLM4MOE,
    "gpt-oss": GPT_OSS,
    "llama": LLAMA,
    "olmoe": OLMOE,
    "qwen2moe": QWEN2MOE,
    "qwen3moe": QWEN3MOE,
}

_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


def find_forms(architecture: str, stored: Collection[str], sizes: Sizes) -> dict[str, Form]:
    """For every parameter the first form whose tensors are all stored: layer by layer, then the ends."""
    table = ARCHITECTURES[architecture]
    layers = sorted({int(m.group(1)) for name in stored if (m := _BLOCK.match(name))})
    found: dict[str, Form] = {}
    for layer in (*(str(n) for n in layers if sizes.layers is None or n < sizes.layers), ""):
        for key, forms in table.items():
            if ("{L}" in key) != bool(layer):
                continue
            if (form := _fitting(forms, layer, stored, sizes)) is not None:
                found[key.replace("{L}", layer)] = form.at(layer, sizes)
    return found


def _fitting(forms: Iterable[Form], layer: str, stored: Collection[str], sizes: Sizes) -> Form | None:
    """The first form that has tensors, all of them stored."""
    for form in forms:
        names = form.named(layer, sizes)
        if next(names, None) in stored and all(name in stored for name in names):
            return form
    return None


def absent(architecture: str, key: str, stored: Collection[str], sizes: Sizes) -> tuple[str, ...]:
    """Tensors that a parameter of this architecture needs and the file does not have; () for another parameter."""
    template, layer = _template(key)
    forms = ARCHITECTURES[architecture].get(template, ())
    return tuple(name for form in forms[:1] for name in form.at(layer, sizes).names if name not in stored)


def expected_unused(architecture: str, metadata: Mapping[str, object], names: Iterable[str]) -> tuple[str, ...]:
    """Those of the unread tensors that may stay so: the layers for multi-token prediction, after all others.

    `<architecture>.nextn_predict_layers` counts them; `block_count` includes them.
    """
    sizes = Sizes.stored(architecture, metadata, "metadata")
    if sizes.layers is None or not sizes.nextn:
        return ()
    return tuple(name for name in names if (m := _BLOCK.match(name)) and int(m.group(1)) >= sizes.layers)


def exports(
    architecture: str, shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, object]
) -> tuple[Export, ...]:
    """The tensors of a GGUF file with these parameters, in llama.cpp's order: the ends, layer by layer, by name.

    `fields` are those of the Hugging Face config. With tie_word_embeddings there is no output.weight: llama.cpp takes
    the embedding. Raises ModelFileError for an unknown architecture and for a parameter that has no place or that does
    not fit `fields`.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelFileError(f"architecture {architecture!r} cannot be written; known are {known}")
    table = ARCHITECTURES[architecture]
    sizes = Sizes.of_config(fields)
    out: list[tuple[int, str, Export]] = []
    for key, shape in shapes.items():
        template, layer = _template(key)
        if template not in table:
            raise ModelFileError(f"{plain(key)}: architecture {architecture} has no tensor for this parameter")
        if key == "lm_head.weight" and fields.get("tie_word_embeddings"):
            continue
        made = _exports(key, shape, table[template][0].at(layer, sizes), sizes)
        out += [(int(layer) if layer else -1, export.name, export) for export in made]
    return tuple(export for *_, export in sorted(out, key=lambda entry: entry[:2]))


def _exports(key: str, shape: Shape, form: Form, sizes: Sizes) -> list[Export]:
    try:
        stored = form.shapes(shape, sizes)
        pieces = form.pieces(stored, sizes)
    except ValueError as error:
        raise ModelFileError(f"{plain(key)}: {error}") from error
    made = []
    for name, size in zip(form.names, stored, strict=True):
        own = tuple(p for p in pieces if p.name == name)
        assert sum(math.prod(p.shape) for p in own) == math.prod(size), f"{key}: {name} is not covered"
        made.append(Export(name, size, key, own))
    return made


def _template(key: str) -> tuple[str, str]:
    """The name of a parameter in the tables, and its layer ("" for none)."""
    match = _LAYER.match(key)
    return (f"model.layers.{{L}}.{key[match.end() :]}", match.group(1)) if match else (key, "")
