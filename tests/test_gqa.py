"""gqa: what `bind` reads off captured attention, that the definition is Hugging Face's modules, and what it refuses."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import test_families
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GPU, Plain, _recorded, captured_plain, captured_user, real, rewritten, settings
from test_triton_mla import make_step
from tolerances import CHAIN
from torch import Tensor, fx
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig

from ktcompile import Region, bind, regions
from ktcompile.cache import PagedCache
from ktcompile.capture import empty_model
from ktcompile.checkpoint import Checkpoint
from ktcompile.folding import Site, site_of
from ktcompile.graph import is_scalar
from ktcompile.model import PHASES, Phase, capture_phase
from ktcompile.ops.base import Binding
from ktcompile.ops.gqa import GQAShape, attend_reference, gqa_reference, rotate_reference
from ktcompile.ops.mla import append_reference
from ktcompile.passes.fold import Fold
from ktcompile.verify import wrong_binding

_QWEN2 = GQAShape(heads=4, kv_heads=2, dim=16, rope=16, scale=0.25, interleaved=False, eps=0.0, window=None)
SHAPES: Mapping[str, tuple[GQAShape, GQAShape]] = {
    "qwen2_moe": (_QWEN2, _QWEN2),
    "qwen2_moe_window": (_QWEN2, replace(_QWEN2, window=6)),
    "qwen3_moe": (replace(_QWEN2, eps=1e-6),) * 2,
    "glm4_moe": (replace(_QWEN2, rope=8, eps=1e-5),) * 2,
    "mixtral": (_QWEN2, _QWEN2),
    "mixtral_window": (replace(_QWEN2, window=6),) * 2,
    "olmoe_plain": (replace(_QWEN2, kv_heads=4, eps=1e-5),) * 2,
    "ernie4_5_moe": (replace(_QWEN2, interleaved=True),) * 2,
    "gpt_oss": (replace(_QWEN2, window=6), _QWEN2),
}
"""What the two layers of each variant of `test_families` are."""

OTHERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "olmoe_plain": ("olmoe", {}),  # without the clamp that `olmoe` has there
    "ernie4_5_moe": ("ernie4_5_moe", {}),
}
_ERNIE = {
    **{"num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 32, "moe_num_experts": 8},
    **{"moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
}


@pytest.fixture(autouse=True, scope="module")
def _more_families() -> Any:
    """The variants and the family that are of interest only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_families, "VARIANTS", {**test_families.VARIANTS, **OTHERS})
        patch.setitem(tiny._CONFIGS, "ernie4_5_moe", _ERNIE)
        yield


