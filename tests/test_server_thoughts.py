"""However an answer is cut into pieces, the same is thought and the same is said."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.checkpoint import open_checkpoint
from ktcompile.generate import Sampling, encode_chat
from ktcompile.server import State
from ktcompile.server.prompt import prompt_of
from ktcompile.server.thoughts import Thoughts

WORDS = st.lists(
    st.sampled_from(["a", "b c", " ", "\n", "<", "think", ">", "<think>", "</think>", "</", "é"]), max_size=12
)


def parted(pieces: list[str], inside: bool) -> tuple[str, str]:
    thoughts = Thoughts(inside)
    found = [part for piece in pieces for part in thoughts.push(piece)] + thoughts.finish()
    assert all(text for _, text in found)
    return "".join(t for thought, t in found if thought), "".join(t for thought, t in found if not thought)


@given(text=WORDS.map("".join), inside=st.booleans(), cuts=st.lists(st.integers(0, 40)))
def test_pieces_do_not_matter(text: str, inside: bool, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert parted(pieces, inside) == parted([text], inside)


def test_what_is_what() -> None:
    assert parted(["<think>\nwhy\n</think>\n\nbecause"], False) == ("why", "because")
    assert parted(["why</think>because"], True) == ("why", "because")
    assert parted([" <think>a < b </thin k"], False) == ("a < b </thin k", "")
    assert parted(["so <think> is a tag"], False) == ("", "so <think> is a tag")
    assert parted(["  plain\n"], False) == ("", "  plain\n")


def test_nothing_certain_waits() -> None:
    thoughts = Thoughts()
    assert thoughts.push("<thi") == []
    assert thoughts.push("nk>a") == [(True, "a")]
    assert thoughts.push("b ") == [(True, "b")]
    assert thoughts.push("</think>c ") == [(False, "c ")]


TEMPLATES = {
    "that ends with the tag": (
        "<A><think>",
        {None: "<A><think>", True: "<A><think>", False: "<A><think>\n</think>\n\n"},
    ),
    "that knows of none": ("<A>", {None: "<A>", True: "<A><think>\n", False: "<A>"}),
    "DeepSeek's": (
        "<A>{% if thinking is defined and thinking %}<think>{% endif %}",
        {None: "<A>", True: "<A><think>", False: "<A>"},
    ),
    "Qwen's": (
        "<A>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}",
        {None: "<A>", True: "<A><think>\n", False: "<A><think>\n\n</think>"},
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_begins_a_thought_or_none(name: str) -> None:
    tokenizer = open_checkpoint().tokenizer
    template, wanted = TEMPLATES[name]
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + template
    state = State("m", Sampling(), tokenizer=tokenizer, engine=SimpleNamespace(context=1024))
    for think, end in wanted.items():
        ids = encode_chat(tokenizer, [{"role": "user", "content": "a"}], think)
        assert ids == tokenizer("a" + end, add_special_tokens=False)["input_ids"]
        prompt = prompt_of(state, [{"role": "user", "content": "a"}], think=think)
        assert (prompt.ids, prompt.thinks) == (tuple(ids), end.rstrip().endswith("<think>"))
        assert prompt.say == {8, 9}  # special tokens in the embedded model: <think>, </think>
    state.think = True
    assert prompt_of(state, [{"role": "user", "content": "a"}]).thinks
