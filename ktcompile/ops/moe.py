"""moe: the routed experts of a mixture-of-experts layer.

    y[t] = sum_j scores[t, j] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])),  e = ids[t, j]

Weights are fused as Hugging Face holds them: `gate_up_proj [E, 2 I, H]`, gate first, and `down_proj [E, H, I]`. Those
of gpt-oss have biases and a clamped gate, and lie in another order: `clamped_moe`, which is the same op to a kernel.
"""

import operator
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ktcompile.folding import Site
from ktcompile.graph import value_of
from ktcompile.ops.base import Binding, Bound, Op, activation_of, calls, register, roles_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


PARAMETERS = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
"""Matrix of an expert -> the parameter that it is rows of."""

_CLAMPED = "swiglu_oai"


@dataclass(frozen=True)
class Clamp:
    """What `clamped_moe` has beyond `moe`."""

    alpha: float
    limit: float


MIN_SHARED_TOKENS = 64
"""Steps of fewer tokens stream nothing: they need few experts, and one that is a CUDA graph copies nothing so large."""


@dataclass(frozen=True)
class Share:
    """Which experts a region computes of a layer that two devices share: the first ones stream to the other device.

    Seconds are of all experts of the layer.
    """

    streams: bool  # this region computes those whose weights cross the link at each step; else the rest
    across_s: float  # to bring the weights over the link
    read_s: float  # for the CPU to read them, where every expert has a token
    token_s: float  # for the CPU to compute one token more
    most: float = 1.0  # part of the experts that streams at most

    def streamed(self, tokens: int, shape: "MoeShape") -> int:
        """How many experts stream in a step of so many tokens: so many that both devices are done together."""
        part = min(self.most, self.fraction(tokens, shape))
        return round(shape.experts * part) if tokens >= MIN_SHARED_TOKENS else 0

    def fraction(self, tokens: Any, shape: "MoeShape") -> Any:
        """The part of all experts that takes both devices as long; `tokens` may be an expression."""
        used = 1 - (1 - shape.top_k / shape.experts) ** tokens
        alone = self.read_s * used + self.token_s * tokens
        return alone / (alone + self.across_s)


@dataclass(frozen=True)
class MoeShape:
    """Attributes of a layer's routed experts; sizes in elements. `share`: where two regions compute them together.

    With a `clamp`, the activation is "swiglu_oai", every parameter has one of biases beside it (`gate_up_proj_bias`),
    and gate and up alternate.
    """

    experts: int
    hidden: int
    width: int
    top_k: int
    activation: str
    clamp: Clamp | None = None
    share: Share | None = None

    def rows(self, matrix: str) -> slice:
        """The rows of a matrix of `PARAMETERS` among those of its parameter, where that is [E, out, in]."""
        if matrix == "down":
            return slice(0, self.hidden)
        place = 0 if matrix == "gate" else 1
        if self.clamp is not None:
            return slice(place, 2 * self.width, 2)
        return slice(place * self.width, (place + 1) * self.width)