@cache
def captured(name: str, phase: Phase, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The graph that `ktcompile.load` captures of a variant."""
    family, changes = test_families.VARIANTS[name]
    config = tiny.config(family, **changes)

    def no_tokenizer() -> Any:
        raise AssertionError("a tiny model has no tokenizer")

    checkpoint = Checkpoint(name, name, config, None, GenerationConfig(), no_tokenizer)
    given = replace(settings(GPU), dtype=dtype)
    return capture_phase(empty_model(config, dtype), phase, given, checkpoint)


@cache
def attention(name: str, phase: Phase, dtype: torch.dtype = torch.float32) -> tuple[list[Region], str]:
    """The attention regions of a variant, and what fold says of them."""
    folded, ctx = rewritten(captured(name, phase, dtype), GPU, Fold())
    found = [r for r in regions(folded, "*.self_attn") if r.op != "glue"]
    return found, "".join(f"{n.path}: {n.why}\n" for n in ctx.notes if n.path.endswith("self_attn"))


# ------------------------------------------------------------------------------------------------ what it is


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, phase: Phase) -> None:
    """Each layer is bound as its configuration says, and agrees with its captured code on random inputs."""
    found, notes = attention(name, phase)
    assert notes == ""
    assert [(r.op, r.binding.shape) for r in found] == [("gqa", shape) for shape in SHAPES[name]]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_shapes_in_bf16(name: str) -> None:
    found, notes = attention(name, "decode", torch.bfloat16)
    assert notes == "" and [r.binding.shape for r in found] == [*SHAPES[name]]


class Heard:
    """Attention's inputs and results of every layer, as Hugging Face's model calls its modules."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self.hear, with_kwargs=True)

    def hear(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        cos, sin = kwargs["position_embeddings"]
        self.calls.append((kwargs["hidden_states"] if not args else args[0], cos, sin, out[0]))


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "ernie4_5_moe"])
def test_hugging_face(name: str) -> None:
    """Two requests in one ragged step: prompts of 19 and 5 tokens, then three tokens of each; every layer's result."""
    model = test_families.eager(name)
    heard = Heard(model)
    shapes = [r.binding.shape for r in attention(name, "prefill")[0]]
    weights = [
        {k.removesuffix(".weight"): p.detach() for k, p in layer.self_attn.named_parameters()}
        for layer in model.model.layers
    ]
    step = make_step([(0, 22), (0, 8)], 2 * shapes[0].kv_heads * shapes[0].dim, 16)
    pools = [step.pool.clone() for _ in shapes]
    prompts = [tiny.ids(1, 22, 1), tiny.ids(1, 8, 2)]
    caches = [DynamicCache(config=model.config) for _ in prompts]
    stored = [0, 0]
    for counts in ([19, 5], [1, 1], [1, 1], [1, 1]):
        heard.calls.clear()
        for r, prompt in enumerate(prompts):
            with torch.no_grad():
                model(prompt[:, stored[r] : stored[r] + counts[r]], past_key_values=caches[r], use_cache=True)
        tables = step.page_table, torch.tensor(stored), torch.tensor([0, *counts]).cumsum(0)
        for i, shape in enumerate(shapes):
            both = heard.calls[i], heard.calls[len(shapes) + i]
            hidden, cos, sin, want = (torch.cat(parts, 1) for parts in zip(*both, strict=True))
            got = gqa_reference(hidden, cos, sin, weights[i], shape, pools[i], *tables)
            assert got.shape == want.shape
            assert (got - want).norm() <= CHAIN["f32"] * want.norm()
        stored = [n + c for n, c in zip(stored, counts, strict=True)]


# ------------------------------------------------------------------------------------------------ what it is not


def why_not(site: Site) -> str | None:
    bound = bind(site)
    assert bound is not None
    assert bound.op == ("gqa" if bound.why is None else "attention")
    return bound.why


@cache
def site(name: str, phase: Phase = "decode") -> Site:
    """The first attention block of a variant, before it is folded. Changes to its nodes are to be undone."""
    own = "model.layers.0.self_attn"
    nodes = [n for n in captured(name, phase).graph.nodes if n.op != "placeholder" and not is_scalar(n)]
    nodes = [n for n in nodes if any(path == own for path, _ in n.meta["stack"])]
    return site_of(own, next(cls for path, cls in nodes[0].meta["stack"] if path == own), nodes)


def test_it_is_bound() -> None:
    assert why_not(site("qwen3_moe")) is None and why_not(site("qwen3_moe", "prefill")) is None


def test_a_clamp_is_no_part_of_it() -> None:
    """No random inputs would show a clamp that only large values meet."""
    found, notes = attention("olmoe", "decode")
    assert {r.op for r in found} == {"attention"}
    assert notes.splitlines()[0] == "model.layers.0.self_attn: not gqa: it calls clamp_, which is no part of gqa"


def test_other_weights() -> None:
    given = site("qwen3_moe")
    weights = dict(given.weights)
    one = replace(given, weights={k: w for k, w in weights.items() if k != "k_norm.weight"})
    names = "k_proj.weight, o_proj.weight, q_norm.weight, q_proj.weight, v_proj.weight"
    assert why_not(one) == f"not gqa: its weights are {names}"
    gated = replace(given, weights=weights | {"g_proj.weight": weights["q_proj.weight"]})
    assert str(why_not(gated)).startswith("not gqa: its weights are g_proj.weight, k_norm.weight,")
    lost = replace(given, weights={k: w for k, w in weights.items() if k != "v_proj.weight"})
    bound = bind(lost)
    assert bound is not None and (bound.op, bound.why) == ("attention", None)  # nothing that gqa knows


