"""`quantization_config`: what is known, the side of the scale blocks, and how the rest is refused."""

from typing import Any

import pytest

from ktcompile.errors import ModelFileError
from ktcompile.weights.quantization import scale_block

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(*weights: object, format: str = "pack-quantized", **more: object) -> dict[str, Any]:
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": w} for i, w in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, **more}


@pytest.mark.parametrize(
    ("quantization", "side"),
    [
        (None, 128),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, 128),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, 64),
        ({"quant_method": "fp8", "activation_scheme": "static"}, 128),
        (compressed(INT4, ignore=["lm_head"]), 128),
        (compressed(INT4 | {"group_size": 128, "actorder": "static"}), 128),
        (compressed(FLOAT8 | {"strategy": "channel"}, format="float-quantized"), 128),
        (compressed(FLOAT8 | {"strategy": "tensor"}, format="float-quantized"), 128),
        (compressed(FLOAT8 | {"strategy": "block", "block_structure": [64, 64]}, format="float-quantized"), 64),
    ],
)
def test_known(quantization: object, side: int) -> None:
    assert scale_block(quantization, "config.json") == side


def test_every_group_may_have_its_format() -> None:
    mixed = compressed(INT4, FLOAT8 | {"strategy": "channel"}, format="mixed-precision")
    for group, form in zip(mixed["config_groups"].values(), ("pack-quantized", "float-quantized"), strict=True):
        group["format"] = form
    assert scale_block(mixed, "config.json") == 128


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        *[
            ({"quant_method": name}, f"quant_method '{name}' is not supported; compressed-tensors, fp8, mxfp4 are")
            for name in ("awq", "gptq", "bitsandbytes", "modelopt")
        ],
        ("x", "quant_method 'x' is not supported"),
        ({}, "quant_method 'None' is not supported"),
        ({"quant_method": ["fp8"]}, "is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, r"weight_block_size is \[128, 64\]; a square"),
        ({"quant_method": "fp8", "weight_block_size": [0, 0]}, "a square"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "a square"),
        (compressed(), "config_groups is {}"),
        (compressed(7), "config_groups.group_0.weights is 7; an object is needed"),
        (compressed() | {"config_groups": {"a": 7}}, "config_groups.a.weights is None; an object is needed"),
        (compressed() | {"config_groups": [7]}, r"config_groups is \[7\]"),
        (compressed(INT4 | {"num_bits": 8}), "pack-quantized, 8, int, True, group; known are pack-quantized, 4, int"),
        (compressed(INT4 | {"symmetric": False}), "pack-quantized, 4, int, False, group; known"),
        (compressed(INT4 | {"strategy": "channel"}), "pack-quantized, 4, int, True, channel; known"),
        (compressed(INT4 | {"strategy": ["group"]}), "known are pack-quantized"),
        (compressed(INT4, format="int-quantized"), "int-quantized, 4, int, True, group; known"),
        (compressed(INT4 | {"actorder": "group"}), "actorder is 'group'; groups must be in order"),
        (
            compressed(
                FLOAT8 | {"strategy": "block", "block_structure": [64, 64]},
                FLOAT8 | {"strategy": "block", "block_structure": [128, 128]},
                format="float-quantized",
            ),
            r"config_groups have blocks of \[64, 128\]; one size is known",
        ),
    ],
)
def test_refused(quantization: object, message: str) -> None:
    with pytest.raises(ModelFileError, match=f"^config.json: quantization_config: .*{message}"):
        scale_block(quantization, "config.json")
