"""`torch.compile(model, backend="ktrans")` on plain Hugging Face models against the same models run eagerly."""

import gc
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest
import tiny
import torch
from tolerances import CHAIN
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ktcompile import KtransError, RulesError, dynamo
from ktcompile.backends.cpu_moe import CpuMoe
from ktcompile.target import fake

C_KERNELS = {"amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "scalar"}
CLOSE = 1e-5
"""Relative L2 error of fp32 logits."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No graph, plan or packed weight of another test."""
    torch.compiler.reset()
    dynamo.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()
    dynamo.reset()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[weakref.ref[Tensor]]]]:
    """(region path, packed tensors) of every `moe` region, in order of packing."""
    made: list[tuple[str, list[weakref.ref[Tensor]]]] = []
    pack = CpuMoe.pack

    def counting(self: CpuMoe, parts: Any, region: Any, target: Any) -> Any:
        out = pack(self, parts, region, target)
        made.append((region.path, [weakref.ref(t) for t in out.tensors.values()]))
        return out

    monkeypatch.setattr(CpuMoe, "pack", counting)
    return made


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The expert ids of every call of a C kernel, sorted: a sum has no order."""
    seen: list[Tensor] = []
    call = CpuMoe.__call__

    def recording(self: CpuMoe, packed: Any, region: Any, *inputs: Any) -> Tensor:
        seen.append(inputs[1].sort(-1).values)
        return call(self, packed, region, *inputs)

    monkeypatch.setattr(CpuMoe, "__call__", recording)
    return seen


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def compiled(model: PreTrainedModel, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="ktrans", fullgraph=True, options=options or None)


def moe_kernels() -> list[str]:
    return [row.kernel for plan in dynamo.plans() for row in plan.rows if row.op in ("moe", "experts")]


# ------------------------------------------------------------------------------------------------ the same numbers


def dynamic(config: PretrainedConfig) -> Cache:
    return DynamicCache(config=config)


def static(config: PretrainedConfig) -> Cache:
    return tiny.static_cache(config, 40)


@pytest.mark.parametrize("new_cache", [dynamic, static])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_and_decode(family: str, new_cache: Callable[[PretrainedConfig], Cache], packed: list[Any]) -> None:
    """Logits of a prefill and 16 decode steps; few graphs, the C kernel in each, one packed copy for all."""
    model = tiny.model(family)
    fast = compiled(model)
    wanted_cache, got_cache = new_cache(model.config), new_cache(model.config)
    ids = tiny.ids(1, 11)
    for _ in range(17):
        wanted = model(ids, past_key_values=wanted_cache).logits
        got = fast(ids, past_key_values=got_cache).logits
        assert error(got, wanted) <= CLOSE
        ids = wanted[:, -1:].argmax(-1)
    plans = dynamo.plans()
    assert len(plans) <= 6
    assert {p.phase for p in plans} == {"prefill", "decode"}
    layers = sum(".experts." in name for name, _ in model.named_parameters()) // 2
    assert len(moe_kernels()) == layers * len(plans)
    assert set(moe_kernels()) <= C_KERNELS
    assert all(kernel in plan.text() for plan in plans for kernel in moe_kernels())
    assert Counter(path for path, _ in packed) == dict.fromkeys((path for path, _ in packed), 1)
    assert len(packed) == layers


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generate_padded(family: str) -> None:
    """`model.compile` and `generate`, batch 2 with left padding: the eager model's tokens, from compiled graphs."""
    model = tiny.model(family)
    ids = tiny.ids(2, 9)
    ids[0, :4] = 0
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(**given)
    model.compile(backend="ktrans", fullgraph=True)
    assert torch.equal(model.generate(**given), wanted)
    assert {p.phase for p in dynamo.plans()} == {"prefill", "decode"}
    assert set(moe_kernels()) <= C_KERNELS