@pytest.mark.parametrize(
    ("leaf", "shape", "why"),
    [
        ("q_proj.weight", (128, 64), "its projections are not queries, keys and values of the cache's heads, and"),
        ("k_proj.weight", (64, 64), "its projections are not queries, keys and values of the cache's heads, and"),
        ("o_proj.weight", (64, 128), "its projections are not queries, keys and values of the cache's heads, and"),
        ("q_norm.weight", (32,), "q_norm.weight has [32] elements: of no head and no projection"),
    ],
)
def test_other_sizes(leaf: str, shape: tuple[int, ...], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate in the queries' projection (Qwen3-Next) is one."""
    given = site("qwen3_moe")
    monkeypatch.setitem(given.weights[leaf].meta, "val", torch.empty(shape))
    assert str(why_not(given)).startswith(f"not gqa: {why}")


SDPA = "scaled_dot_product_attention"
SCORES = "its scores are not one product, scaled, masked and put through one softmax"
CODE: Mapping[str, tuple[str, str, str, Callable[[fx.Node], Any], str]] = {
    "dropout": ("qwen3_moe", SDPA, "kwargs", lambda n: {**n.kwargs, "dropout_p": 0.1}, SCORES),
    "causal": ("qwen3_moe", SDPA, "kwargs", lambda n: {**n.kwargs, "is_causal": True}, SCORES),
    "no softmax": ("gpt_oss", "softmax", "target", lambda n: torch.neg, SCORES),
    "tanh": ("qwen3_moe", "rsqrt", "target", lambda n: torch.tanh, "it calls tanh, which is no part of gqa"),
    "a mask": ("qwen3_moe", "ragged_mask", "target", lambda n: torch.relu, "its mask is not proven causal"),
    "zeros": ("gpt_oss", "masked_fill", "args", lambda n: (*n.args[:2], 0.0), "its mask is not proven causal"),
}
"""Model, name of a node's function, and what of the node is another."""


@pytest.mark.parametrize("case", CODE)
def test_other_code(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, attribute, change, why = CODE[case]
    given = site(name)
    nodes = (*given.nodes, *captured(name, "decode").graph.nodes)
    node = next(n for n in nodes if str(getattr(n.target, "__name__", n.target)).split(".")[0] == function)
    monkeypatch.setattr(node, attribute, change(node))
    assert why_not(given) == f"not gqa: {why}"


def whys(plain: Plain) -> set[str]:
    _, ctx = rewritten(plain.gm, GPU, Fold())
    return {n.why for n in ctx.notes if n.path.endswith("self_attn")}


def test_other_caches() -> None:
    """Hugging Face's own, and ours in rectangular use."""
    (why,) = whys(captured_user("qwen3_moe"))
    assert why.startswith("not gqa: it does not write a PagedCache (kernels need its pages;")
    model = real("qwen3_moe")
    given = tiny.ids(2, 5) % model.config.vocab_size, PagedCache(model.config, requests=2, context=32)
    plain = _recorded(lambda ids, cache: model(ids, past_key_values=cache).logits, given, "", "prefill", model)
    assert whys(plain) == {"not gqa: the cache is not ragged (rectangular batches run the captured code)"}


def test_a_boolean_mask_in_eager_code() -> None:
    """It is added to the scores as 0 and 1: not what a mask is."""
    assert whys(captured_plain("gpt_oss")) == {f"not gqa: {SCORES}"}


def _reshaped(**changes: Any) -> Callable[[Binding], Binding]:
    return lambda binding: replace(binding, shape=replace(binding.shape, **changes))


def _swapped(a: str, b: str) -> Callable[[Binding], Binding]:
    return lambda binding: replace(binding, roles={**binding.roles, a: binding.roles[b], b: binding.roles[a]})


WRONG: Mapping[str, tuple[str, Callable[[Binding], Binding]]] = {
    "pairs": ("glm4_moe", _reshaped(interleaved=True)),
    "scale": ("qwen3_moe", _reshaped(scale=0.3)),
    "eps": ("qwen3_moe", _reshaped(eps=0.1)),
    "cos and sin": ("qwen3_moe", _swapped("cos", "sin")),
    "rope": ("qwen3_moe", _reshaped(rope=8)),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_bindings_are_found(wrong: str, phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = WRONG[wrong]
    region = attention(name, phase)[0][0]
    monkeypatch.setitem(region.node.meta, "binding", change(region.binding))
    assert str(wrong_binding(region)).startswith("not gqa: on random inputs its captured code differs from the op by ")


# ------------------------------------------------------------------------------------------------ properties

STEPS = st.lists(st.tuples(st.sampled_from([0, 1, 15, 16, 33]), st.integers(0, 9)), min_size=1, max_size=3)
HEADS = st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)])


def some(heads: tuple[int, int], window: int | None) -> GQAShape:
    return GQAShape(*heads, dim=8, rope=4, scale=0.4, interleaved=False, eps=1e-6, window=window)


@given(requests=STEPS, heads=HEADS, window=st.none() | st.integers(1, 20), seed=st.integers(0, 99))
def test_attention_is_torchs(
    requests: list[tuple[int, int]], heads: tuple[int, int], window: int | None, seed: int
) -> None:
    """Each request alone, through torch's own attention with a mask, whatever lies in slots that are not its."""
    torch.manual_seed(seed)
    shape = some(heads, window)
    width = 2 * shape.kv_heads * shape.dim
    step = make_step(requests, width, 4, padding=seed % 3, spare=seed % 2)
    append_reference(*step.cache, torch.randn(step.tokens, width))
    query = torch.randn(step.tokens, shape.heads, shape.dim)
    got = attend_reference(query, *step.cache, shape)
    for r, (stored, count) in enumerate(requests):
        rows = step.pool[step.page_table[r].long()].flatten(0, 1)[: stored + count]
        keys, values = rows.view(-1, 2, shape.kv_heads, shape.dim).permute(1, 2, 0, 3)
        past = torch.arange(count)[:, None] + stored - torch.arange(stored + count)
        seen = (past >= 0) & (past < (window or 1 << 30))
        mine = slice(int(step.query_start[r]), int(step.query_start[r + 1]))
        args = query[mine].transpose(0, 1), keys, values
        want = functional.scaled_dot_product_attention(*args, attn_mask=seen, scale=shape.scale, enable_gqa=True)
        torch.testing.assert_close(got[mine], want.transpose(0, 1))
    assert not got[step.query_start[-1] :].any()


@given(heads=HEADS, seed=st.integers(0, 99))
def test_a_sink_is_a_key_without_a_value(heads: tuple[int, int], seed: int) -> None:
    """As much of every result is lost as the sink's share of its softmax; one of minus infinity takes nothing."""
    torch.manual_seed(seed)
    shape = some(heads, None)
    width = 2 * shape.kv_heads * shape.dim
    step = make_step([(5, 3)], width, 4)
    append_reference(*step.cache, torch.randn(step.tokens, width))
    query, sinks = torch.randn(step.tokens, shape.heads, shape.dim), torch.randn(shape.heads)
    without = attend_reference(query, *step.cache, shape)
    none = torch.full((shape.heads,), float("-inf"))
    torch.testing.assert_close(attend_reference(query, *step.cache, shape, none), without)
    ratio = attend_reference(query, *step.cache, shape, sinks) / without
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-3, atol=1e-5)
    assert (ratio > 0).all() and (ratio < 1).all()


@given(interleaved=st.booleans(), seed=st.integers(0, 99))
def test_rotation_keeps_lengths_and_sees_distances(interleaved: bool, seed: int) -> None:
    """A product of a query and a key depends on how far apart they are; what is not turned stays."""
    torch.manual_seed(seed)
    shape = replace(some((1, 1), None), interleaved=interleaved)
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    speed = torch.tensor([1.0, 0.1])

    def at(x: Tensor, position: int) -> Tensor:
        angle = (position * speed).repeat(2)[None]
        return rotate_reference(x, angle.cos(), angle.sin(), shape)

    turned = at(query, 7)
    torch.testing.assert_close(turned.norm(), query.norm())
    assert torch.equal(turned[..., 4:], query[..., 4:]) and not torch.equal(turned[..., :4], query[..., :4])
    torch.testing.assert_close((at(query, 7) * at(key, 3)).sum(), (at(query, 14) * at(key, 10)).sum())
