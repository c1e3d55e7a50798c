"""Run code on fake tensors: shapes without values. Beside capture.py the only file with a private torch name."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher


def run_fake(body: fx.GraphModule, mode: Any, args: Sequence[Any]) -> Any:
    """What `body(*args)` returns, as fake tensors of `mode`, the FakeTensorMode of its arguments.

    Composite ops must be taken apart in Python: in torch 2.11 the C++ code for `linear` asks for sizes as numbers.
    """
    with mode, torch.no_grad(), enable_python_dispatcher():
        return fx.Interpreter(body).run(*args)
