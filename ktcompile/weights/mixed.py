"""Several sources as one: the first that has a parameter gives it."""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ktcompile.weights.source import Part, TensorSpec, WeightSource, missing


class MixedSource:
    """Parameters of several sources. A part's name starts with the number of its source: `1:blk.0.attn_q.weight`."""

    def __init__(self, *sources: WeightSource) -> None:
        self._sources = sources
        listed = [(i, list(source.keys())) for i, source in enumerate(sources)]
        self._owner = {key: i for i, keys in reversed(listed) for key in keys}

    def keys(self) -> Iterable[str]:
        """Names of the parameters of all sources."""
        return self._owner.keys()

    def spec(self, key: str) -> TensorSpec:
        """As the source that has it says; ModelFileError if none has."""
        return self._sources[self._of(key)].spec(key)

    def parts(self, key: str) -> tuple[Part, ...]:
        """The parts of the source that has it; ModelFileError if none has."""
        owner = self._of(key)
        return tuple(replace(p, name=f"{owner}:{p.name}") for p in self._sources[owner].parts(key))

    def read(self, part: Part) -> Tensor:
        """The raw encoding, from the part's own source."""
        owner, name = part.name.split(":", 1)
        return self._sources[int(owner)].read(replace(part, name=name))

    def read_scale(self, part: Part) -> Tensor | None:
        """The scales, from the part's own source."""
        owner, name = part.name.split(":", 1)
        return self._sources[int(owner)].read_scale(replace(part, name=name))

    def _of(self, key: str) -> int:
        if key not in self._owner:
            raise missing(key, "any source", self._owner)
        return self._owner[key]
