"""The engine over the embedded model, on the CPU: what is said is what `Session` and `generate` say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import Tokens, check
from heldout import DATA
from test_families import HOST
from test_families import opened as opened_family

from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.engine import Engine
from ktcompile.generate import Session, encode_chat, stop_tokens
from ktcompile.model import load
from ktcompile.request import Request
from ktcompile.sampling import Sampling

CONTEXT = 1024
GREEDY = Sampling(0.0, seed=0)
ASKED = (
    "What is the capital of France?",
    "Tell me a story about a dog named Max.",
    "Hi",
    "Write a Python function that adds two numbers.",
    "Tell me a story about a girl named Lily and a boat. It should be long, and there should be rain in it.",
    "What is the capital of Japan?",
    "Tell me a joke.",
    "Write a Python function that reverses a string.",
)


@pytest.fixture(scope="module")
def opened() -> Checkpoint:
    return open_checkpoint()


@pytest.fixture(scope="module")
def model(opened: Checkpoint) -> Any:
    return load(opened, context=CONTEXT)


@pytest.fixture(scope="module")
def requests(opened: Checkpoint) -> list[Request]:
    """Prompts of 4 to 300 tokens, every other one with a seed."""
    stop = stop_tokens(opened.tokenizer, opened.generation)
    heldout = opened.tokenizer((DATA / "heldout.txt").read_text(encoding="utf-8"))["input_ids"]
    prompts = [encode_chat(opened.tokenizer, [{"role": "user", "content": text}]) for text in ASKED]
    prompts[2] = heldout[:150]
    prompts[6] = heldout[200:500]
    samplings = [GREEDY if i % 2 else Sampling(0.8, 0.95, seed=i) for i in range(len(prompts))]
    return [Request(tuple(p), 24, s, stop=stop) for p, s in zip(prompts, samplings, strict=True)]


@pytest.fixture(scope="module")
def wanted(model: Any, opened: Checkpoint, requests: list[Request]) -> list[str]:
    """The text of each request alone, by `Session`."""
    sessions = [Session(model, opened.tokenizer, r.sampling, r.stop) for r in requests]
    return ["".join(s.stream(r.prompt, r.most or 0)) for s, r in zip(sessions, requests, strict=True)]


def answered(engine: Engine, requests: list[Request]) -> list[str]:
    """Their texts, all at once."""
    handles = [engine.submit(request) for request in requests]
    while engine.step():
        check(engine)
    return [handle.result()[0] for handle in handles]


def test_greedy_is_that_of_generate(model: Any, opened: Checkpoint, requests: list[Request]) -> None:
    request = requests[1]
    want = model.generate(torch.tensor([request.prompt]), max_new_tokens=24, do_sample=False)[0, len(request.prompt) :]
    handle = (engine := Engine(model, opened.tokenizer)).submit(request)
    engine.drain()
    tokens = handle.result()[1]
    assert [t for t in want.tolist() if t not in request.stop] == tokens


def test_alone(model: Any, opened: Checkpoint, requests: list[Request], wanted: list[str]) -> None:
    engine = Engine(model, opened.tokenizer)
    assert [answered(engine, [r])[0] for r in requests] == wanted
    assert wanted[0] == "The capital of France is Paris."


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 24, "mixed_chunk": 16},
        {"max_batch": 3},
        {"cache_tokens": 336},  # they do not fit
    ],
)
def test_together(
    model: Any, opened: Checkpoint, requests: list[Request], wanted: list[str], options: dict[str, int]
) -> None:
    engine = Engine(model, opened.tokenizer, **options)  # type: ignore[arg-type]
    assert answered(engine, requests) == wanted
    assert engine.schedule.pages.used == 0
    if "cache_tokens" not in options:
        assert answered(engine, requests[::-1]) == wanted[::-1], "out of pages that were kept"
        assert engine.statistics.reused > 300
    engine.clear_prefixes()
    assert len(engine.schedule.pages.free) == engine.schedule.pages.total


def test_preempted(model: Any, opened: Checkpoint, requests: list[Request], wanted: list[str]) -> None:
    """Answers that grow into each other's pages."""
    some = [0, 1, 3, 5, 7]
    engine = Engine(model, opened.tokenizer, cache_tokens=80)
    assert answered(engine, [requests[i] for i in some]) == [wanted[i] for i in some]
    assert engine.statistics.preempted > 0


def test_a_long_prefix_is_soon_read(model: Any, opened: Checkpoint) -> None:
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    ids = tuple(opened.tokenizer(text)["input_ids"][:800])
    engine = Engine(model, opened.tokenizer)
    usages = []
    for tail in (5, 6):
        handle = engine.submit(Request((*ids, tail), 4, GREEDY))
        while engine.step():
            pass
        usages.append(handle.result()[2].usage)
    assert [u.cached_tokens for u in usages] == [0, 800]
    assert usages[1].first_token_ms <= 0.25 * usages[0].first_token_ms


def test_nan_is_of_one_request(opened: Checkpoint, requests: list[Request], wanted: list[str]) -> None:
    """A weight that is broken for one token: attention of the captured code multiplies what it must not see by 0."""
    model: Any = load(opened, context=CONTEXT)
    broken = 6000
    embed = next(p for (keys, *_), p in model.store._packed.items() if "embed_tokens" in str(keys))
    (weight,) = embed.tensors.values()
    weight[broken] = torch.nan
    engine = Engine(model, opened.tokenizer)
    bad = Request((*requests[1].prompt, broken, 5, 6), 9, GREEDY)
    handle = engine.submit(bad)
    assert answered(engine, requests[:4]) == wanted[:4]
    assert handle.result()[2].reason == "error"
    assert answered(engine, requests[4:]) == wanted[4:]


def test_multi_byte_stops(model: Any, opened: Checkpoint, requests: list[Request], wanted: list[str]) -> None:
    """Across tokens: the text that was said before it, and no more."""
    text = wanted[1]
    for stop in (text[3:9], text[-4:], text[10:11]):
        cut = Request(**{**vars(requests[1]), "stop_strings": (stop,)})
        assert answered(Engine(model, opened.tokenizer), [cut]) == [text[: text.index(stop)]]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral_window", "gpt_oss"])
def test_keys_and_values(family: str, tmp_path: Path) -> None:
    """Other rows in the pages, windows over them, and a prefix that two share."""
    model: Any = load(opened_family(family, tmp_path), target=HOST, dtype="fp32", context=128)
    ids = torch.randint(3, 100, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids[:5], ids[5:40], ids[:50], ids[:60], ids[20:21]]
    wanted = [
        model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(p) :].tolist()
        for p in prompts
    ]
    engine = Engine(model, Tokens(), chunk=24, cache_tokens=176)
    for _ in range(2):
        handles = [engine.submit(Request(tuple(p), 12, GREEDY)) for p in prompts]
        while engine.step():
            check(engine)
        assert [h.result()[1] for h in handles] == wanted
    assert engine.statistics.reused > 100
