"""Triton, or what stands for it where it is not installed: what every file with Triton kernels begins with.

The compiler looks a kernel's annotations up among the globals of its file and accepts only names of Triton's, so a file
imports `constexpr` and `tensor` from here. Without Triton files still import; `unavailable()` of `triton_mla` says why
nothing in them can run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Triton has no type information: `Any` starts and ends here.
try:
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
except ImportError:
    triton = tl = None

# Gluon, for what Triton's own language leaves to its compiler: layouts and asynchronous products. It is experimental.
try:
    gluon: Any = import_module("triton.experimental.gluon")
    gl: Any = import_module("triton.experimental.gluon.language")
    hopper: Any = import_module("triton.experimental.gluon.language.nvidia.hopper")
    async_copy: Any = import_module("triton.experimental.gluon.language.nvidia.ampere.async_copy")
    TensorDescriptor: Any = import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
except (ImportError, AttributeError):
    gluon = gl = hopper = async_copy = TensorDescriptor = None

if TYPE_CHECKING:
    from typing import Any as constexpr
    from typing import Any as tensor
else:
    constexpr = getattr(tl, "constexpr", None)
    tensor = getattr(tl, "tensor", None)


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is."""
    return kernel if triton is None else triton.jit(kernel)


def gluon_jit(kernel: Callable[..., Any]) -> Any:
    """`gluon.jit`, or the function as it is."""
    return kernel if gluon is None else gluon.jit(kernel)


def constant(value: float) -> Any:
    """A number of a file that its kernels read: `tl.constexpr`, or the number as it is."""
    return value if tl is None else tl.constexpr(value)


def constexpr_function(function: Callable[..., Any]) -> Any:
    """`gluon.constexpr_function`, for what a kernel has computed while it is compiled; or the function as it is."""
    return function if gluon is None else gluon.constexpr_function(function)


__all__ = [
    "TensorDescriptor",
    "async_copy",
    "constant",
    "constexpr",
    "constexpr_function",
    "gl",
    "gluon_jit",
    "hopper",
    "jit",
    "tensor",
    "tl",
    "triton",
]
