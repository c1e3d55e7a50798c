"""Weights that are already in memory: the parameters of a module."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights.quoted import plain
from ktcompile.weights.source import NATURAL, Part, TensorSpec, everywhere, missing


class ModuleSource:
    """Parameters by name, e.g. `model.state_dict()`; one part each, read without a copy."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep references to the tensors; they must be f32, f16 or bf16."""
        self._tensors = dict(tensors)

    def keys(self) -> Iterable[str]:
        """Names of all tensors, in their order."""
        return self._tensors.keys()

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype and bytes of a tensor; ModelFileError if there is none of that name or of that dtype."""
        tensor = self._tensor(key)
        if tensor.dtype not in NATURAL:
            known = ", ".join(NATURAL.values())
            raise ModelFileError(f"{plain(key)}: a parameter in memory of dtype {tensor.dtype}; known are {known}")
        return TensorSpec(tuple(tensor.shape), tensor.dtype, NATURAL[tensor.dtype], tensor.nbytes)

    def parts(self, key: str) -> tuple[Part, ...]:
        """The whole tensor as one part."""
        spec = self.spec(key)
        return (Part(key, spec, everywhere(spec.shape)),)

    def read(self, part: Part) -> Tensor:
        """A view of the tensor, detached."""
        return self._tensor(part.name).detach()[part.index]

    def read_scale(self, part: Part) -> Tensor | None:
        """None: parameters in memory have no scales."""
        return None

    def _tensor(self, key: str) -> Tensor:
        if key not in self._tensors:
            raise missing(key, "the module", self._tensors)
        return self._tensors[key]
