"""Typed access to GGUF metadata and to Hugging Face configs; every error names the file and the key or field."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import overload

from ktcompile.errors import ModelFileError
from ktcompile.weights.gguf_header import Value

Fields = dict[str, object]


@dataclass(frozen=True)
class Metadata:
    """`<architecture>.<name>` of a file, and the names of its tensors if they are known."""

    values: Mapping[str, Value]
    where: str
    prefix: str
    tensors: Collection[str] = field(default=(), repr=False)

    @overload
    def integer(self, name: str) -> int: ...
    @overload
    def integer(self, name: str, default: int) -> int: ...
    @overload
    def integer(self, name: str, default: None) -> int | None: ...
    def integer(self, name: str, default: int | None = -1) -> int | None:
        """The value, or `default` if there is none; without a default it must be there."""
        value = self.values.get(self.prefix + name)
        if value is None and default != -1:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, "an integer is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The value, or `default` if there is none; without a default it must be there."""
        value = self.values.get(self.prefix + name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(name, "a number is needed")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """The value, or `default` if there is none."""
        value = self.values.get(self.prefix + name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false is needed")
        return value

    def has(self, name: str) -> bool:
        """Whether the file says it."""
        return self.prefix + name in self.values

    def wrong(self, name: str, needed: str) -> ModelFileError:
        """The error for a value that cannot be used."""
        return ModelFileError(
            f"{self.where}: {self.prefix + name} is {short(self.values.get(self.prefix + name))}; {needed}"
        )


@dataclass(frozen=True)
class Config:
    """Fields of a Hugging Face config as `to_dict` gives them. A field that is None counts as one that is not there."""

    values: Mapping[str, object]
    where: str

    def integer(self, *names: str) -> int:
        """The first of these fields that there is; they are one field under several names."""
        value = self.first(*names)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(names[0], "an integer is needed")
        return value

    def number(self, *names: str) -> float:
        """The first of these fields that there is."""
        value = self.first(*names)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(names[0], "a number is needed")
        return float(value)

    def flag(self, *names: str) -> bool:
        """The first of these fields that there is."""
        value = self.first(*names)
        if not isinstance(value, bool):
            raise self.wrong(names[0], "true or false is needed")
        return value

    def inner(self, name: str) -> "Config":
        """A field that has fields itself."""
        value = self.values.get(name)
        if not isinstance(value, Mapping):
            raise self.wrong(name, "fields are needed")
        return Config(value, f"{self.where}: {name}")

    def first(self, *names: str) -> object:
        """The first of these fields that there is, else None."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def wrong(self, name: str, needed: str) -> ModelFileError:
        """The error for a value that cannot be used or written."""
        return ModelFileError(f"{self.where}: {name} is {short(self.values.get(name))}; {needed}")


def short(value: object) -> str:
    """A value for an error message, cut to one line."""
    return "missing" if value is None else repr(value)[:80]
