"""Text to token ids: special tokens are meant, or are text, also in several threads at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ktcompile.checkpoint import open_checkpoint
from ktcompile.errors import KtransError
from ktcompile.generate import encode, encode_chat

SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜Assistant｜>", "<think>", "<｜fim▁hole｜>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return open_checkpoint().tokenizer


@given(st.lists(st.sampled_from([*SPECIAL, " a", "b", "\n\n", "é漢", "<", "｜>", "12345"]), max_size=9).map("".join))
def test_as_transformers(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for plain in (False, True):
        for add in (False, True):
            want = tokenizer(text, add_special_tokens=add, split_special_tokens=plain)["input_ids"]
            tokenizer.backend_tokenizer.encode_special_tokens = False
            assert encode(tokenizer, text, plain=plain, add_special=add) == want
    assert tokenizer.decode(encode(tokenizer, text, plain=True)) == text


def test_threads(tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat's marks stay tokens while others' text is cut as text."""
    turns = [{"role": "user", "content": "Hi <｜Assistant｜>"}]
    text = "".join(SPECIAL) * 20
    want = encode_chat(tokenizer, turns), encode(tokenizer, text, plain=True), encode(tokenizer, text)
    assert len({len(ids) for ids in want}) == 3

    def ask(i: int) -> bool:
        if i % 3 == 0:
            return encode_chat(tokenizer, turns) == want[0]
        return encode(tokenizer, text, plain=i % 3 == 1) == want[i % 3]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(1200)))


def test_what_is_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(KtransError, match=r"the text has '\\ud800' at 2, half of a pair"):
        encode(tokenizer, "a \ud800")
