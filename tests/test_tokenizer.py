"""Tokenizers rebuilt from GGUF metadata against the original tokenizer.json, and against what was written."""

import json
import time
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from ktcompile.errors import ModelFileError
from ktcompile.tokenizer import PRE_TOKENIZERS, special_tokens, tokenizer_from_gguf, tokenizer_metadata
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
        ("pre", "superbpe", "pre is 'superbpe'; known are deepseek-v3, deepseek-llm"),
        ("pre", None, "pre is 'None'; known are deepseek-v3"),
        ("model", "bert", "model is 'bert'; known are gpt2, llama. Give the original model's folder as well"),
        ("tokens", None, "tokens: a list of strings is needed"),
        ("tokens", ["a", "b", "a"], "tokens: 'a' occurs twice"),
        ("merges", ["Ġ zzzzz"], "merges: 'Ġ zzzzz' does not join"),
        ("merges", ["Ġ"], "merges: 'Ġ' does not join"),
        ("token_type", [1, 2], "token_type: one number for each"),
        ("token_type", np.zeros(3, np.int32), "token_type: one number for each of the 6144"),
        ("token_type", np.zeros(6144, np.float32), "token_type: one number for each of the 6144"),
        ("bos_token_id", 6144, "bos_token_id is 6144; the vocabulary has 6144"),
        ("bos_token_id", "0", "bos_token_id is '0'"),
        ("bos_token_id", True, "bos_token_id is True"),
        ("add_bos_token", "yes", "add_bos_token is 'yes'; true or false is needed"),
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


# How the tokenizer.json of each family cuts text, as its repository ships it.
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
FRONT = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    f"{FRONT}{UPPER}*{LOWER}+{CONTRACTION}?|{FRONT}{UPPER}+{LOWER}*{CONTRACTION}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    f"{FRONT}{UPPER}*{LOWER}+|{FRONT}{UPPER}+{LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = (
    r"[\p{Han}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴ"
    "ᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "ﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)


def split(regex: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def in_bytes(*steps: dict[str, object], trim_offsets: bool = True) -> dict[str, object]:
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


DIGITS: dict[str, object] = {"type": "Digits", "individual_digits": True}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NFC = {"type": "NFC"}
NOTHING = {"type": "Sequence", "normalizers": []}

FAMILIES: Mapping[str, tuple[object, object, bool, str]] = {
    # name: normalizer, pre_tokenizer, ignore_merges, first special token
    "deepseek-llm": (
        NOTHING,
        in_bytes(
            split("[\r\n]"),
            split(rf"\s?[{CASED_LETTERS}]+"),
            split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            split(r"\s+$"),
            split("[一-龥ࠀ-一가-퟿]+"),
            DIGITS,
        ),
        False,
        "<｜begin▁of▁sentence｜>",
    ),
    "deepseek-coder": (
        NOTHING,
        in_bytes(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), DIGITS),
        False,
        "<｜begin▁of▁sentence｜>",
    ),
    "kimi-k2": (None, in_bytes(split(KIMI)), True, "[BOS]"),
    "qwen2": (NFC, in_bytes(split(QWEN2), trim_offsets=False), False, "<|endoftext|>"),
    "glm4": (None, in_bytes(split(LLAMA3)), True, "[gMASK]"),
    "olmo": (NFC, GPT2, False, "<|endoftext|>"),
    "gpt-4o": (None, in_bytes(split(O200K)), True, "<|startoftext|>"),
    "llama-bpe": (None, in_bytes(split(LLAMA3)), True, "<|begin_of_text|>"),
    "smaug-bpe": (None, in_bytes(split(LLAMA3)), False, "<|start|>"),
    "tekken": (None, in_bytes(split(TEKKEN)), True, "<s>"),
    "gpt-2": (None, GPT2, False, "<|endoftext|>"),
}
CORPUS = (
    "The 12 quick foxes don't JUMP over 1234567 lazyDogs; they'LL say: x+=1; return HTTPServer(y[0]);\n"
    "    for i in range(10):\n\t\tprint('汉字かな', i)\r\n\n  中文English混合 и Кириллица, ελληνικά. 🚀🚀 e\u0301\n"
)


@cache
def trained(name: str) -> Tokenizer:
    """A small tokenizer of a family: 700 tokens, then three special ones and one that is not."""
    normalizer, pre, whole_words, begin = FAMILIES[name]
    model = {"type": "BPE", "vocab": {}, "merges": []}
    content = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre, "model": model}
    tokenizer = Tokenizer.from_str(json.dumps(content | {"decoder": {"type": "ByteLevel", **BYTE_LEVEL}}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    heldout = (DATA / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS] * 20 + [heldout], trainer)
    model_of(tokenizer).ignore_merges = whole_words
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in (begin, "<|end|>", "<|pad|>")])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A"], pair=[begin, "$A", "$B:1"], special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer


