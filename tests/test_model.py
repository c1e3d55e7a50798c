"""`ktcompile.load` end to end, against results of transformers and llama.cpp (tests/data/expected.json)."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from heldout import DATA, EXPECTED, perplexity, row
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from ktcompile import CapacityError, KtransError, ModelFileError, RulesError
from ktcompile.backends import native
from ktcompile.checkpoint import open_checkpoint
from ktcompile.model import load
from ktcompile.runtime import Executable, Store

PROMPTS = {name: prompt["ids"] for name, prompt in EXPECTED["prompts"].items()}
FP8 = EXPECTED["tiny-deepseek-v3 (FP8, dequantised to fp32, top-8), transformers"]
LLAMA = EXPECTED["tiny-deepseek-v3-Q4_K_M.gguf, llama.cpp"]
GGUF_HF = EXPECTED["tiny-deepseek-v3-Q4_K_M.gguf, weights dequantised, transformers fp32"]
FEWER = {6: 9.3841, 4: 10.5951}
"""transformers' perplexity of the FP8 model with num_experts_per_tok = 6 and 4."""

EOS = 1


@pytest.fixture(scope="module")
def packings() -> list[tuple[str, int, int]]:
    """(region path, bytes that its kernel announced, bytes that it packed) of every region of `gguf`."""
    return []


@pytest.fixture(scope="module")
def gguf(packings: list[tuple[str, int, int]]) -> PreTrainedModel:
    """The embedded model."""
    get = Store.get

    def noting(self: Store, region: Any, *rest: Any) -> Any:
        packed = get(self, region, *rest)
        packings.append((region.path, int(region.node.meta["packed_bytes"]), packed.nbytes))
        return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "get", noting)
        return load()


@pytest.fixture(scope="module")
def fp8() -> PreTrainedModel:
    return load(DATA / "tiny-deepseek-v3")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return open_checkpoint().tokenizer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phase of every call of an Executable."""
    seen: list[str] = []
    run = Executable.__call__

    def counting(self: Executable, values: Any) -> Any:
        seen.append(self.plan.phase)
        return run(self, values)

    monkeypatch.setattr(Executable, "__call__", counting)
    return seen


def greedy(model: PreTrainedModel, ids: Sequence[int]) -> list[int]:
    """Up to 64 new tokens, the end token kept."""
    out = model.generate(row(ids), max_new_tokens=64, do_sample=False, eos_token_id=EOS)
    return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def forced(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Log-probability of each of `tokens` after the prompt and those before it."""
    logits = model(row([*prompt, *tokens]), logits_to_keep=len(tokens) + 1).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------ right answers


