"""Run code on fake tensors: shapes without values. Beside capture.py the only file with a private torch name."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def run_fake(body: fx.GraphModule, mode: Any, args: Sequence[Any]) -> Any:
    """What `body(*args)` returns, as fake tensors of `mode`, the FakeTensorMode of its arguments.

    Composite ops must be taken apart in Python: in torch 2.11 the C++ code for `linear` asks for sizes as numbers.
    """
    with mode, torch.no_grad(), enable_python_dispatcher():
        return fx.Interpreter(body).run(*args)


class _Allocations(TorchDispatchMode):
    """Sees every tensor that an op makes, real or fake. `peak`: the most bytes of them that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(t.untyped_storage()).cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if ref.cdata not in given:
                self._alive[ref.cdata] = ref, int(storage.nbytes())
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def allocated(run: Callable[[], Any]) -> int:
    """Most bytes of tensors made inside `run()` that were alive at once, its result included."""
    seen = _Allocations()
    with torch.no_grad(), seen:
        run()
    return seen.peak


def body_bytes(body: fx.GraphModule, args: Sequence[Any]) -> int:
    """What `allocated` would say of `body(*args)`, from shapes alone. `args`: (shape, dtype) of tensors, or numbers."""
    with FakeTensorMode(), torch.no_grad(), enable_python_dispatcher():
        made = [torch.empty(a[0], dtype=a[1]) if isinstance(a, tuple) else a for a in args]
        return allocated(lambda: fx.Interpreter(body).run(*made))
