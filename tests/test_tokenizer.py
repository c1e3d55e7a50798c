"""The tokenizer rebuilt from GGUF metadata against the original tokenizer.json."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ktcompile.errors import ModelFileError
from ktcompile.tokenizer import special_tokens, tokenizer_from_gguf
from ktcompile.weights import GGUFSource
from ktcompile.weights.gguf_header import Value

DATA = Path(__file__).parent / "data"
MARKED = "<think>a</think><｜User｜>x <｜fim▁begin｜>def <｜end▁of▁sentence｜>\n\n<｜Us"


@pytest.fixture(scope="module")
def metadata() -> Mapping[str, Value]:
    return GGUFSource(str(files("ktcompile.assets") / "tiny-deepseek-v3-Q4_K_M.gguf")).metadata


@pytest.fixture(scope="module")
def ours(metadata: Mapping[str, Value]) -> Tokenizer:
    return tokenizer_from_gguf(metadata, "x.gguf")


@pytest.fixture(scope="module")
def original() -> Tokenizer:
    return Tokenizer.from_file(str(DATA / "tiny-deepseek-v3" / "tokenizer.json"))


def agree(ours: Tokenizer, original: Tokenizer, text: str) -> None:
    """Equal ids with and without added BOS, with and without parsing special tokens; decoding gives the text."""
    try:
        for raw in (False, True):
            ours.encode_special_tokens = original.encode_special_tokens = raw
            for added in (False, True):
                got = ours.encode(text, add_special_tokens=added).ids
                assert got == original.encode(text, add_special_tokens=added).ids
            assert ours.decode(ours.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text
    finally:
        ours.encode_special_tokens = original.encode_special_tokens = False


def test_heldout(ours: Tokenizer, original: Tokenizer) -> None:
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    agree(ours, original, text)
    assert len(ours.encode(text).ids) == 11284  # expected.json: tokens_with_bos


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
@example(text=MARKED)
@example(text="")
@example(text=" \t\r\n\n  a  1234567 漢字かなカナ x!=y 'll «quoted» ¼ é\u0301 \U0001f600\u200d\x00")
def test_any_text(ours: Tokenizer, original: Tokenizer, text: str) -> None:
    agree(ours, original, text)


def test_pairs(ours: Tokenizer, original: Tokenizer) -> None:
    got, want = ours.encode("a b", "c"), original.encode("a b", "c")
    assert (got.ids, got.type_ids) == (want.ids, want.type_ids)


def test_special_text_stays_text_when_asked(ours: Tokenizer) -> None:
    ours.encode_special_tokens = True
    assert 1 not in ours.encode("<｜end▁of▁sentence｜>").ids
    ours.encode_special_tokens = False
    assert ours.encode("<｜end▁of▁sentence｜>", add_special_tokens=False).ids == [1]


def test_roles(metadata: Mapping[str, Value]) -> None:
    assert special_tokens(metadata, "x.gguf") == {
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜▁pad▁｜>",
    }


def test_user_defined_tokens_are_cut_out_but_not_special(metadata: Mapping[str, Value]) -> None:
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, np.ndarray)
    types = types.copy()
    types[8] = 4
    tokenizer = tokenizer_from_gguf({**metadata, "tokenizer.ggml.token_type": types}, "x.gguf")
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<think></think>", add_special_tokens=False).ids[0] == 8
    assert tokenizer.decode([8, 9]) == "<think>"


def test_eos_is_added_if_the_file_says_so(metadata: Mapping[str, Value]) -> None:
    tokenizer = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_eos_token": True}, "x.gguf")
    assert tokenizer.encode("a").ids[-1] == 1 and tokenizer.encode("a").ids[0] == 0
    tokenizer = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False}, "x.gguf")
    assert tokenizer.encode("a").ids == tokenizer.encode("a", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "llama-bpe", "pre is 'llama-bpe'; known are deepseek-v3"),
        ("pre", None, "pre is 'None'; known are deepseek-v3"),
        ("model", "llama", "model is 'llama'; known are gpt2"),
        ("tokens", None, "tokens: a list of strings is needed"),
        ("tokens", ["a", "b", "a"], "tokens: 'a' occurs twice"),
        ("merges", ["Ġ zzzzz"], "merges: 'Ġ zzzzz' does not join"),
        ("merges", ["Ġ"], "merges: 'Ġ' does not join"),
        ("token_type", [1, 2], "token_type: one number for each"),
        ("token_type", np.zeros(3, np.int32), "token_type: one number for each of the 6144"),
        ("bos_token_id", 6144, "bos_token_id is 6144; the vocabulary has 6144"),
        ("bos_token_id", "0", "bos_token_id is '0'"),
        ("bos_token_id", None, "add_bos_token is true, but the file names no such token"),
    ],
)
def test_what_does_not_fit_is_refused(
    metadata: Mapping[str, Value], key: str, value: Value | None, message: str
) -> None:
    changed = {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}
    if value is not None:
        changed[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ModelFileError) as caught:
        tokenizer_from_gguf(changed, "x.gguf")
    assert str(caught.value).startswith("x.gguf: tokenizer.ggml.") and message in str(caught.value)