def test_generate_static() -> None:
    model = tiny.model("qwen3_moe")
    given = {"input_ids": tiny.ids(1, 9), "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(**given)
    model.compile(backend="ktrans", fullgraph=True)
    assert torch.equal(model.generate(**given, cache_implementation="static"), wanted)
    assert len(dynamo.plans()) == 2


def test_bf16() -> None:
    """In the model's own type, and nearer to float32 than Hugging Face's bf16, which rounds in more places.

    Of most tokens, that is: of some either takes another expert.
    """
    model = tiny.model("deepseek_v3", dtype=torch.bfloat16)
    ids = tiny.ids(2, 16)
    got, own = compiled(model)(ids).logits, model(ids).logits
    wanted = tiny.model("deepseek_v3", dtype=torch.bfloat16).float()(ids).logits
    assert got.dtype == own.dtype == torch.bfloat16
    near, far = (median(map(error, logits.flatten(0, 1), wanted.flatten(0, 1))) for logits in (got, own))
    assert near <= min(far, CHAIN["bf16"])
    assert set(moe_kernels()) <= C_KERNELS


def test_found_by_name() -> None:
    """The backend needs no import of ktcompile."""
    code = (
        "import sys, torch, transformers as t\n"
        "torch.set_num_threads(1)\n"
        "c = t.MixtralConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,\n"
        "                    head_dim=8, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)\n"
        "m = t.AutoModelForCausalLM.from_config(c).eval()\n"
        "x = torch.arange(5)[None]\n"
        "assert 'ktcompile' not in sys.modules and 'ktrans' in torch.compiler.list_backends()\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(torch.compile(m, backend='ktrans')(x).logits, m(x).logits)\n"
        "assert len(sys.modules['ktcompile.dynamo'].plans()) == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ fewer experts


def eager_routing(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the sorted expert ids of every layer, of the eager model."""
    seen: list[Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[1].sort(-1).values))
        for name, m in model.named_modules()
        if name.endswith(".experts")
    ]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_six_experts_by_choice(family: str, routed: list[Tensor]) -> None:
    """The experts and the logits of Hugging Face's `num_experts_per_tok=6`, under a correction bias too."""
    model, six = tiny.model(family), tiny.model(family, num_experts_per_tok=6)
    ids = tiny.ids(2, 24)
    wanted, wanted_ids = eager_routing(six, ids)
    got = compiled(model, experts=6)(ids).logits
    assert len(routed) == len(wanted_ids) > 0
    assert all(torch.equal(a, b) for a, b in zip(routed, wanted_ids, strict=True))
    assert error(got, wanted) <= CLOSE
    assert error(got, model(ids).logits) > 1e-3


def test_six_experts_by_weight(routed: list[Tensor]) -> None:
    """Of the eight chosen, the six with the largest scores, whose sum stays. Not `choice` where a bias chooses."""
    model = tiny.model("deepseek_v3")
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.std() > 0.1
    ids = tiny.ids(1, 24)
    by_choice = compiled(model, experts=6)(ids).logits
    chosen = list(routed)
    routed.clear()
    got = compiled(model, experts=6, ranking="weight")(ids).logits
    assert not torch.equal(routed[0], chosen[0])

    def drop(_: Any, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, experts, scores = args
        order = scores.argsort(-1, descending=True)[:, :6]
        kept = scores.gather(-1, order)
        return hidden, experts.gather(-1, order), kept / kept.sum(-1, keepdim=True) * scores.sum(-1, keepdim=True)

    model.model.layers[1].mlp.experts.register_forward_pre_hook(drop)
    wanted = model(ids).logits
    assert error(got, wanted) <= CLOSE
    assert error(got, by_choice) > 1e-3


# ------------------------------------------------------------------------------------------------ weights


def change_in_place(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.9)


def change_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def replace_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def load_other(model: PreTrainedModel) -> None:
    model.load_state_dict(tiny.model("qwen3_moe", seed=1).state_dict())


def assign_other(model: PreTrainedModel) -> None:
    model.load_state_dict(tiny.model("qwen3_moe", seed=1).state_dict(), assign=True)


def train(model: PreTrainedModel) -> None:
    """One step of an optimiser; the gradient is the eager model's."""
    with torch.enable_grad():
        model(tiny.ids(1, 8)).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()


@pytest.mark.parametrize("change", [change_in_place, change_data, replace_data, load_other, assign_other, train])
def test_changed_weights(change: Callable[[PreTrainedModel], None], packed: list[Any]) -> None:
    """Weights written in any way are packed again; nothing is where they were not."""
    model = tiny.model("qwen3_moe")
    fast = compiled(model)
    ids = tiny.ids(1, 7)
    before = fast(ids).logits
    change(model)
    wanted = model(ids).logits
    assert error(wanted, before) > 1e-3
    assert error(fast(ids).logits, wanted) <= CLOSE
    assert error(fast(ids).logits, wanted) <= CLOSE
    assert len(packed) == 2 * 2


def test_replaced_parameter(packed: list[Any]) -> None:
    """A matrix replaced again and again: never the old one, and only the last is held."""
    model = tiny.model("qwen3_moe", num_hidden_layers=1)
    fast = compiled(model)
    experts = model.model.layers[0].mlp.experts
    ids = tiny.ids(1, 7)
    for _ in range(4):
        experts.down_proj = torch.nn.Parameter(torch.randn_like(experts.down_proj))
        assert error(fast(ids).logits, model(ids).logits) <= CLOSE
    gc.collect()
    assert [any(t() is not None for t in tensors) for _, tensors in packed] == [False, False, False, True]


def test_freed(packed: list[Any]) -> None:
    """Packed copies go with the model."""
    model = tiny.model("qwen3_moe")
    fast = compiled(model)
    fast(tiny.ids(1, 7))
    weight = weakref.ref(model.model.layers[0].mlp.experts.gate_up_proj)
    tensors = [t for _, ts in packed for t in ts]
    assert len(tensors) == 6
    assert all(t() is not None for t in tensors)
    del model, fast
    gc.collect()
    assert weight() is None
    assert all(t() is None for t in tensors)


def test_two_models() -> None:
    """Two models of one class take turns, also in graphs that they share."""
    models = [tiny.model("qwen3_moe", seed=s) for s in (0, 1)]
    both = [compiled(m) for m in models]
    for tokens in (11, 5, 1):
        ids = tiny.ids(1, tokens)
        for model, fast in zip(models, both, strict=True):
            assert error(fast(ids).logits, model(ids).logits) <= CLOSE


def test_inference_tensors() -> None:
    """A model made under inference_mode, whose tensors count no writes."""
    with torch.inference_mode():
        model = tiny.model("qwen3_moe", num_hidden_layers=1)
        fast, ids = compiled(model), tiny.ids(1, 7)
        assert error(fast(ids).logits, model(ids).logits) <= CLOSE
        model.model.layers[0].mlp.experts.gate_up_proj.mul_(2)
        assert error(fast(ids).logits, model(ids).logits) <= CLOSE


def test_no_backward() -> None:
    """Kernels have no backward: asking for one fails rather than giving a part of the gradient."""
    model = tiny.model("qwen3_moe", num_hidden_layers=1)
    with torch.enable_grad():
        loss = compiled(model)(tiny.ids(1, 7)).logits.sum()
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss.backward()


# ------------------------------------------------------------------------------------------------ refusals


def refused(call: Callable[[], Any]) -> BaseException:
    """The error of ours that dynamo wrapped."""
    with pytest.raises(BackendCompilerFailed) as caught:
        call()
    return caught.value.inner_exception


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"expert": 6}, "no option 'expert'; did you mean 'experts'?"),
        ({"experts": 0}, "keep = 0"),
        ({"experts": 6, "ranking": "wait"}, "ranking"),
        ({"rules": "bass"}, "did you mean 'base'?"),
        ({"target": "cpu"}, "option target is a str; wanted a ktcompile.Target"),
    ],
)
def test_wrong_options(options: dict[str, Any], told: str) -> None:
    model = tiny.model("qwen3_moe", num_hidden_layers=1)
    found = refused(lambda: compiled(model, **options)(tiny.ids(1, 7)))
    assert isinstance(found, RulesError)
    assert told in str(found)


