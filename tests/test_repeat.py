"""Layers that are copied instead of traced give the graph that tracing all of them gives."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from torch import fx
from transformers import PretrainedConfig

from ktcompile.capture import empty_model
from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.layers import UNIFORM, NotEqual, layers_of, repeat
from ktcompile.model import PHASES, Phase, capture_phase, explain, settings_for
from ktcompile.target import Target, detect, fake

LAYERS = 7
CHANGES: Mapping[str, Mapping[str, object]] = {
    "deepseek_v3": {"first_k_dense_replace": 2},
    "mixtral": {"sliding_window": 16},
    "gpt_oss": {"layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(LAYERS)]},
    "qwen3_moe": {"mlp_only_layers": [3]},
}


def configuration(family: str) -> PretrainedConfig:
    return tiny.config(family, num_hidden_layers=LAYERS, **CHANGES.get(family, {}))


def checkpoint(config: PretrainedConfig) -> Checkpoint:
    embedded = open_checkpoint()
    return Checkpoint("tiny", "tiny", config, None, embedded.generation, embedded.load_tokenizer)


def canonical(gm: fx.GraphModule) -> list[object]:
    """The nodes in order, each by its target, its place in the model, and the numbers of the nodes that it reads."""
    number: dict[fx.Node, object] = {}
    out: list[object] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            number[node] = tuple(str(node.meta.get(k)) for k in ("weight", "input", "size_of", "state"))
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: fx.Proxy(n))
        text = torch.utils._pytree.tree_map(
            lambda a: number[a.node] if isinstance(a, fx.Proxy) else repr(a), (args, kwargs)
        )
        number[node] = len(out)
        value = node.meta["val"]
        kind = (str(value.dtype), str(tuple(value.shape))) if isinstance(value, torch.Tensor) else str(value)
        out.append((node.op, str(node.target), text, node.meta["stack"], kind))
    return out


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("family", sorted(UNIFORM))
def test_the_graph_is_that_of_tracing_everything(family: str, phase: Phase) -> None:
    config = configuration(family)
    source = checkpoint(config)
    settings = settings_for(source, target=Target((detect().host,)), context=64)
    model = empty_model(config, torch.float32)
    layers = layers_of(model)
    assert layers is not None and layers.traced < LAYERS, "nothing was repeated"
    graphs = [capture_phase(model, phase, settings, source, repeated=again) for again in (False, True)]
    whole, copied = map(canonical, graphs)
    assert whole == copied
    names = [
        {str(n.meta.get("weight", n.meta.get("input"))) for n in g.graph.nodes if n.op == "placeholder"} for g in graphs
    ]
    assert names[0] == names[1]
    assert len(model.get_submodule(layers.path)) == LAYERS, "the model is whole again"


def test_layers_that_differ_are_traced() -> None:
    config = configuration("qwen3_moe")
    layers = layers_of(empty_model(config, torch.float32))
    assert layers is not None and layers.traced == 4 and layers.like[3] == 3, "layer 3 has no experts"
    other = empty_model(tiny.config("qwen3_moe", num_hidden_layers=LAYERS), torch.float32)
    other.model.layers[5].self_attn.scaling = 2.0
    found = layers_of(other)
    assert found is not None and found.traced == 6, "layer 5 has another attribute"


def test_neighbours_are_never_copies_of_one_layer() -> None:
    """Their storages would be taken for one."""
    for family in UNIFORM:
        layers = layers_of(empty_model(configuration(family), torch.float32))
        assert layers is not None
        assert all(a != b for a, b in zip(layers.like, layers.like[1:], strict=False))


def test_what_is_no_chain_is_refused() -> None:
    config = configuration("deepseek_v3")
    model = empty_model(config, torch.float32)
    layers = layers_of(model)
    source = checkpoint(config)
    settings = settings_for(source, target=Target((detect().host,)), context=64)
    gm = capture_phase(model, "decode", settings, source, repeated=False)
    assert layers is not None
    inner = next(
        n
        for n in gm.graph.nodes
        if any(p == f"{layers.path}.1.mlp" for p, _ in n.meta.get("stack", ())) and n.op == "call_function"
    )
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], inner),)
    with pytest.raises(NotEqual, match="2 of its values are used outside"):
        repeat(gm, layers)


def test_unknown_families_are_traced_whole() -> None:
    model = empty_model(configuration("qwen3_moe"), torch.float32)
    model.config.model_type = "another"
    assert layers_of(model) is None


def test_the_671b_plan_is_quick() -> None:
    """61 layers are planned in seconds because five are traced."""
    source = open_checkpoint(Path(__file__).parent / "data" / "deepseek-v3-671b")
    layers = layers_of(empty_model(source.config, torch.bfloat16))
    assert layers is not None and layers.traced == 5 and len(layers.like) == 61
    plan = explain(source, settings_for(source, target=fake()), encoding="q4_k_m", every=False)[-1]
    assert sum(r.op == "moe" for r in plan.rows) == 58
