"""Which block type each tensor of a model gets, by what it is: for files to be written and for plans.

The rules are llama.cpp's (llama-quant.cpp), but that the embedding gets at least q6_k, as the head does there.
"""

from typing import Literal

from ktcompile.weights.source import block_values

Role = Literal["head", "embedding", "down", "value", "key", "attention_output", "other"]

_NARROW = {  # for rows that do not divide into blocks of 256, 128, 64
    "q4_k": "q5_0",
    "q5_k": "q8_0",
    "q6_k": "q8_0",
    "int4_128": "int4_64",
    "int4_64": "q4_0",
}


def is_exact(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter, by its Hugging Face name, is never rounded: vectors, norms, biases, routers."""
    words = ("norm", ".gate.weight", ".router.", "shared_expert_gate.")
    return len(shape) < 2 or key.endswith("bias") or any(word in key for word in words)


def block_type(wanted: str, role: Role, cols: int, layer: int = 0, layers: int = 1, experts: int = 0) -> str:
    """The type of a matrix with `cols` columns in a model of `wanted`: a block type, or "q4_k_m", llama.cpp's mixture.

    `layer` is its layer of `layers`, `experts` how many the model has. Rows that do not divide into blocks fall back to
    a type with smaller blocks, or to bf16.
    """
    chosen: str | None = _chosen(wanted, role, layer, layers, experts)
    while chosen is not None:
        if cols % block_values(chosen) == 0:
            return chosen
        chosen = _NARROW.get(chosen)
    return "bf16"


def _chosen(wanted: str, role: Role, layer: int, layers: int, experts: int) -> str:
    """The type before the width of the rows is looked at."""
    if role in ("head", "embedding"):
        return "q8_0" if wanted == "q8_0" else "q6_k"
    if wanted != "q4_k_m":
        return wanted
    if experts == 8 and role in ("value", "key"):  # Mixtral shares them among so many weights that it costs nothing
        return "q8_0"
    if experts == 8 and role == "attention_output":
        return "q5_k"
    return "q6_k" if role in ("down", "value") and _more_bits(layer, layers) else "q4_k"


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