def test_eager_experts() -> None:
    """The `eager` experts implementation cannot be one graph: an error either way, no half compiled model."""
    model = tiny.model("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation("eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="expert"):
        compiled(model)(tiny.ids(1, 7))
    torch.compiler.reset()
    assert isinstance(refused(lambda: torch.compile(model, backend="ktrans")(tiny.ids(1, 7))), KtransError)


@pytest.mark.parametrize("families", [("qwen3_moe", "qwen3_moe"), ("qwen3_moe", "mixtral")])
def test_recompile_limit(families: tuple[str, str]) -> None:
    """Before dynamo would run anything eagerly in silence there is an error. Its limit counts all models together."""
    models = [tiny.model(f, num_hidden_layers=1) for f in families]
    both = [torch.compile(m, backend="ktrans", dynamic=False) for m in models[: len(set(families))]]
    with torch._dynamo.config.patch(recompile_limit=4):
        for tokens in range(2, 5):
            both[tokens % len(both)](tiny.ids(1, tokens))
        found = refused(lambda: both[5 % len(both)](tiny.ids(1, 5)))
        again = refused(lambda: both[6 % len(both)](tiny.ids(1, 6)))
    assert len(dynamo.plans()) == 3
    for caught in (found, again):
        assert isinstance(caught, KtransError)
        assert "torch's limit is 4" in str(caught)
        assert "ktcompile.load" in str(caught)


def test_other_target() -> None:
    """A Target as an option, with a kernel for the CPU that it describes."""
    model = tiny.model("qwen3_moe", num_hidden_layers=1)
    target = fake(None, "1G")
    ids = tiny.ids(1, 7)
    assert error(compiled(model, target=target, name="mine")(ids).logits, model(ids).logits) <= CLOSE
    assert dynamo.plans()[0].model == "mine"
    assert dynamo.plans()[0].uses[0].capacity == target.main.capacity