BYTE_LEVEL = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def model_of(tokenizer: Tokenizer) -> models.BPE:
    model = tokenizer.model
    assert isinstance(model, models.BPE)
    return model


def fast(backend: Tokenizer, begin: str | None = None, **more: object) -> PreTrainedTokenizerFast:
    """As transformers has it; without BOS no special token has a name."""
    named = {} if begin is None else {"bos_token": begin, "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named, **more)


@cache
def rebuilt(name: str) -> Tokenizer:
    written = tokenizer_metadata(fast(trained(name), FAMILIES[name][3]), None)
    assert written["tokenizer.ggml.pre"] == name
    return tokenizer_from_gguf(written, "x.gguf")


SPACES = (" ", "  ", "\n", "\r\n", "\t", "\u00a0", "/\n")
SCRIPTS = ("12345", "1٢３½", "漢字カナ々", "한국어", "ไทย", "👩\u200d🚀", "\u212b", "e\u0301", "A\u030a")
MARKS = ("'", "'S", "!=", "...", "iPhone's", "<think>", "<|end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "▁")
FRAGMENTS = st.sampled_from((*CORPUS.split(" "), *SPACES, *SCRIPTS, *MARKS))
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=8)), max_size=12).map("".join)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=CORPUS)
def test_every_family_reads_as_it_was_written(name: str, text: str) -> None:
    original, ours = trained(name), rebuilt(name)
    for added in (False, True):
        assert ours.encode(text, add_special_tokens=added).ids == original.encode(text, add_special_tokens=added).ids
    ids = ours.encode(text, add_special_tokens=False).ids
    plain = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[name].nfc else text
    assert ours.decode(ids, skip_special_tokens=False) == plain == original.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_written_as_llama_cpp_writes_it(name: str) -> None:
    begin = FAMILIES[name][3]
    written = tokenizer_metadata(fast(trained(name), begin, chat_template="{{ messages }}"), None, vocab_size=708)
    tokens, types = written["tokenizer.ggml.tokens"], written["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, np.ndarray)
    assert tokens[700:] == [begin, "<|end|>", "<|pad|>", "<think>", *(f"[PAD{i}]" for i in range(704, 708))]
    assert types.tolist() == [1] * 700 + [3] * 3 + [4] + [5] * 4
    assert written["tokenizer.ggml.model"] == "gpt2" and written["tokenizer.chat_template"] == "{{ messages }}"
    ids = [written[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "padding")]
    assert ids == [700, 701, 702] and "tokenizer.ggml.unknown_token_id" not in written
    assert written["tokenizer.ggml.add_bos_token"] is True and written["tokenizer.ggml.add_eos_token"] is False
    roles = special_tokens(written, "x.gguf")
    assert roles == {"bos_token": begin, "eos_token": "<|end|>", "pad_token": "<|pad|>"}


def test_the_embedded_file_is_written_again_key_for_key(metadata: Mapping[str, Value]) -> None:
    folder = DATA / "tiny-deepseek-v3"
    written = tokenizer_metadata(PreTrainedTokenizerFast.from_pretrained(str(folder)), folder, 6144)
    for key, value in written.items():
        assert np.array_equal(value, metadata[key]) if isinstance(value, np.ndarray) else value == metadata[key], key
    unwritten = {key for key in metadata if key.startswith("tokenizer.")} - written.keys()
    assert unwritten <= {"tokenizer.ggml.add_sep_token"}


@pytest.mark.parametrize("name", ["chatglm-bpe", "llama3", "llama-v3", "dbrx", "default"])
def test_other_names_are_read_too(name: str) -> None:
    written = tokenizer_metadata(fast(trained("llama-bpe"), "<|begin_of_text|>"), None)
    other = tokenizer_from_gguf(written | {"tokenizer.ggml.pre": name}, "x.gguf")
    assert other.decode(other.encode(CORPUS).ids) == CORPUS
    same = other.encode(CORPUS).ids == trained("llama-bpe").encode(CORPUS).ids
    assert same == (name != "default")


def test_bos_is_added_for_llama_3_if_the_file_does_not_say() -> None:
    for name, adds in (("llama-bpe", True), ("tekken", True), ("gpt-4o", False)):
        written = tokenizer_metadata(fast(trained(name), FAMILIES[name][3]), None)
        del written["tokenizer.ggml.add_bos_token"]
        assert (tokenizer_from_gguf(written, "x.gguf").encode("a").ids[0] == 700) == adds


def test_kimi_without_merges_takes_ranks_from_ids() -> None:
    written = tokenizer_metadata(fast(trained("kimi-k2"), "[BOS]"), None)
    del written["tokenizer.ggml.merges"]
    ours = tokenizer_from_gguf(written, "x.gguf")
    assert ours.encode(CORPUS).ids == trained("kimi-k2").encode(CORPUS).ids


def test_a_pattern_written_in_another_way_is_known_by_what_it_does() -> None:
    tokenizer = Tokenizer.from_str(trained("qwen2").to_str())
    spelt_out = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = in_bytes(split(QWEN2.replace(CONTRACTION, spelt_out)))
    written = tokenizer_metadata(fast(Tokenizer.from_str(json.dumps(content)), "<|endoftext|>"), None)
    assert written["tokenizer.ggml.pre"] == "qwen2"


def test_ignore_merges_may_differ_if_merges_make_every_token() -> None:
    tokenizer = Tokenizer.from_str(trained("llama-bpe").to_str())
    model_of(tokenizer).ignore_merges = False
    assert tokenizer_metadata(fast(tokenizer, "<|begin_of_text|>"), None)["tokenizer.ggml.pre"] == "llama-bpe"


def test_further_ends_and_named_templates_are_written(tmp_path: Path) -> None:
    tokenizer = fast(trained("qwen2"), "<|endoftext|>", chat_template={"default": "a", "tool_use": "b"})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [701, 700, 703, 5]}')
    written = tokenizer_metadata(tokenizer, tmp_path)
    assert (written["tokenizer.ggml.eot_token_id"], written["tokenizer.ggml.eom_token_id"]) == (700, 703)
    assert written["tokenizer.chat_template"] == "a" and written["tokenizer.chat_template.tool_use"] == "b"
    assert written["tokenizer.chat_templates"] == ["tool_use"]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [701, 704]}')
    with pytest.raises(
        ModelFileError, match=r"generation_config\.json: eos_token_id holds 704; the vocabulary has 704"
    ):
        tokenizer_metadata(tokenizer, tmp_path)


