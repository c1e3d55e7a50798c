"""What has a grammar has its form, whoever else is in the batch; no schema takes longer than it may."""

import json
import random
from typing import Any

import pytest
from byte_model import ByteModel, Tokens, byte_engine, settle
from timing import within

from ktcompile.errors import KtransError
from ktcompile.grammar import Grammar, Grammars, check_schema, json_of
from ktcompile.penalties import Penalties
from ktcompile.request import Finished, Request
from ktcompile.sampling import Sampling

STOP = 200
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokens().backend_tokenizer, 256, frozenset({STOP}))


@pytest.fixture(scope="module")
def person(grammars: Grammars) -> Grammar:
    return grammars.grammar(f"answer: {json_of(PERSON, True)}")


def asked(grammar: Grammar | None, seed: int, most: int = 120, **more: Any) -> Request:
    prompt = tuple(b"abcdefghijklmnopqrstuvwxyz"[: 3 + seed % 20]) * (1 + seed % 5)
    sampling = Sampling(0.0 if seed % 3 == 0 else 0.9, seed=seed)
    return Request(prompt, most, sampling, stop=frozenset({STOP}), grammar=grammar, **more)


def answers(requests: list[Request], **options: int) -> list[tuple[str, list[int], Finished]]:
    """All at once."""
    engine = byte_engine(ByteModel(context=256), **options)
    handles = [engine.submit(request) for request in requests]
    settle(engine)
    return [handle.result() for handle in handles]


@pytest.mark.parametrize("options", [{}, {"cache_tokens": 272}])
def test_constrained_and_free_in_one_batch(person: Grammar, options: dict[str, int]) -> None:
    """Each says what it says alone, also where pages are few and answers are read again."""
    requests = [asked(person if seed % 2 else None, seed) for seed in range(8)]
    requests += [asked(person, 8, penalties=Penalties(frequency=0.3, bias={ord("1"): -100.0}), top=3)]
    together = answers(requests, **options)
    for request, (text, tokens, end) in zip(requests, together, strict=True):
        assert (text, tokens) == answers([request])[0][:2]
        assert end.reason == ("stop" if request.grammar else "length")
        if request.grammar:
            found = json.loads(text)
            assert list(found) == ["name", "age"] and 0 <= found["age"] <= 150
    assert "1" not in together[8][0]


def test_it_ends_where_the_grammar_does(person: Grammar, grammars: Grammars) -> None:
    (text, tokens, end), cut = answers([asked(person, 1)])[0], answers([asked(person, 1, 5)])[0]
    assert end.reason == "stop" and len(tokens) == end.usage.completion_tokens
    assert cut[2].reason == "length" and cut[0] == text[:5]
    exact = answers([asked(person, 1, len(tokens))])[0]
    assert (exact[0], exact[2].reason) == (text, "stop")
    matcher = grammars.grammar('answer: "a" "b"?').matcher()
    assert matcher.allowed().nonzero().flatten().tolist() == [ord("a")]
    matcher.push(ord("a"))
    assert matcher.allowed().nonzero().flatten().tolist() == [ord("b"), STOP]
    assert not matcher.is_complete
    matcher.push(ord("b"))
    assert matcher.is_complete


def test_stop_strings_end_it_too(person: Grammar) -> None:
    text, _, end = answers([asked(person, 1, stop_strings=('"age',))])[0]
    assert end.matched == '"age' and end.reason == "stop" and '"age' not in text


def test_logarithms_are_those_of_the_model(person: Grammar) -> None:
    """Not of what the grammar leaves."""
    engine = byte_engine(ByteModel())
    handle = engine.submit(asked(person, 1, 3, top=2))
    settle(engine)
    first = next(iter(handle))
    assert first.text == "{" and first.logprob < -1 and first.logprob < first.top[0][1]  # type: ignore[union-attr]


def test_a_grammar_that_grows_too_large_ends_its_request_alone(grammars: Grammars, person: Grammar) -> None:
    growing = grammars.grammar(f"answer: {json_of({'type': 'string', 'pattern': '(.{1,300}){1,300}'}, True)}")
    broken, fine, free = answers([asked(growing, 1), asked(person, 1), asked(None, 3)])
    assert broken[2].reason == "error" and "grammar" in broken[2].message
    assert fine[:2] == answers([asked(person, 1)])[0][:2] and free[:2] == answers([asked(None, 3)])[0][:2]


