"""Several sources as one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ktcompile import ModelFileError
from ktcompile.weights import MixedSource, ModuleSource, SafetensorsSource, values


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


def test_a_source_can_be_preferred_for_some() -> None:
    first = ModuleSource({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)})
    second = ModuleSource({"a": torch.zeros(2), "b": torch.zeros(3), "d": torch.zeros(1)})
    mixed = MixedSource(first, second, prefer=lambda key: int(key in "ac"))
    found = {key: float(values(mixed, key).sum()) for key in mixed.keys()}  # noqa: SIM118
    assert found == {"a": 0.0, "b": 3.0, "c": 1.0, "d": 0.0}  # the second has no c, the first no d


def test_parts_and_scales_come_from_their_own_source(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("first", "second"):
        weight = torch.randn(130, 40, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(2, 1, generator=generator)
        save_file({"w": weight, "w_scale_inv": scale}, tmp_path / f"{name}.safetensors")
    first, second = (SafetensorsSource(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    for number, chosen in enumerate((first, second)):
        mixed = MixedSource(MixedSource(first, second, prefer=lambda key, n=number: n), ModuleSource({}))
        assert torch.equal(values(mixed, "w"), values(chosen, "w"))
        (part,) = mixed.parts("w")
        (plain,) = chosen.parts("w")
        scales = mixed.read_scale(part.cut(0, 128, 130)), chosen.read_scale(plain)
        assert scales[0] is not None and scales[1] is not None and torch.equal(scales[0], scales[1][1:])
