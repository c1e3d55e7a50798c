"""Text comes in whole characters, and stops where its definition says, however it is cut."""

import pytest
from byte_model import Tokens
from hypothesis import example, given
from hypothesis import strategies as st

from ktcompile.text import Stops, Text


def by_characters(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: character by character, until what was said ends with a stop string; of several the longest."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stops if s and text[:end].endswith(s)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


LETTERS = st.text("ab\n", max_size=12)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab\n", max_size=4), max_size=4))
@example(["a", "b", "c"], ["b", "abc"])
@example(["abc"], ["b", "abc"])
@example(["aab"], ["ab", "aaa"])
def test_stops(pieces: list[str], stops: list[str]) -> None:
    given = Stops(stops)
    said = [given.push(piece) for piece in pieces]
    text = "".join(pieces)
    want, matched = by_characters(text, stops)
    assert ("".join(said) + given.rest(), given.found) == (want, matched)
    so_far, spoken = "", ""
    for piece, part in zip(pieces, said, strict=True):
        so_far, spoken = so_far + piece, spoken + part
        kept = want[len(spoken) : len(so_far)]
        assert matched is not None or any(s.startswith(kept) for s in stops) or not kept, "held back without a reason"


@given(st.text(st.sampled_from("aé漢🙂"), max_size=20), st.lists(st.text("aé漢🙂", min_size=1, max_size=3), max_size=2))
def test_characters_of_several_tokens(text: str, stops: list[str]) -> None:
    """A token is a byte here, so every character but `a` is cut, in a stop string too."""
    given = Text(Tokens().backend_tokenizer, stops, True)
    pieces = [given.push(byte) for byte in text.encode()]
    assert ("".join(pieces) + given.stops.rest(), given.stops.found) == by_characters(text, stops)
    assert all(piece.isprintable() and "\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("ending", [b"\xe6", b"\xe6\xbc", b"\xf0\x9f\x99"])
def test_half_a_character_is_never_said(ending: bytes) -> None:
    given = Text(Tokens().backend_tokenizer, [], True)
    assert "".join(given.push(byte) for byte in b"so " + ending) + given.stops.rest() == "so "


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text(data: bytes) -> None:
    """Raise nothing, and what follows is said."""
    given = Text(Tokens().backend_tokenizer, [], True)
    said = "".join(given.push(byte) for byte in data + b" end of it")
    assert said.endswith(" end of it")
