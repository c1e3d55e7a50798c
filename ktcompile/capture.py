"""Model and example inputs to an FX graph. All use of private torch names is here and in fake.py, one function each."""

import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ktcompile.errors import KtransError, ModelFileError
from ktcompile.graph import writes
from ktcompile.weights import WeightSource
from ktcompile.weights.collection import no_collection

EXPERTS = "ktrans"
"""Name of our experts implementation in transformers: one node a layer, `ktrans::moe` for all models but a few."""


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    if type(self).__name__ == "GptOssExperts":
        clamped: Tensor = torch.ops.ktrans.clamped_moe(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.gate_up_proj_bias,
            self.down_proj,
            self.down_proj_bias,
            self.alpha,
            self.limit,
        )
        return clamped
    odd = self.is_transposed or self.has_bias or not self.has_gate or getattr(self, "has_post_expert_norm", False)
    if odd or type(self)._apply_gate.__name__ != "_default_apply_gate":  # DeepSeek-V4: not `moe`
        other: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        return other
    activation = getattr(self.config, "hidden_act", None) or getattr(self.config, "hidden_activation", "silu")
    name = {"gelu_pytorch_tanh": "gelu_tanh"}.get(str(activation), str(activation))
    out: Tensor = torch.ops.ktrans.moe(
        hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, name
    )
    return out


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)


# ------------------------------------------------------------------------------------------------ names

_STEP = re.compile(
    r"\._modules\['([^']*)'\]|\._parameters\['([^']*)'\]|\._buffers\['([^']*)'\]|\.(\w+)|\['([^']*)'\]|\[(\d+)\]"
)


def module_path(name: str) -> str:
    """`L['self']._modules['model'].layers[0]` as `model.layers.0`: how sources and module stacks agree."""
    root = re.match(r"[LG]\['[^']*'\]", name)
    rest = name[root.end() :] if root else name
    return ".".join(next(g for g in m.groups() if g is not None) for m in _STEP.finditer(rest))