def test_bos_that_has_no_name_is_refused() -> None:
    with pytest.raises(ModelFileError, match=r"adds .*endoftext.* at the front of a text, where only its bos_token"):
        tokenizer_metadata(fast(trained("qwen2")), None)


def whitespace(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def two_in_front(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<|endoftext|>", "<|pad|>", "$A"], special_tokens=[("<|endoftext|>", 700), ("<|pad|>", 702)]
    )
    return tokenizer


def stripping(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return tokenizer


def without_merges(tokenizer: Tokenizer) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["model"] |= {"ignore_merges": True, "merges": content["model"]["merges"][:-1]}
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (whitespace, "cuts text as none of deepseek-v3, deepseek-llm"),
        (two_in_front, "adds ['<|endoftext|>', '<|pad|>'] at the front"),
        (stripping, "'a<mask>b <mask> c' would give other ids"),
        (without_merges, "it is qwen2 with ignore_merges True, and no merges make"),
        (lambda t: Tokenizer(models.WordLevel({"a": 0}, "a")), "its model is WordLevel, only BPE is known"),
        (lambda t: Tokenizer(models.BPE({"a": 0}, [], dropout=0.5)), "its dropout is 0.5"),
    ],
    ids=["whitespace", "two_in_front", "stripping", "without_merges", "word_level", "dropout"],
)
def test_what_gguf_cannot_hold_is_refused(change: Callable[[Tokenizer], Tokenizer], message: str) -> None:
    tokenizer = change(Tokenizer.from_str(trained("qwen2").to_str()))
    with pytest.raises(ModelFileError) as caught:
        tokenizer_metadata(fast(tokenizer, "<|endoftext|>"), None)
    assert str(caught.value).startswith("the tokenizer: GGUF cannot hold this tokenizer: ")
    assert message in str(caught.value) and "Keep the original folder" in str(caught.value)


def test_a_vocabulary_larger_than_the_model_is_refused() -> None:
    with pytest.raises(ModelFileError, match="token '<think>' has id 703, the model has 703 rows"):
        tokenizer_metadata(fast(trained("qwen2"), "<|endoftext|>"), None, vocab_size=703)


