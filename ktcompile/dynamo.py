"""The backend of `torch.compile(model, backend="ktrans")`, found by name through an entry point."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ktcompile.capture import annotate, annotate_weights, computed, graph_limit, graph_number, weight_nodes
from ktcompile.checkpoint import open_checkpoint
from ktcompile.errors import KtransError, RulesError
from ktcompile.kernel import available
from ktcompile.model import PLANNED_TOKENS, Phase, pipeline_for, run_pipeline, settings_of
from ktcompile.pipeline import near
from ktcompile.plan import Plan
from ktcompile.runtime import BorrowedStore, Store, lower_borrowed
from ktcompile.target import Target, detect

OPTIONS = ("rules", "experts", "ranking", "target", "name", "weights")
"""What `options=` may hold: a rules file, experts to keep and their ranking, a Target, a name for the page; weights: a
GGUF file, a folder or a WeightSource that is read instead of the model's own parameters."""


@dataclass
class _Compiled:
    """What all graphs of one configuration share: packed weights, and the plans so far."""

    target: Target
    store: BorrowedStore
    stored: Store | None
    plans: list[Plan] = field(default_factory=list)


_COMPILED: dict[tuple[Any, ...], _Compiled] = {}  # registration with torch: dynamo calls the backend a graph at a time


def plans() -> list[Plan]:
    """The plan of every graph compiled so far in this process, oldest first."""
    return [plan for compiled in _COMPILED.values() for plan in compiled.plans]


def reset() -> None:
    """Forget all plans and packed weights; use it with `torch.compiler.reset()`."""
    _COMPILED.clear()


def ktrans(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one dynamo graph: fold, place, copy, choose kernels, and run with the model's own parameters.

    Where nothing that the graph is called with is on a GPU, all of it stays on the CPU: a cache is never moved.
    Raises RulesError for options that do not fit, KtransError before dynamo would fall back to eager in silence.
    """
    given = dict(options or {})
    if unknown := [k for k in given if k not in OPTIONS]:
        raise RulesError(
            f"torch.compile(backend='ktrans', options=...): no option {unknown[0]!r}; {near(unknown[0], OPTIONS)}"
        )
    compiled = _shared(given, any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in example_inputs))
    annotate(gm)
    source = compiled.stored.source if compiled.stored else None
    annotate_weights(gm, source, computed(n.meta["weight"] for n in weight_nodes(gm)))
    if not any(n.meta["stack"] for n in gm.graph.nodes):
        return gm.forward  # no module was called: nothing to place
    if not any(cls.endswith("Experts") for n in gm.graph.nodes for _, cls in n.meta["stack"]):
        raise KtransError(
            "this graph has no routed experts. The `eager` experts implementation breaks the graph at every layer: use "
            "model.set_experts_implementation('grouped_mm') (the default). A model without experts needs no ktrans"
        )
    _check_limit()
    pipeline = pipeline_for(None, given.get("rules"), given.get("experts"), given.get("ranking"))
    settings = settings_of(compiled.target, pipeline)
    phase, tokens = _step(gm)
    folded, (plan,) = run_pipeline(gm, settings, str(given.get("name", _model_name(gm))), phase, tokens)
    compiled.plans.append(plan)
    return lower_borrowed(folded, plan, compiled.store, compiled.stored).flat


def _shared(options: Mapping[str, Any], gpu: bool) -> _Compiled:
    target = options.get("target")
    if target is not None and not isinstance(target, Target):
        raise RulesError(f"option target is a {type(target).__name__}; wanted a ktcompile.Target")
    key = gpu, *((k, str(options[k])) for k in sorted(options))
    if key not in _COMPILED:
        real = target or (detect() if gpu else Target((detect().host,)))
        kernels = available()
        weights = options.get("weights")
        source = open_checkpoint(weights).source if isinstance(weights, str | Path) else weights
        if source is None and weights is not None:
            raise RulesError(f"option weights: {weights} has a configuration and no weights")
        stored = None if source is None else Store(source, real, kernels)
        _COMPILED[key] = _Compiled(real, BorrowedStore(real, kernels), stored)
    return _COMPILED[key]


def _check_limit() -> None:
    """Raise where the next recompilation would exceed dynamo's limit, after which it runs the model eagerly."""
    if graph_number() >= graph_limit():
        raise KtransError(
            f"this is graph {graph_number()} of one function that all Hugging Face models of a process share; torch's "
            f"limit is {graph_limit()}, and past it dynamo runs the model eagerly without a word. Shapes that change "
            "cause it: pass a StaticCache of one size, or use ktcompile.load, which needs two graphs for all shapes. "
            "Many models in one process: raise torch._dynamo.config.recompile_limit"
        )


def _step(gm: fx.GraphModule) -> tuple[Phase, int]:
    """Phase and tokens a step, from the token ids `[B, S]`: S = 1 is decode, a symbol a typical prefill."""
    for node in gm.graph.nodes:
        value = node.meta["val"]
        if node.op != "placeholder" or "input" not in node.meta or not isinstance(value, torch.Tensor):
            continue
        if value.dim() == 2 and value.dtype in (torch.int64, torch.int32):
            sizes = [s for s in value.shape if isinstance(s, int)]
            tokens = sizes[0] * sizes[1] if len(sizes) == 2 else PLANNED_TOKENS["prefill"]
            return "decode" if isinstance(value.shape[1], int) and value.shape[1] == 1 else "prefill", tokens
    return "prefill", PLANNED_TOKENS["prefill"]


def _model_name(gm: fx.GraphModule) -> str:
    return next((n.meta["stack"][0][1] for n in gm.graph.nodes if n.meta["stack"]), "model")
