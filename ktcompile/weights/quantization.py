"""What the `quantization_config` of a config.json says that tensors cannot say themselves: the side of FP8 blocks."""

from collections.abc import Callable, Mapping

from ktcompile.errors import ModelFileError
from ktcompile.weights.quoted import plain

_USUAL = 128
_FLOAT8 = ("float-quantized", 8, "float", True)
_COMPRESSED = (  # format, num_bits, type, symmetric, strategy
    ("pack-quantized", 4, "int", True, "group"),
    (*_FLOAT8, "tensor"),
    (*_FLOAT8, "channel"),
    (*_FLOAT8, "block"),
)
_NUMBERS = ("num_bits", "type", "symmetric", "strategy")


def scale_block(quantization: object, where: str) -> int:
    """Side of the FP8 scale blocks, 128 if nothing says another.

    Raises ModelFileError, beginning with `where`, for a quantisation that SafetensorsSource does not know.
    """
    if quantization is None:
        return _USUAL
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if not isinstance(quantization, Mapping) or not isinstance(method, str) or method not in _METHODS:
        raise ModelFileError(
            f"{where}: quantization_config: quant_method {str(method)[:80]!r} is not supported; "
            f"{', '.join(_METHODS)} are"
        )
    return _METHODS[method](quantization, f"{where}: quantization_config: ")


def _fp8(quantization: Mapping[str, object], where: str) -> int:
    return _side(quantization.get("weight_block_size"), f"{where}weight_block_size")


def _compressed_tensors(quantization: Mapping[str, object], where: str) -> int:
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelFileError(f"{where}config_groups is {repr(groups)[:80]}; an object with groups is needed")
    usual = quantization.get("format")
    found = (_group(group, usual, f"{where}config_groups.{plain(name)}") for name, group in groups.items())
    sides = sorted({side for side in found if side is not None})
    if len(sides) > 1:
        raise ModelFileError(f"{where}config_groups have blocks of {sides}; one size is known")
    return sides[0] if sides else _USUAL


def _group(group: object, usual_format: object, where: str) -> int | None:
    """Side of the blocks of one of the config_groups, None if it has none."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise ModelFileError(f"{where}.weights is {repr(weights)[:80]}; an object is needed")
    kind = (group.get("format") or usual_format, *(weights.get(name) for name in _NUMBERS))
    if kind not in _COMPRESSED:
        known = "; ".join(", ".join(map(str, kind)) for kind in _COMPRESSED)
        found = ", ".join(plain(str(value)[:40]) for value in kind)
        raise ModelFileError(f"{where}: format, {', '.join(_NUMBERS)} are {found}; known are {known}")
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise ModelFileError(f"{where}.weights.actorder is {str(weights['actorder'])[:40]!r}; groups must be in order")
    if kind[-1] != "block":
        return None
    return _side(weights.get("block_structure"), f"{where}.weights.block_structure")


def _side(size: object, where: str) -> int:
    """Side of the square block `size`."""
    if size is None:
        return _USUAL
    square = isinstance(size, list) and len(size) == 2 and size[0] == size[1]
    if not isinstance(size, list) or not square or type(size[0]) is not int or not 1 <= size[0] <= 1 << 16:
        raise ModelFileError(f"{where} is {repr(size)[:80]}; a square such as [128, 128] is known")
    return size[0]


_METHODS: Mapping[str, Callable[[Mapping[str, object], str], int]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "mxfp4": lambda quantization, where: _USUAL,
}