def test_paris(gguf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    out = gguf.generate(ids, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_fp8(fp8: PreTrainedModel, prompt: str) -> None:
    """The tokens of transformers in fp32, and their log-probabilities."""
    wanted = FP8["greedy"][prompt]
    assert greedy(fp8, PROMPTS[prompt]) == wanted["tokens"]
    off = forced(fp8, PROMPTS[prompt], wanted["tokens"]) - torch.tensor(wanted["logprobs"])
    assert off.abs().mean() < 1e-3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_gguf(gguf: PreTrainedModel, prompt: str) -> None:
    """llama.cpp's tokens up to the first step that was nearly another, and its log-probabilities throughout."""
    wanted = LLAMA["greedy"][prompt]
    sure = next((i for i, m in enumerate(wanted["margins"]) if m < 0.1), len(wanted["tokens"]))
    assert greedy(gguf, PROMPTS[prompt])[:sure] == wanted["tokens"][:sure]
    off = forced(gguf, PROMPTS[prompt], wanted["tokens"]) - torch.tensor(wanted["logprobs"])
    assert off.abs().mean() < 0.05


def test_perplexity_fp8(fp8: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert perplexity(fp8, tokenizer) == pytest.approx(FP8["perplexity_heldout"], rel=1e-3)


def test_perplexity_gguf(gguf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    found = perplexity(gguf, tokenizer)
    assert found == pytest.approx(GGUF_HF["perplexity_heldout"], rel=1e-3)
    assert found == pytest.approx(LLAMA["perplexity_heldout"], rel=5e-3)


@pytest.mark.parametrize("experts", FEWER)
def test_fewer_experts(experts: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """The perplexity of transformers with so many experts a token."""
    model = load(DATA / "tiny-deepseek-v3", experts=experts)
    assert perplexity(model, tokenizer) == pytest.approx(FEWER[experts], rel=1e-3)


def test_bf16() -> None:
    """In bf16 experts run on the best unit that this CPU has; log-probabilities stay near those of fp32."""
    model = load(DATA / "tiny-deepseek-v3", dtype="bf16")
    here = native.isas()
    best = next(isa for isa in ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "scalar") if here[isa] is None)
    assert {r.kernel for plan in model.plans.values() for r in plan.rows if r.op == "moe"} == {best}
    off = torch.cat(
        [
            forced(model, ids, FP8["greedy"][name]["tokens"]) - torch.tensor(FP8["greedy"][name]["logprobs"])
            for name, ids in PROMPTS.items()
        ]
    )
    assert off.abs().mean() < 0.05


def test_bf16_takes_the_tokens_of_fp32(gguf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """At 99 of 100 places: what `benchmarks/gpu_check.py` asks of a GPU, on all of this text."""
    narrow, same, errors = load(dtype="bf16"), [], []
    ids = tokenizer((DATA / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    for at in range(0, 3072, 512):
        want, got = (model(row(ids[at : at + 512])).logits[0] for model in (gguf, narrow))
        assert want.dtype == got.dtype == torch.float32
        same.append(want.argmax(-1) == got.argmax(-1))
        errors.append((got - want).norm(dim=-1) / want.norm(dim=-1))
    assert torch.cat(same).float().mean() >= 0.99 and torch.cat(errors).median() <= 1e-2


# ------------------------------------------------------------------------------------------------ every way to call


def test_padded_batch(gguf: PreTrainedModel, calls: list[str]) -> None:
    """Three prompts of other lengths, left-padded, as three conversations of their own."""
    prompts = list(PROMPTS.values())
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = gguf.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert len(calls) == 24
    alone = [gguf.generate(row(p), max_new_tokens=24, do_sample=False, eos_token_id=None)[0, len(p) :] for p in prompts]
    assert torch.equal(out[:, width:], torch.stack(alone))


def test_right_padding(gguf: PreTrainedModel) -> None:
    """Logits at real tokens do not depend on the side of the padding."""
    ids = PROMPTS["chat_story"]
    wanted = gguf(row(ids)).logits
    padded = gguf(
        torch.tensor([ids + [2] * 3, [2] * 3 + ids]),
        attention_mask=torch.tensor([[1] * len(ids) + [0] * 3, [0] * 3 + [1] * len(ids)]),
    ).logits
    torch.testing.assert_close(padded[0, :-3], wanted[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(padded[1, 3:], wanted[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 5, 16, 23])
def test_chunks(gguf: PreTrainedModel, cut: int) -> None:
    """Two calls with the cache are one call."""
    ids = row(PROMPTS["fim_total"])
    whole = gguf(ids).logits
    first = gguf(ids[:, :cut])
    second = gguf(ids[:, cut:], past_key_values=first.past_key_values)
    assert second.past_key_values is first.past_key_values
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-4)


def test_any_length(gguf: PreTrainedModel, calls: list[str]) -> None:
    """Two graphs do for every length and batch: dynamo compiles nothing more."""
    torch._dynamo.utils.counters.clear()
    lengths = [1, 2, 3, 15, 16, 17, 33, 100]
    for n in lengths:
        assert gguf(torch.full((1, n), 9)).logits.shape == (1, n, gguf.config.vocab_size)
    assert gguf(torch.full((5, 7), 9)).logits.shape == (5, 7, gguf.config.vocab_size)
    assert calls == ["decode"] + ["prefill"] * len(lengths)
    assert not torch._dynamo.utils.counters["stats"]


def test_logits_to_keep(gguf: PreTrainedModel) -> None:
    ids = row(PROMPTS["chat_story"])
    whole = gguf(ids).logits
    torch.testing.assert_close(gguf(ids, logits_to_keep=1).logits, whole[:, -1:], rtol=0, atol=1e-4)
    picked = gguf(ids, logits_to_keep=torch.tensor([2, 0])).logits
    torch.testing.assert_close(picked, whole[:, [2, 0]], rtol=0, atol=1e-4)
    torch.testing.assert_close(gguf(input_ids=ids, use_cache=False).logits, whole)
    assert gguf(ids, use_cache=False).past_key_values is None


def test_compiled_again(gguf: PreTrainedModel, calls: list[str]) -> None:
    """`torch.compile` of what `load` returned changes nothing: calls and `generate` run compiled."""
    ids = row(PROMPTS["chat_story"])
    again = torch.compile(gguf, backend="ktrans")
    torch.testing.assert_close(again(ids).logits, gguf(ids).logits)
    assert calls == ["prefill", "prefill"]
    calls.clear()
    out = again.generate(ids, max_new_tokens=5, do_sample=False)
    assert calls == ["prefill", *["decode"] * 4]
    assert out[0, ids.shape[1] :].tolist() == LLAMA["greedy"]["chat_story"]["tokens"][:5]


def test_sampling(gguf: PreTrainedModel) -> None:
    """A seed decides; another one samples something else."""
    ids = row(PROMPTS["chat_story"])

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        out: list[int] = gguf.generate(ids, max_new_tokens=24, do_sample=True, temperature=1.0)[0].tolist()
        return out

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_two_conversations(gguf: PreTrainedModel) -> None:
    """Two caches of one model keep apart, also when they take turns."""
    prompts = [PROMPTS["chat_story"], PROMPTS["chat_code"]]
    wanted = [gguf(row(p)).logits[0, -1] for p in prompts]
    caches = [gguf.new_cache(), gguf.new_cache()]
    for step in range(max(map(len, prompts))):
        for p, cache, last in zip(prompts, caches, wanted, strict=True):
            if step < len(p):
                got = gguf(row(p[step : step + 1]), past_key_values=cache).logits[0, -1]
            if step == len(p) - 1:
                torch.testing.assert_close(got, last, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ memory and refusals


def test_bytes(gguf: PreTrainedModel, fp8: PreTrainedModel) -> None:
    """What a plan says is what is held on each device, to the byte."""
    for model in (gguf, fp8):
        for plan in model.plans.values():
            assert model.store.nbytes == {use.device: use.weights for use in plan.uses}


def test_packed_bytes(gguf: PreTrainedModel, packings: list[tuple[str, int, int]]) -> None:
    """Every region's `packed_bytes` is what its kernel's pack made."""
    assert [p for p in packings if p[1] != p[2]] == []
    assert len(packings) == sum(len(plan.rows) for plan in gguf.plans.values())


def test_cache_full() -> None:
    """A request past its context is refused before anything is computed, and the cache stays as it was."""
    model = load(context=16)
    cache = model.new_cache()
    model(row(range(10)), past_key_values=cache)
    with pytest.raises(CapacityError, match=r"request 0 has 10 tokens and brings 7; the cache holds 16 a request"):
        model(row(range(7)), past_key_values=cache)
    assert model(row(range(6)), past_key_values=cache).logits.shape[1] == 6
    with pytest.raises(CapacityError, match="17"):
        model(row(range(17)))
    with pytest.raises(CapacityError, match="16 tokens"):
        model.generate(row(range(10)), max_new_tokens=20, do_sample=False, eos_token_id=None)


def test_foreign_cache(gguf: PreTrainedModel) -> None:
    """An empty DynamicCache is replaced by one that works; one with tokens in it cannot be."""
    ids = row(PROMPTS["chat_story"])
    out = gguf(ids, past_key_values=DynamicCache(config=gguf.config))
    assert type(out.past_key_values).__name__ == "PagedCache"
    torch.testing.assert_close(out.logits, gguf(ids).logits)
    full = DynamicCache(config=gguf.config)
    for layer in range(gguf.config.num_hidden_layers):
        full.update(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), layer)
    with pytest.raises(KtransError, match="not in a DynamicCache"):
        gguf(ids, past_key_values=full)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 256)}, "got inputs_embeds"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.int64), "output_attentions": True}, "got output_attentions"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.int64), "labels": torch.zeros(1, 2)}, "got labels"),
        ({}, "no input_ids"),
        ({"input_ids": row([1, 2]), "attention_mask": torch.ones(1, 1, 2, 2)}, r"\[batch, tokens\]"),
    ],
)
def test_wrong_arguments(gguf: PreTrainedModel, given: dict[str, Any], told: str) -> None:
    with pytest.raises(KtransError, match=told):
        gguf(**given)


def test_wrong_batch(gguf: PreTrainedModel) -> None:
    with pytest.raises(KtransError, match="the cache holds 2 requests, the input has 1 rows"):
        gguf(row([1, 2]), past_key_values=gguf.new_cache(2))


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: load("/nowhere"), ModelFileError, "/nowhere"),
        (lambda: load(DATA / "deepseek-v3-671b"), RulesError, "no weights"),
        (lambda: load(dtype="fp16"), RulesError, "fp16"),
        (lambda: load(context=0), RulesError, "context 0"),
        (lambda: load(context=10**9), RulesError, "context 1000000000"),
        (lambda: load(experts=0), RulesError, "keep = 0"),
        (lambda: load(experts=6, ranking="wait"), RulesError, "wait"),
        (lambda: load(ranking="weight"), RulesError, "ranking"),
        (lambda: load(rules="deepseek"), RulesError, "deepseek-v3"),
        (lambda: load(rules=5), RulesError, "rules 5: a file's path, or the name"),  # type: ignore[arg-type]
    ],
)
def test_wrong_load(call: Callable[[], Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        call()
