"""A tokenizer as the metadata of a GGUF file, so that reading the file gives the same ids."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer, models

from ktcompile.errors import ModelFileError
from ktcompile.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PROBE, names_of
from ktcompile.tokenizer.read import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    ROLES,
    SPACE_PREFIX,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_by_score,
    tokenizer_from_gguf,
)
from ktcompile.weights.gguf_header import Value
from ktcompile.weights.json import load_json

_KEPT = "Keep the original folder: its tokenizer.json is used when it is given with the file"
_MAX_CONFIG_BYTES = 1 << 20
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class FastTokenizer(Protocol):
    """What is needed of transformers' PreTrainedTokenizerFast."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def unk_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> str | dict[str, str] | None: ...


def tokenizer_metadata(
    tokenizer: FastTokenizer, folder: Path | None, vocab_size: int | None = None
) -> dict[str, Value]:
    """Keys `tokenizer.*` that give this tokenizer back through tokenizer_from_gguf and in llama.cpp.

    `vocab_size`, rows of the embedding, pads the vocabulary with unused tokens `[PADn]`. `folder` names the tokenizer
    in errors, and its generation_config.json gives up to two further tokens that end an answer, as EOT and EOM.
    Raises ModelFileError if GGUF cannot say what this tokenizer does, checked on a fixed text too.
    """
    where = str(folder / "tokenizer.json") if folder is not None else "the tokenizer"
    original = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    original.no_padding()
    original.no_truncation()
    content = json.loads(original.to_str())
    model = content["model"]
    _check_model(model, where)
    tokens, types = _tokens(content, where, vocab_size)
    fields: dict[str, Value] = {f"{PREFIX}tokens": tokens}
    if model["byte_fallback"]:
        fields |= _sentencepiece(content, where, tokens, types)
    else:
        fields |= _byte_level(original, where, tokens, model)
    fields[f"{PREFIX}token_type"] = types
    fields |= _roles(tokenizer, folder, len(tokens))
    fields |= _ends(original, tokenizer, where)
    fields |= _templates(tokenizer.chat_template, where)
    _compare(original, tokenizer_from_gguf(fields, where), content, where)
    return fields


def _fail(where: str, why: str) -> ModelFileError:
    return ModelFileError(f"{where}: GGUF cannot hold this tokenizer: {why}. {_KEPT}")


def _check_model(model: Mapping[str, Any], where: str) -> None:
    if model["type"] != "BPE":
        raise _fail(where, f"its model is {model['type']}, only BPE is known")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise _fail(where, f"its {name} is {model[name]!r}")