# SentencePiece: Mixtral.

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def pieces() -> tuple[dict[str, int], list[float], list[int]]:
    """Vocabulary, scores and types as a tokenizer.model has them: specials, bytes, learnt tokens, characters."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    heldout = (DATA / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False)
    learner.train_from_iterator([CORPUS.replace("\n", " ")] * 20 + [heldout.replace("\n", " ")], trainer)
    learnt = sorted(learner.get_vocab(), key=lambda token: (len(token) == 1, learner.token_to_id(token)))
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *learnt]
    scores = [0.0] * 259 + [-float(i) for i in range(len(learnt))]
    return {t: i for i, t in enumerate(tokens)}, scores, [2, 3, 3] + [6] * 256 + [1] * len(learnt)


def from_model(scores: object = None, **more: Value) -> dict[str, Value]:
    """Metadata as llama.cpp's converter writes it from tokenizer.model."""
    vocabulary, original, types = pieces()
    fields: dict[str, Value] = {
        "model": "llama",
        "pre": "default",
        "tokens": list(vocabulary),
        "scores": np.array(original if scores is None else scores, np.float32),
        "token_type": np.array(types, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | more).items()}


@cache
def merges() -> list[tuple[str, str]]:
    vocabulary, scores, _ = pieces()
    learnt = dict(list(zip(vocabulary, scores, strict=True))[259:])
    found: list[tuple[str, str]] = generate_merges(vocabulary, learnt)
    return found


@cache
def mixtral() -> Tokenizer:
    """tokenizer.json as Mixtral-8x7B ships it."""
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True, "normalized": False, **dict.fromkeys(PLACES, False)}
            for i, token in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": pieces()[0],
            "merges": [" ".join(pair) for pair in merges()],
        },
    }
    return Tokenizer.from_str(json.dumps(content))


PLACES = ("single_word", "lstrip", "rstrip")


@cache
def from_scores(kind: str) -> Tokenizer:
    vocabulary, _, types = pieces()
    if kind == "scores":
        return tokenizer_from_gguf(from_model(), "x.gguf")
    if kind == "equal scores":  # llama.cpp's converter, if there is a tokenizer.json and no tokenizer.model
        return tokenizer_from_gguf(from_model([-1000.0] * len(types)), "x.gguf")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    written = tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=mixtral(), **named), None, len(vocabulary))
    assert written["tokenizer.ggml.add_space_prefix"] is True and "ktcompile.space_prefix" not in written
    if kind == "written scores":
        del written["tokenizer.ggml.merges"]
    return tokenizer_from_gguf(written, "x.gguf")


@pytest.mark.parametrize("kind", ["scores", "equal scores", "written", "written scores"])
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text="<s> [INST] Hi  there [/INST]</s>x\n")
@example(text=CORPUS)
def test_sentencepiece_equals_the_original(kind: str, text: str) -> None:
    original, ours = mixtral(), from_scores(kind)
    for added in (False, True):
        assert ours.encode(text, add_special_tokens=added).ids == original.encode(text, add_special_tokens=added).ids
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    if "▁" not in text and not any(token in text for token in ("<unk>", "<s>", "</s>")):
        assert ours.decode(ids) == text


@cache
def llama(legacy: bool) -> tuple[LlamaTokenizer, Tokenizer]:
    theirs = LlamaTokenizer(vocab=pieces()[0], merges=merges(), legacy=legacy)
    written = tokenizer_metadata(theirs, None)
    assert written["ktcompile.space_prefix"] == ("always" if legacy else "first")
    return theirs, tokenizer_from_gguf(written, "x.gguf")


@pytest.mark.parametrize("legacy", [False, True])
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@example(text="<s> [INST] Hi  there [/INST]</s>x\n")
def test_sentencepiece_equals_transformers(legacy: bool, text: str) -> None:
    theirs, ours = llama(legacy)
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_sentencepiece_without_a_first_space() -> None:
    ours = tokenizer_from_gguf(from_model(add_space_prefix=False), "x.gguf")
    assert ours.encode("The", add_special_tokens=False).ids != mixtral().encode("The", add_special_tokens=False).ids
    assert ours.decode(ours.encode(" The x", add_special_tokens=False).ids) == " The x"
    again = tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=ours, bos_token="<s>"), None)
    assert again["tokenizer.ggml.add_space_prefix"] is False


