"""inductor: regions without a kernel of their own, fused by torch's compiler.

For what is left between kernels on a GPU: residual sums, rotary tables, the picking of rows. No list has it by default
(it compiles for seconds when a model first runs); a rules file asks for it:

    extends: deepseek-v3
    pipeline:
      - choose-kernels: {other: [inductor, encoded, reference]}
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ktcompile import Call, Packed, Region, Target
from ktcompile.backends.reference import Reference
from ktcompile.backends.triton_mla import unavailable


class Inductor(Reference):
    """The captured code through Inductor, for any number of tokens. Takes nothing that writes to its inputs."""

    name = "inductor"
    device = "cuda"

    def __init__(self) -> None:
        self._compiled: dict[fx.GraphModule, Callable[..., Any]] = {}  # as long as the model that has this kernel

    def missing(self) -> str | None:
        return unavailable()

    def refuses(self, region: Region, target: Target) -> str | None:
        if region.effects:
            return "it changes one of its inputs in place, which Inductor would do to a copy"
        return unavailable() if torch.cuda.is_available() else None

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Any:
        run = self._compiled.get(region.body)
        if run is None:
            run = self._compiled[region.body] = torch.compile(region.body, fullgraph=True)
        return run(*inputs, *(packed.tensors[leaf] for leaf in region.leaves))
