"""Weights that one does not have: shapes from a configuration, an encoding by name. For plans."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError, RulesError
from ktcompile.weights.mixture import Role, block_type, is_exact
from ktcompile.weights.source import NATURAL_DTYPES, Part, TensorSpec, everywhere, missing, size_of

ENCODINGS = ("bf16", "fp8", "q8_0", "q6_k", "q5_k", "q4_k", "q4_k_m")
"""What `--encoding` may be. `q4_k_m` is llama.cpp's mix: half of the down projections and the head in q6_k."""


class ImaginedSource:
    """A WeightSource of parameters by shape; everything but `read` works."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], encoding: str, layers: int) -> None:
        """`layers`: how many the model has. Raises RulesError for an unknown encoding."""
        if encoding not in ENCODINGS:
            raise RulesError(f"no encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
        self._shapes, self._encoding, self._layers = dict(shapes), encoding, layers

    def keys(self) -> Iterable[str]:
        return self._shapes.keys()

    def spec(self, key: str) -> TensorSpec:
        parts = self.parts(key)
        names = dict.fromkeys(p.spec.encoding for p in parts)
        return TensorSpec(self._shapes[key], parts[0].spec.dtype, "+".join(names), sum(p.spec.nbytes for p in parts))

    def parts(self, key: str) -> tuple[Part, ...]:
        if key not in self._shapes:
            raise missing(key, "the configuration", self._shapes)
        shape = self._shapes[key]
        if not key.endswith("experts.gate_up_proj"):
            return (self._part(key, shape, everywhere(shape)),)
        experts, both, hidden = shape  # gate and up are tensors of their own, as in every file
        half = (experts, both // 2, hidden)
        return tuple(
            self._part(f"{key}.{name}", half, (slice(0, experts), slice(at, at + both // 2), slice(0, hidden)))
            for name, at in (("gate", 0), ("up", both // 2))
        )

    def read(self, part: Part) -> Tensor:
        raise ModelFileError(f"{part.name} has no bytes: this model is a configuration only")

    def read_scale(self, part: Part) -> Tensor | None:
        return None

    def _part(self, name: str, shape: tuple[int, ...], where: tuple[slice, ...]) -> Part:
        encoding = self._of(name, shape)
        scale = f"{name}_scale_inv" if encoding.startswith("fp8_block") else None
        spec = TensorSpec(shape, NATURAL_DTYPES.get(encoding, torch.float32), encoding, size_of(shape, encoding))
        return Part(name, spec, where, scale=scale)

    def _of(self, name: str, shape: tuple[int, ...]) -> str:
        """The encoding of one tensor: norms, biases and routers are never quantised."""
        if self._encoding == "bf16":
            return "bf16"
        if is_exact(name, shape):
            return "f32"
        if self._encoding == "fp8":
            return "bf16" if "embed" in name or "lm_head" in name else "fp8_block128"
        return block_type(self._encoding, _role(name), shape[-1], _layer(name), self._layers)


def _role(name: str) -> Role:
    """What a parameter is, by its Hugging Face name."""
    roles: dict[str, Role] = {"lm_head": "head", "embed": "embedding", "down_proj": "down", "v_proj": "value"}
    return next((role for word, role in roles.items() if word in name), "other")


def _layer(name: str) -> int:
    return next((int(p) for p in name.split(".") if p.isdigit()), 0)