def test_sentencepiece_has_default_ids() -> None:
    bare = {key: value for key, value in from_model().items() if not key.endswith("_token_id")}
    assert special_tokens(bare, "x.gguf") == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    del bare["tokenizer.ggml.add_bos_token"]
    assert tokenizer_from_gguf(bare, "x.gguf").encode("a").ids[0] == 1


def test_merges_that_no_scores_give_are_refused() -> None:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "abb": 4, "bb": 5}
    model = models.BPE(vocabulary, [("a", "b"), ("b", "b"), ("ab", "b")], byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    with pytest.raises(ModelFileError, match="merges do not follow from one score for each token"):
        tokenizer_metadata(fast(tokenizer), None)


def test_32_thousand_tokens_take_less_than_two_seconds() -> None:
    random = np.random.default_rng(0)
    words = {"".join(random.choice(list("▁abcdefghij"), size)) for size in random.integers(2, 17, 40_000)}
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *"▁abcdefghij", *sorted(words)][:32_000]
    fields = {
        "tokens": tokens,
        "scores": -np.arange(len(tokens), dtype=np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259), np.int32),
    }
    start = time.process_time()
    tokenizer = tokenizer_from_gguf(from_model() | {f"tokenizer.ggml.{k}": v for k, v in fields.items()}, "x.gguf")
    assert time.process_time() - start < 2
    assert tokenizer.decode(tokenizer.encode("abc def").ids) == "abc def"


MILLION = 1_000_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scores": np.zeros(3, np.float32)}, "scores: one finite number for each of the"),
        ({"scores": [1.0]}, "scores: one finite number for each of the"),
        ({"scores": np.full(10**6, np.nan, np.float32)}, "scores: one finite number for each of the"),
        ({"merges": ["x y"] * MILLION}, "merges: 'x y' does not join"),
        ({"merges": ["a" * MILLION]}, "does not join two tokens into a third"),
        ({"merges": np.zeros(3)}, "merges: a list of strings is needed"),
        ({"add_space_prefix": 1}, "add_space_prefix is '1'; true or false is needed"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is true; only false is known"),
        ({"unknown_token_id": 10**9}, "unknown_token_id is 1000000000; the vocabulary has"),
        ({"unknown_token_id": -1}, "unknown_token_id is -1; the vocabulary has"),
    ],
    ids=str,
)
def test_hostile_sentencepiece_is_refused_at_once(fields: dict[str, Value], message: str) -> None:
    refused(from_model(**fields), message)


def refused(fields: Mapping[str, Value], message: str) -> None:
    start = time.process_time()
    with pytest.raises(ModelFileError) as caught:
        tokenizer_from_gguf(fields, "x.gguf")
    assert time.process_time() - start < 1
    text = str(caught.value)
    assert text.startswith("x.gguf: tokenizer.ggml.") and message in text and len(text) < 800


def test_hostile_vocabularies_are_refused_at_once() -> None:
    long = {"tokens": ["a", "b" * MILLION], "scores": np.zeros(2), "token_type": np.ones(2, np.int32)}
    refused(from_model(**long), "has 1000000 characters, all have 1000001; 256 and 2097152 are allowed")
    many = [f"{i:0>200}" for i in range(100_000)]
    ones = np.ones(len(many), np.int32)
    refused(
        from_model(tokens=many, scores=np.zeros(len(many)), token_type=ones),
        "has 200 characters, all have 20000000; 256 and 2097152",
    )
    names = [str(i) for i in range(MILLION)]
    kinds = np.full(MILLION, 3, np.int32)
    refused(from_model(tokens=[*names[:-1], "0"]), "'0' occurs twice")
    plain = {"model": "gpt2", "pre": "gpt-2", "merges": []}
    few = {"tokens": names[:70_000], "token_type": kinds[:70_000]}
    refused(from_model(**plain, **few), "70000 control and user-defined tokens of")
    wide = {"tokens": ["a", "b" * 2_000_000], "token_type": kinds[:2]}
    refused(from_model(**plain, **wide), "2 control and user-defined tokens of 2000001 characters")


def test_a_million_tokens_are_read_in_linear_time() -> None:
    names = [str(i) for i in range(MILLION)]
    fields = from_model(model="gpt2", pre="gpt-2", tokens=names, token_type=np.ones(MILLION, np.int32), merges=[])
    start = time.process_time()
    assert tokenizer_from_gguf(fields, "x.gguf").get_vocab_size() == MILLION
    assert time.process_time() - start < 10
