"""Weight sources: where each parameter of a model is stored, how it is encoded, and its bytes on demand."""

from ktcompile.weights.gguf import GGUFSource
from ktcompile.weights.imagined import ENCODINGS, ImaginedSource
from ktcompile.weights.mixed import MixedSource
from ktcompile.weights.module import ModuleSource
from ktcompile.weights.parallel import each
from ktcompile.weights.safetensors import SafetensorsSource
from ktcompile.weights.source import (
    Part,
    TensorSpec,
    WeightSource,
    decode,
    encoding,
    fp8_block,
    pieces,
    size_of,
    stored_bytes,
    values,
)

__all__ = [
    "ENCODINGS",
    "GGUFSource",
    "ImaginedSource",
    "MixedSource",
    "ModuleSource",
    "Part",
    "SafetensorsSource",
    "TensorSpec",
    "WeightSource",
    "decode",
    "each",
    "encoding",
    "fp8_block",
    "pieces",
    "size_of",
    "stored_bytes",
    "values",
]
