"""Several sources as one."""

import pytest
import torch

from ktcompile import ModelFileError
from ktcompile.weights import MixedSource, ModuleSource, values


def test_the_first_source_that_has_a_parameter_gives_it() -> None:
    first = ModuleSource({"a": torch.ones(2, 3), "b:c": torch.zeros(4)})
    second = ModuleSource({"a": torch.zeros(2, 3), "d": torch.full((2,), 7.0)})
    mixed = MixedSource(first, second)
    assert sorted(mixed.keys()) == ["a", "b:c", "d"]
    assert torch.equal(values(mixed, "a"), torch.ones(2, 3))
    assert torch.equal(values(mixed, "b:c"), torch.zeros(4))
    assert torch.equal(values(mixed, "d"), torch.full((2,), 7.0))
    assert mixed.spec("d").nbytes == 8


def test_what_no_source_has_is_named() -> None:
    with pytest.raises(ModelFileError, match=r"dd.*near matches: d"):
        MixedSource(ModuleSource({"d": torch.ones(1)})).parts("dd")