def moe(x: Tensor, ids: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """The definition. `x [..., H]`, `ids` and `scores [T, k]`; weights of any float type; result like `x`."""
    rows = x.reshape(-1, x.shape[-1])  # [T, H]
    act = ACTIVATIONS[activation]
    out = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(rows[token], gate_up[expert].to(x.dtype)).chunk(2, -1)
        value = functional.linear(act(gate) * up, down[expert].to(x.dtype))
        out.index_add_(0, token, (value * scores[token, slot, None]).float())
    return out.to(x.dtype).view(x.shape)


register(
    "moe(Tensor x, Tensor ids, Tensor scores, Tensor gate_up, Tensor down, str activation) -> Tensor",
    moe,
    lambda x, *_: torch.empty_like(x),
)


def moe_share(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    streams: bool,
    across_s: float,
    read_s: float,
    token_s: float,
    most: float,
) -> Tensor:
    """The definition of a share: as `moe`, of the experts that are its own; see `Share`."""
    experts, hidden, width = gate_up.shape[0], x.shape[-1], down.shape[-1]
    shape = MoeShape(experts, hidden, width, ids.shape[1], activation)
    count = Share(streams, across_s, read_s, token_s, most).streamed(ids.shape[0], shape)
    others = ids >= count if streams else ids < count
    return moe(x, ids, scores.masked_fill(others, 0), gate_up, down, activation)


register(
    "moe_share(Tensor x, Tensor ids, Tensor scores, Tensor gate_up, Tensor down, str activation, bool streams, "
    "float across_s, float read_s, float token_s, float most) -> Tensor",
    moe_share,
    lambda x, *_: torch.empty_like(x),
)


def clamped_moe(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    """The definition for gpt-oss: biases, and a clamped gate.

        y[t] = sum_j scores[t, j] * ((min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up) + 1)) @ down[e]
                                     + down_bias[e]),  gate, up = (x[t] @ gate_up[e] + gate_up_bias[e]) in turn

    `clamp` is to -limit and limit. `x [..., H]`, `gate_up [E, H, 2 I]`, `down [E, I, H]`. Source: `GptOssExperts` in
    Hugging Face transformers.
    """
    rows = x.reshape(-1, x.shape[-1])  # [T, H]
    out = x.new_empty(*ids.shape, x.shape[-1])  # [T, k, H]
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        both = rows[token] @ gate_up[expert] + gate_up_bias[expert]
        gate, up = both[:, 0::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
        value = ((up + 1) * (gate * torch.sigmoid(gate * alpha))) @ down[expert] + down_bias[expert]
        out[token, slot] = (value * scores[token, slot, None]).to(x.dtype)
    return out.sum(1).view(x.shape)


register(
    "clamped_moe(Tensor x, Tensor ids, Tensor scores, Tensor gate_up, Tensor gate_up_bias, Tensor down, "
    "Tensor down_bias, float alpha, float limit) -> Tensor",
    clamped_moe,
    lambda x, *_: torch.empty_like(x),
)


def _bind(site: Site) -> Bound | None:
    if not site.cls.endswith("Experts"):
        return None
    if not {"gate_up_proj", "down_proj"} <= set(site.weights):
        return Bound(
            "experts",
            why=f"not moe: its weights are {', '.join(sorted(site.weights))}; "
            "wanted gate_up_proj and down_proj (is this the `eager` experts implementation?)",
        )
    clamped = next((n for n in site.nodes if calls(n, "clamped_moe")), None)
    known = {"gate_up_proj", "down_proj"} | (set() if clamped is None else {"gate_up_proj_bias", "down_proj_bias"})
    if extra := set(site.weights) - known:
        return Bound(
            "experts",
            why=f"not moe: no kernel knows this code of experts with {', '.join(sorted(extra))}; that of gpt-oss is "
            "known after model.set_experts_implementation('ktrans')",
        )
    gate_up, down = (value_of(site.weights[n]) for n in ("gate_up_proj", "down_proj"))
    wanted = "[E, 2 I, H] and [E, H, I]" if clamped is None else "[E, H, 2 I] and [E, I, H]"
    experts, width2, hidden = gate_up.shape if clamped is None else gate_up.mT.shape
    if tuple(down.shape if clamped is None else down.mT.shape) != (experts, hidden, width2 // 2):
        return Bound(
            "experts",
            why=f"not moe: gate_up_proj {list(gate_up.shape)} and down_proj {list(down.shape)} are not {wanted}",
        )
    ids = [n for n in site.tensors if not value_of(n).dtype.is_floating_point]
    scores = [n for n in site.tensors if n not in ids and ids and value_of(n).shape == value_of(ids[0]).shape]
    hidden_in = [n for n in site.tensors if n not in ids and n not in scores]
    if not len(ids) == len(scores) == len(hidden_in) == len(site.outputs) == 1 or site.written:
        return Bound("experts", why="not moe: it does not read one of each: hidden states, expert ids, scores")
    sizes = int(experts), int(hidden), int(width2) // 2, int(value_of(ids[0]).shape[-1])
    roles = roles_of(site, x=hidden_in[0], ids=ids[0], scores=scores[0])
    if clamped is not None:
        alpha, limit = clamped.args[7:9]
        if not isinstance(alpha, float | int) or not isinstance(limit, float | int):
            return Bound("experts", why="not moe: alpha and limit of its gate are computed by the model")
        shape = MoeShape(*sizes, _CLAMPED, Clamp(float(alpha), float(limit)))
        return Bound("moe", Binding(roles, shape, frozenset({"gate_up_proj", "down_proj"})))
    marker = next((n for n in site.nodes if calls(n, "moe")), None)
    activation = str(marker.args[5]) if marker is not None else activation_of(site)
    if activation not in ACTIVATIONS:
        return Bound("experts", why=f"not moe: activation {activation or 'unknown'}; known: {', '.join(ACTIVATIONS)}")
    if marker is None and not _gates_plainly(site):
        return Bound("experts", why="not moe: it does not compute act(gate) * up and nothing else between its products")
    return Bound("moe", Binding(roles, MoeShape(*sizes, activation)))


def _gates_plainly(site: Site) -> bool:
    """Whether the activation reads one half of a product and multiplies the other: no clamp, no scale, no bias."""
    act = next(n for n in site.nodes if getattr(n.target, "__name__", "") in ("silu", "gelu"))
    gate, users = act.args[0], list(act.users)
    if not (isinstance(gate, fx.Node) and gate.target is operator.getitem and gate.args[1] == 0 and len(users) == 1):
        return False
    halves = gate.args[0]
    up = next((a for a in users[0].all_input_nodes if a is not act), None)
    return (
        users[0].target is operator.mul
        and isinstance(halves, fx.Node)
        and halves.target == "chunk"
        and up is not None
        and up.target is operator.getitem
        and up.args == (halves, 1)
    )


def _define(binding: Binding, leaves: tuple[str, ...]) -> fx.Graph:
    graph = fx.Graph()
    x, ids, scores = (graph.placeholder(role) for role in OP.roles)
    weights = {leaf: graph.placeholder(leaf) for leaf in leaves}
    shape: MoeShape = binding.shape
    if shape.clamp is None:
        args = weights["gate_up_proj"], weights["down_proj"], shape.activation
        op, how = torch.ops.ktrans.moe.default, ()
        if shape.share is not None:
            op, how = torch.ops.ktrans.moe_share.default, astuple(shape.share)
        graph.output(graph.call_function(op, (x, ids, scores, *args, *how)))
        return graph
    matrices = (weights[leaf] for name in ("gate_up_proj", "down_proj") for leaf in (name, f"{name}_bias"))
    clamp = shape.clamp.alpha, shape.clamp.limit
    graph.output(graph.call_function(torch.ops.ktrans.clamped_moe.default, (x, ids, scores, *matrices, *clamp)))
    return graph


OP = Op("moe", _bind, "routed experts", ("x", "ids", "scores"), _define)
