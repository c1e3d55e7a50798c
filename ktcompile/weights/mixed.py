"""Several sources as one: each parameter comes from the first that has it, or from the one that is preferred."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from ktcompile.weights.file import ModelFile
from ktcompile.weights.source import Part, TensorSpec, WeightSource, missing


class MixedSource:
    """Parameters of several sources. A part's name starts with the number of its source: `1:blk.0.attn_q.weight`."""

    def __init__(self, *sources: WeightSource, prefer: Callable[[str], int] = lambda key: 0) -> None:
        """`prefer(key)`: the number of the source that gives a parameter, if it has it; else the first that does."""
        self._sources = sources
        self._owner: dict[str, int] = {}
        self._parts: dict[str, tuple[Part, ...]] = {}  # of the parameters that were asked for
        for number, source in enumerate(sources):
            for key in source.keys():  # noqa: SIM118  (a weight source is no mapping)
                if key not in self._owner or prefer(key) == number:
                    self._owner[key] = number

    @property
    def files(self) -> Sequence[ModelFile]:
        """The open files of all sources."""
        return tuple(file for source in self._sources for file in getattr(source, "files", ()))

    def keys(self) -> Iterable[str]:
        """Names of the parameters of all sources."""
        return self._owner.keys()

    def spec(self, key: str) -> TensorSpec:
        """As the source that has it says; ModelFileError if none has."""
        return self._sources[self._of(key)].spec(key)

    def parts(self, key: str) -> tuple[Part, ...]:
        """The parts of the source that has it; ModelFileError if none has."""
        owner = self._of(key)
        if key not in self._parts:
            self._parts[key] = tuple(replace(p, name=f"{owner}:{p.name}") for p in self._sources[owner].parts(key))
        return self._parts[key]

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