def _tokens(content: Mapping[str, Any], where: str, vocab_size: int | None) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Tokens and their types by id, holes filled with unused tokens."""
    numbers: dict[str, int] = content["model"]["vocab"]
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {number: token for token, number in numbers.items()} | {i: t["content"] for i, t in added.items()}
    count = max(by_id, default=-1) + 1
    if vocab_size is not None:
        if count > vocab_size:
            raise _fail(where, f"token {by_id[count - 1][:80]!r} has id {count - 1}, the model has {vocab_size} rows")
        count = vocab_size
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(count)]
    twice = next((token for token, times in Counter(tokens).items() if times > 1), None)
    if twice is not None:
        raise _fail(where, f"{twice[:80]!r} is more than one token")
    unknown, fallback = content["model"]["unk_token"], content["model"]["byte_fallback"]

    def kind(number: int, token: str) -> int:
        if number in added:
            special = bool(added[number]["special"])
            return UNKNOWN if special and token == unknown else CONTROL if special else USER_DEFINED
        if number not in by_id:
            return UNUSED
        return BYTE if fallback and token in _BYTES else NORMAL

    return tokens, np.array([kind(i, token) for i, token in enumerate(tokens)], np.int32)


def _merges(model: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    spaced = next((pair for pair in pairs if " " in "".join(pair)), None)
    if spaced is not None:
        raise _fail(where, f"its merge of {spaced[0]!r} and {spaced[1]!r} has a space in it")
    return [(left, right) for left, right in pairs]


def _byte_level(original: Tokenizer, where: str, tokens: list[str], model: Mapping[str, Any]) -> dict[str, Value]:
    merges = _merges(model, where)
    return {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": _pre(original, where, tokens, model, merges),
        f"{PREFIX}merges": [f"{left} {right}" for left, right in merges],
    }


def _pre(
    original: Tokenizer, where: str, tokens: list[str], model: Mapping[str, Any], merges: list[tuple[str, str]]
) -> str:
    whole_words = bool(model["ignore_merges"])
    names = names_of(original, frozenset(tokens), whole_words)
    if not names:
        raise _fail(where, f"it cuts text as none of {', '.join(PRE_TOKENIZERS)} does")
    # Taking a word that is a token whole changes nothing if merges make every token anyway.
    unmade = _unmade(original, model, merges) if PRE_TOKENIZERS[names[0]].whole_words != whole_words else None
    fitting = [name for name in names if unmade is None or PRE_TOKENIZERS[name].whole_words == whole_words]
    if not fitting:
        raise _fail(where, f"it is {names[0]} with ignore_merges {whole_words}, and no merges make {unmade!r}")
    return fitting[0]


def _unmade(original: Tokenizer, model: Mapping[str, Any], merges: list[tuple[str, str]]) -> str | None:
    """A token that merges do not make of its own text, if there is one; added tokens never come from text."""
    merging = models.BPE(vocab=model["vocab"], merges=merges)
    added = {token.content for token in original.get_added_tokens_decoder().values()}
    plain = (token for token in model["vocab"] if token not in added)
    return next((token for token in plain if [t.value for t in merging.tokenize(token)] != [token]), None)


def _sentencepiece(
    content: Mapping[str, Any], where: str, tokens: list[str], types: np.ndarray[Any, Any]
) -> dict[str, Value]:
    """Scores fall with the first merge that makes a token; what no merge makes comes after."""
    model = content["model"]
    space = _space(content, where)
    merges = _merges(model, where)
    rank = {made: i for i, made in enumerate(dict.fromkeys(left + right for left, right in merges))}
    rest = iter(range(len(rank), len(rank) + len(tokens)))
    scores = np.array(
        [
            -float(rank[token] if token in rank else next(rest)) if kind == NORMAL else 0.0
            for token, kind in zip(tokens, types.tolist(), strict=True)
        ],
        np.float32,
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    derived = merges_by_score(vocabulary, scores, types, where)
    if _grouped(derived) != _grouped(merges):
        raise _fail(where, "its merges do not follow from one score for each token")
    fields: dict[str, Value] = {
        f"{PREFIX}model": "llama",
        f"{PREFIX}pre": "default",
        f"{PREFIX}scores": scores,
        f"{PREFIX}merges": [f"{left} {right}" for left, right in merges],
        f"{PREFIX}add_space_prefix": space != "never",
        f"{PREFIX}remove_extra_whitespaces": False,
    }
    if space in ("first", "always"):
        fields[SPACE_PREFIX] = space
    return fields


def _grouped(merges: list[tuple[str, str]]) -> list[tuple[str, frozenset[str]]]:
    """The tokens made, in order, each with its left halves: their order among each other is no matter of scores."""
    halves: dict[str, set[str]] = {}
    for left, right in merges:
        halves.setdefault(left + right, set()).add(left)
    return [(made, frozenset(lefts)) for made, lefts in halves.items()]


def _space(content: Mapping[str, Any], where: str) -> str:
    """Where this SentencePiece tokenizer puts a space: prepend, first, always or never."""
    normalizer, pre = content["normalizer"], content["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if normalizer is None and pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True):
        return str(pre["prepend_scheme"])
    steps = (normalizer or {}).get("normalizers", [normalizer])
    if pre is None and steps == [{"type": "Prepend", "prepend": "▁"}, replace]:
        return "prepend"
    if pre is None and steps == [replace]:
        return "never"
    raise _fail(where, "it turns spaces into ▁ in a way that SentencePiece has no name for")


def _roles(tokenizer: FastTokenizer, folder: Path | None, count: int) -> dict[str, Value]:
    ids: dict[str, int | None] = {name: getattr(tokenizer, f"{role}_id") for role, name in ROLES.items()}
    ids |= dict(zip(("eot", "eom"), _further_ends(folder, tokenizer.eos_token_id, count), strict=False))
    return {f"{PREFIX}{name}_token_id": number for name, number in ids.items() if number is not None}


def _further_ends(folder: Path | None, eos: int | None, count: int) -> Iterator[int]:
    path = folder / "generation_config.json" if folder is not None else None
    if path is None or not path.is_file():
        return
    numbers = load_json(path, _MAX_CONFIG_BYTES).get("eos_token_id")
    for number in numbers if isinstance(numbers, list) else [numbers]:
        if number is None or number == eos:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise ModelFileError(f"{path}: eos_token_id holds {repr(number)[:80]}; the vocabulary has {count} tokens")
        yield number


def _ends(original: Tokenizer, tokenizer: FastTokenizer, where: str) -> dict[str, Value]:
    """Whether BOS and EOS are added, as seen on a text."""
    plain, full = (original.encode("a", add_special_tokens=added).ids for added in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    begin, end = full[:at], full[at + len(plain) :]
    sides = (("front", begin, "bos_token", tokenizer.bos_token_id), ("end", end, "eos_token", tokenizer.eos_token_id))
    for side, added, role, own in sides:
        if added not in ([], [own]):
            texts = [original.id_to_token(number) for number in added]
            raise _fail(where, f"it adds {texts} at the {side} of a text, where only its {role} may be")
    return {f"{PREFIX}add_bos_token": bool(begin), f"{PREFIX}add_eos_token": bool(end)}


def _templates(template: str | dict[str, str] | None, where: str) -> dict[str, Value]:
    """The chat template, and others by name if there are several."""
    if template is None or isinstance(template, str):
        return {} if template is None else {"tokenizer.chat_template": template}
    others = sorted(name for name in template if name != "default")
    fields: dict[str, Value] = {f"tokenizer.chat_template.{name}": template[name] for name in others}
    if others:
        fields["tokenizer.chat_templates"] = others
    if "default" not in template:
        raise _fail(where, f"of its chat templates {', '.join(others)} none is the default")
    return {"tokenizer.chat_template": template["default"], **fields}


def _compare(original: Tokenizer, rebuilt: Tokenizer, content: Mapping[str, Any], where: str) -> None:
    """Equal ids and equal text on every line of PROBE, with each added token between words and between spaces."""
    added = [token["content"] for token in content["added_tokens"]]
    texts = [PROBE, *PROBE.splitlines(keepends=True), *(f"a{token}b {token} c" for token in added)]
    for text in texts:
        ids, again = original.encode(text).ids, rebuilt.encode(text).ids
        same_text = original.decode(ids, False) == rebuilt.decode(ids, False)
        if ids != again or not same_text:
            raise _fail(where, f"{text[:80]!r} would give {'other ids' if ids != again else 'another text'}")