def test_whatever_is_allowed_is_json(grammars: Grammars) -> None:
    inner = {"type": "array", "items": {"enum": ["é", 1, None, {"a": []}]}, "maxItems": 3}
    schema = {"type": "object", "properties": {"list": inner}, "required": ["list"], "additionalProperties": False}
    grammar = grammars.grammar(f"answer: {json_of(schema, True)}")
    for seed in range(20):
        said, matcher, draw = bytearray(), grammar.matcher(), random.Random(seed)
        while not matcher.is_complete:
            token = draw.choice(matcher.allowed().nonzero().flatten().tolist())
            matcher.push(token)
            said.append(token)
        assert set(map(str, json.loads(said)["list"])) <= {"é", "1", "None", "{'a': []}"}


# ------------------------------------------------------------------------------------------------ abuse


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        found = {"type": "object", "properties": {"a": found}}
    return found


LOOP = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}, "$ref": "#/$defs/a"}
WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
MULTIPLES = {"allOf": [{"type": "integer", "multipleOf": i} for i in range(100, 105)]}
PATTERNS = {"allOf": [{"type": "string", "pattern": f".*{c}.{{{20 + i}}}"} for i, c in enumerate("abcdefghij")]}
BUSHES = {"$defs": {"a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}] * 900}}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"$ref": "#"}, "NoExtension"),
        (LOOP, "circular"),
        ({"$ref": "http://127.0.0.1:9/a"}, "does not fetch"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"$schema": "http://127.0.0.1:9/a"}, "does not fetch"),
        (nested(100), "levels"),
        (nested(10**4), "levels"),
        ({"const": "a" * 10**6}, "a text of 1000000 characters"),
        ({"enum": [f"value {i}" for i in range(10**5)]}, "characters"),
        (WIDE, "takes more than|items"),
        (BUSHES, "takes more than|items"),
        (MULTIPLES, "it takes more than"),
        (PATTERNS, "Unable to determine"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(" * 5000 + ")" * 5000}, "regex"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
        ({"const": "\ud800"}, "hex escape"),
        ({"not": {}}, "Unimplemented"),
    ],
)  # fmt: skip
def test_what_is_refused(grammars: Grammars, schema: dict[str, Any], why: str) -> None:
    grammars.grammar('answer: "ready"')  # the process may just have begun

    def refused() -> None:
        with pytest.raises(KtransError, match=why):
            grammars.grammar(f"answer: {json_of(schema, True)}")

    assert within(1, refused)
    assert grammars.grammar('answer: "a"').matcher().allowed().sum() == 1


@pytest.mark.parametrize(
    "pattern",
    ["(a?){100}a{100}", "^(([a-z])+.)+[A-Z]([a-z])+$", "(x+x+)+y", "(a|b)*a(a|b){200}", "((a{1000}){1000}){9}"],
)
def test_catastrophic_patterns_are_none_here(grammars: Grammars, pattern: str) -> None:
    """They are automata whose states are made as they are needed: nothing is tried twice."""
    matcher = grammars.grammar(f"answer: {json_of({'type': 'string', 'pattern': pattern}, True)}").matcher()
    draw = random.Random(0)

    def walk() -> None:
        for _ in range(50):
            tokens = [t for t in matcher.allowed().nonzero().flatten().tolist() if t != STOP]
            matcher.push(draw.choice(tokens))
            if matcher.is_complete:
                break

    assert within(1, walk, tries=1)


def test_what_no_grammar_can_promise_is_left_alone_if_not_strict(grammars: Grammars) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "nonsense"}}
    with pytest.raises(KtransError, match="Unimplemented"):
        grammars.grammar(f"answer: {json_of(schema, True)}")
    assert grammars.grammar(f"answer: {json_of(schema, False)}").matcher().allowed()[ord("[")]


def test_a_process_that_breaks_is_started_again(grammars: Grammars) -> None:
    grammars.grammar('answer: "a"')
    running = grammars._trial._running
    assert running is not None
    running.kill()
    running.wait()
    grammars.grammar('answer: "a"')


def test_depth_is_looked_at_without_depth() -> None:
    check_schema({"a": [[{"b": "x" * 100}]]})
    with pytest.raises(KtransError, match="levels"):
        check_schema(nested(10**5))