def _source(node: fx.Node) -> str:
    """Where dynamo found a graph input. Seen in torch 2.11 to 2.13: `_dynamo_source`, whose name was once a method."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return node.name
    name = source.name
    return str(name() if callable(name) else name)


def annotate(gm: fx.GraphModule) -> None:
    """Give every node of dynamo's graph what the rest of ktcompile reads.

    `val`: fake value. `stack`: ((module path, class), outermost first). On placeholders `weight` (parameter name), or
    `input` (name), `size_of` ((input, axis), for sizes), and `state` where the graph writes it.
    """
    for node in gm.graph.nodes:
        node.meta["val"] = node.meta.get("example_value", node.meta.get("val"))
        frames = (node.meta.get("nn_module_stack") or {}).values()
        node.meta["stack"] = tuple(
            (module_path(p), getattr(c, "__name__", str(c).rsplit(".", 1)[-1])) for p, c in frames
        )
        if node.op != "placeholder":
            continue
        source = _source(node)
        size = re.fullmatch(r"(.*)\.size\(\)\[(\d+)\]", source)
        if size:
            node.meta["size_of"] = (_input_name(size[1]), int(size[2]))
        elif "._parameters[" in source or "._buffers[" in source:
            node.meta["weight"] = module_path(source)
        else:
            node.meta["input"] = _input_name(source)
    _mark_state(gm)


def _input_name(source: str) -> str:
    root = re.match(r"[LG]\['([^']*)'\]", source)
    return ".".join(filter(None, (root[1] if root else "", module_path(source)))) if root else source


def _mark_state(gm: fx.GraphModule) -> None:
    held = {}
    for node in gm.graph.nodes:
        value = node.meta["val"]
        if node.op == "placeholder" and isinstance(value, Tensor) and "input" in node.meta:
            held[StorageWeakRef(value.untyped_storage())] = node
        for written in writes(node):
            value = written.meta["val"]
            owner = held.get(StorageWeakRef(value.untyped_storage())) if isinstance(value, Tensor) else None
            if owner is not None:
                owner.meta["state"] = True


# ------------------------------------------------------------------------------------------------ capture


def capture(
    function: Callable[..., Any], args: Sequence[Any], dynamic: Sequence[tuple[Tensor, int]] = ()
) -> fx.GraphModule:
    """The one annotated graph of `function(*args)`; `dynamic` axes stay symbolic. Nothing is computed.

    Raises KtransError with dynamo's reason where the code cannot be captured whole.
    """
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(gm)
        outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        return lambda *_: tuple(_made_up(o.meta.get("example_value")) for o in outputs)

    for tensor, axis in dynamic:
        torch._dynamo.mark_dynamic(tensor, axis)
    code = function.__code__.replace(co_name=f"{function.__name__}_captured")  # a cache of its own in dynamo
    fresh = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    try:
        # Tracing makes millions of objects that live on: a fifth of the time went into looking at them.
        with no_collection(), torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            torch.compile(fresh, backend=backend, fullgraph=True)(*args)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise KtransError(f"the model cannot be captured as one graph: {error}") from error
    annotate(found[0])
    return found[0]


def _made_up(value: Any) -> Any:
    """An empty tensor of a fake value's shape. `node.hint` is a symbol's size in this call, read without a guard."""
    if not isinstance(value, Tensor):
        return value
    shape = [d if isinstance(d, int) else d.node.hint for d in value.shape]
    return torch.empty(shape, dtype=value.dtype)


def expression(value: Any) -> Any:
    """The sympy expression of a symbolic size, a number as it is. Adds no guard."""
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


def version(tensor: Tensor) -> tuple[int, int, bytes]:
    """What is another after a tensor was written: packed copies of an older version are stale.

    torch counts writes, but neither those through `.data` nor those to inference tensors: so its address, and on a CPU
    64 of its values (reading a GPU's would wait for it), are part of it.
    """
    count = 0 if tensor.is_inference() else int(tensor._version)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return count, tensor.data_ptr(), b""
    sample = tensor.detach().view(-1)[:: max(1, tensor.numel() // 64)]
    return count, tensor.data_ptr(), sample.contiguous().view(torch.uint8).numpy().tobytes()


def graph_limit() -> int:
    """How many graphs dynamo makes of one function before it silently runs it eagerly."""
    return int(torch._dynamo.config.recompile_limit)


def graph_number() -> int:
    """The number, from 1, of the graph that dynamo compiles now, to be compared with `graph_limit`.

    Counted are the graphs that dynamo holds of the function, as it counts itself: not the compilations that failed. All
    attempts together have a limit of their own, 256: the nearer one decides. Seen in torch 2.11 and 2.13.
    """
    attempt = torch._guards.CompileContext.current_compile_id()
    if attempt is None:
        return 1
    code = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.root_tx.f_code
    held = len(torch._dynamo.eval_frame._debug_get_cache_entry_list(code))
    spare = int(torch._dynamo.config.accumulated_recompile_limit) - graph_limit()
    return 1 + max(held, (attempt.frame_compile_id or 0) - spare)


def forget_workspaces() -> None:
    """Have cuBLAS ask for memory to work with anew, of each stream, with the next product there.

    torch/_inductor/cudagraph_trees.py does so before and after it records a CUDA graph. Seen in torch 2.13.
    """
    torch._C._cuda_clearCublasWorkspaces()


# ------------------------------------------------------------------------------------- models without weights


def attention_of(cls: type[PreTrainedModel]) -> Literal["sdpa", "eager"]:
    """The attention implementation that a class is captured with: sdpa where it can (gpt-oss cannot: it has sinks)."""
    return "sdpa" if cls._supports_sdpa else "eager"


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The Hugging Face model of a configuration whose weights are placeholders.

    Each weight is one row of NaN seen many times: it traces like the real thing, needs almost no memory, and cannot be
    used by mistake without showing. Rotary tables are real. Raises ModelFileError for an unknown architecture.
    """
    try:
        cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), PreTrainedModel)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention_of(cls), experts_implementation=EXPERTS
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"transformers builds no causal language model of type {config.model_type!r} for capture: {error}"
        ) from error
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            real = type(module)(config=config)
            module._buffers.update(real._buffers)
            module.__dict__.update({k: v for k, v in real.__dict__.items() if isinstance(v, Tensor)})
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_nan(parameter, parameter.dtype), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                kind = torch.float32 if buffer.dtype.is_floating_point else buffer.dtype
                module._buffers[name] = _nan(buffer, kind)
    model.eval()
    return model


def _nan(like: Tensor, dtype: torch.dtype) -> Tensor:
    fill = float("nan") if dtype.is_floating_point else 0
    if like.dim() < 2:
        return torch.full(like.shape, fill, dtype=dtype)
    return torch.full((*[1] * (like.dim() - 1), like.shape[-1]), fill, dtype=dtype).expand(like.shape)


def weight_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The placeholders that are parameters or buffers."""
    return (n for n in gm.graph.nodes if n.op == "placeholder" and "weight" in n.meta)


def computed(names: Iterable[str]) -> list[str]:
    """Those of the weights' names that the model computes itself and no file has: rotary tables."""
    return [name for name in names if name.rsplit(".", 1)[-1].endswith("inv_freq")]


def annotate_weights(gm: fx.GraphModule, source: WeightSource | None, known: Sequence[str] = ()) -> None:
    """Put each weight's stored bytes and encoding on its placeholder; reads no tensor.

    `known`: weights that the model computes itself (rotary tables). Raises ModelFileError where the shape is another.
    """
    for node in weight_nodes(gm):
        value = node.meta["val"]
        key = node.meta["weight"]
        if source is None or key in known:
            node.meta.update(nbytes=value.nbytes, encoding=_dtype_name(value.dtype))
            continue
        spec = source.spec(key)
        if tuple(spec.shape) != tuple(value.shape):
            raise ModelFileError(
                f"{key} is {list(spec.shape)} in the model file; the configuration says {list(value.shape)}"
            )
        node.meta.update(nbytes=spec.nbytes, encoding=spec.encoding, source=source)


def _dtype_name(dtype: torch.dtype) -> str:
    return {
        torch.float32: "f32",
        torch.float16: "f16",
        torch.bfloat16: "bf16",
        torch.int64: "i64",
        torch.int32: "i32",
        torch.bool: "bool",
    }.get(dtype, str(dtype).removeprefix("torch."))
