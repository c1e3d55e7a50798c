"""ktcompile: run giant mixture-of-experts models on one machine, compiled by small graph passes."""

from importlib import import_module
from pkgutil import extend_path as _extend_path
from typing import TYPE_CHECKING

__path__ = _extend_path(__path__, __name__)  # repository root as cwd + a wheel: find the compiled extension
from ktcompile.version import __version__

if TYPE_CHECKING:
    from ktcompile.errors import CapacityError, KernelError, KtransError, ModelFileError, PassError, RulesError
    from ktcompile.folding import fold
    from ktcompile.graph import (
        Region,
        copies,
        device_of,
        insert_copy,
        is_copy,
        is_scalar,
        prune,
        regions,
        suggest,
        value_of,
    )
    from ktcompile.kernel import Call, Cost, Kernel, Packed, Parts
    from ktcompile.model import explain, load
    from ktcompile.ops import BY_NAME as OPS
    from ktcompile.ops import bind
    from ktcompile.pipeline import Context, OptionError, Pass, Pipeline, load_rules
    from ktcompile.target import Device, Link, Target

_HOME = {
    "errors": ("CapacityError", "KernelError", "KtransError", "ModelFileError", "PassError", "RulesError"),
    "folding": ("fold",),
    "graph": (
        "Region",
        "copies",
        "device_of",
        "insert_copy",
        "is_copy",
        "is_scalar",
        "prune",
        "regions",
        "suggest",
        "value_of",
    ),
    "kernel": ("Call", "Cost", "Kernel", "Packed", "Parts"),
    "model": ("explain", "load"),
    "ops": ("OPS", "bind"),
    "pipeline": ("Context", "OptionError", "Pass", "Pipeline", "load_rules"),
    "target": ("Device", "Link", "Target"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    """Everything is imported at first use: torch takes one second and transformers two."""
    if name not in _MODULE:
        raise AttributeError(f"module 'ktcompile' has no attribute {name!r}")
    return getattr(import_module(f"ktcompile.{_MODULE[name]}"), "BY_NAME" if name == "OPS" else name)


__all__ = [
    "OPS",
    "Call",
    "CapacityError",
    "Context",
    "Cost",
    "Device",
    "Kernel",
    "KernelError",
    "KtransError",
    "Link",
    "ModelFileError",
    "OptionError",
    "Packed",
    "Parts",
    "Pass",
    "PassError",
    "Pipeline",
    "Region",
    "RulesError",
    "Target",
    "__version__",
    "bind",
    "copies",
    "device_of",
    "explain",
    "fold",
    "insert_copy",
    "is_copy",
    "is_scalar",
    "load",
    "load_rules",
    "prune",
    "regions",
    "suggest",
    "value_of",
]
