"""However an answer is cut into pieces, the same is text and the same are calls; what is no call is lost nowhere."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ktcompile.server.calls import DEEPSEEK, DEEPSEEK_V3, HERMES, PLAIN, Calls, Delta, Format

FORMATS = {"deepseek": DEEPSEEK, "deepseek_v3": DEEPSEEK_V3, "hermes": HERMES, "plain": PLAIN}
NAMES = frozenset({"f", "get_weather", "function"})
ARGUMENTS = ["{}", '{"a": 1}', '{"s": "}\\"{]", "l": [{}, [1]]}', '{\n  "é": "<tool_call>"\n}']

Parted = tuple[str, list[tuple[str, str]]]


def deltas(pieces: list[str], format: Format | None) -> list[Delta]:
    calls = Calls(format, NAMES)
    return [delta for piece in pieces for delta in calls.push(piece)] + calls.finish()


def parted(pieces: list[str], format: Format | None) -> Parted:
    found, calls = deltas(pieces, format), list[tuple[str, str]]()
    assert all(d.text or d.kind == "arguments" for d in found)
    for d in found:
        if d.kind == "call":
            assert d.call == len(calls) and d.id.startswith("call_")
            calls.append((d.text, ""))
        elif d.kind == "arguments":
            assert d.call == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + d.text)
    assert len({d.id for d in found if d.kind == "call"}) == len(calls)
    return "".join(d.text for d in found if d.kind == "text"), calls


def cut(text: str, places: list[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise(sorted({0, len(text), *(p for p in places if p < len(text))}))]


def soup(format: Format) -> st.SearchStrategy[str]:
    """Pieces of calls and of text, in any order, and calls that are whole."""
    marks = [m for m in (format.begin, format.open, format.middle, format.close, format.between, format.end) if m]
    calls = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), st.sampled_from(ARGUMENTS)), min_size=1, max_size=3)
    words = ["a", " ", "\n", "<", '{"', "}", "]", "[", ",", "f", '"name"', "tool", "｜", "```", *ARGUMENTS]
    halves = [mark[: len(mark) // 2] for mark in marks] + [mark[len(mark) // 2 :] for mark in marks]
    return st.lists(st.one_of(st.sampled_from(words + marks + halves), calls.map(format.written)), max_size=9).map(
        "".join
    )


def test_a_call_inside_of_half_a_call() -> None:
    text = '<tool_call>\n{"name": "<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for pieces in ([text], list(text)):
        assert parted(pieces, HERMES) == ('<tool_call>\n{"name": "', [("f", "{}")])


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data(), places=st.lists(st.integers(0, 300), max_size=60))
def test_pieces_do_not_matter(name: str, data: st.DataObject, places: list[int]) -> None:
    text = data.draw(soup(FORMATS[name]))
    whole = parted([text], FORMATS[name])
    assert parted(cut(text, places), FORMATS[name]) == whole
    assert parted(list(text), FORMATS[name]) == whole


@pytest.mark.parametrize("name", FORMATS)
@given(
    calls=st.lists(st.tuples(st.sampled_from(sorted(NAMES)), st.sampled_from(ARGUMENTS)), min_size=1, max_size=3),
    before=st.sampled_from(["", "Let me see.\n\n", "a < b: ", "\n"]),
    after=st.sampled_from(["", "\n", "\n\nSo it is."]),
    places=st.lists(st.integers(0, 300), max_size=60),
)
def test_what_is_written_is_read(
    name: str, calls: list[tuple[str, str]], before: str, after: str, places: list[int]
) -> None:
    format = FORMATS[name]
    before = "" if format.alone else before
    text = before + format.written(calls) + after
    assert parted(cut(text, places), format) == (before.rstrip() + after.strip(), calls)


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.text(st.sampled_from('<>{}[]"｜tool_cal▁begin name:f\n `,'), max_size=60))
@example(text='<tool_call>{"name": "f"')
@example(text='<tool_call>\n{"x": 1}\n</tool_call> and more')
@example(text='{"name": "nobody", "arguments": {}}')
@example(text="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>")
@example(text='[{"name": "f", "arguments": [1]}]')
def test_what_only_looks_like_a_call_is_text(name: str, text: str) -> None:
    for pieces in ([text], list(text)):
        assert parted(pieces, FORMATS[name]) == (text, [])
        assert parted(pieces, None) == (text, [])


def test_how_others_write_them() -> None:
    """White space, order and lists that models are seen to write."""
    swapped = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
    assert parted(list(swapped), HERMES) == ("", [("f", '{"a": 1}')])
    as_text = '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>'
    assert parted(list(as_text), HERMES) == ("", [("f", '{"a": 1}')])
    listed = ' [ {"name":"f","parameters":{}} , {"name": "f", "arguments": {"a":[1]}} ]'
    assert parted(list(listed), PLAIN) == ("", [("f", "{}"), ("f", '{"a":[1]}')])
    old, new = DEEPSEEK_V3.written([("f", "{}")]), DEEPSEEK.written([("f", "{}")])
    assert parted(list(old), DEEPSEEK) == parted(list(new), DEEPSEEK_V3) == ("", [("f", "{}")])


def test_nothing_certain_waits() -> None:
    calls = Calls(HERMES)
    assert calls.push("a <") == [Delta("text", "a")]
    assert calls.push("b ") == [Delta("text", " <b")]
    assert calls.push('<tool_call>\n{"name": "f", "arguments": ') == []
    (begin,) = calls.push('{"a')[:1]
    assert (begin.kind, begin.text, begin.call) == ("call", "f", 0)
    assert calls.push('": 1') == [Delta("arguments", '": 1', 0)]
    assert calls.push("}}\n</tool_") == [Delta("arguments", "}", 0)]
    assert calls.finish() == []
