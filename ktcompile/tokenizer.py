"""The tokenizer inside a GGUF file, rebuilt so that its ids equal those of the original tokenizer.json."""

from collections.abc import Callable, Mapping

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ktcompile.errors import ModelFileError
from ktcompile.weights.gguf_header import Value

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # token_type
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _deepseek_v3() -> pre_tokenizers.PreTokenizer:
    """Digits in threes, then runs of Chinese and Japanese, then words, punctuation and space; then bytes."""
    patterns = (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
        r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    )
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {"deepseek-v3": _deepseek_v3}


def tokenizer_from_gguf(metadata: Mapping[str, Value], where: str) -> Tokenizer:
    """Byte-level BPE from the metadata of the file `where`, adding BOS and EOS if the file says so.

    Raises ModelFileError if the model or the pre-tokenizer is not known, or the vocabulary does not fit together.
    """
    _known(metadata, where, "model", ("gpt2",))
    pre = _known(metadata, where, "pre", tuple(PRE_TOKENIZERS))
    tokens, merges = _strings(metadata, where, "tokens"), _strings(metadata, where, "merges")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ModelFileError(f"{where}: {_PREFIX}tokens: {twice[:80]!r} occurs twice")
    tokenizer = Tokenizer(_bpe(vocabulary, merges, where))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, metadata, where, tokens)
    roles = special_tokens(metadata, where)
    begin = _added(metadata, where, "add_bos_token", roles.get("bos_token"))
    end = _added(metadata, where, "add_eos_token", roles.get("eos_token"))
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *(f"{t}:1" for t in begin), "$B:1", *(f"{t}:1" for t in end)],
            special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys((*begin, *end))],
        )
    return tokenizer


def special_tokens(metadata: Mapping[str, Value], where: str) -> dict[str, str]:
    """The texts of bos_token, eos_token, pad_token and unk_token, of those that the file has."""
    tokens = _strings(metadata, where, "tokens")
    found = {}
    for role, name in _ROLES.items():
        number = metadata.get(f"{_PREFIX}{name}_token_id")
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise ModelFileError(f"{where}: {_PREFIX}{name}_token_id is {number!r}; the vocabulary has {len(tokens)}")
        found[role] = tokens[number]
    return found


def _known(metadata: Mapping[str, Value], where: str, name: str, known: tuple[str, ...]) -> str:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, str) or value not in known:
        raise ModelFileError(
            f"{where}: {_PREFIX}{name} is {str(value)[:80]!r}; known are {', '.join(known)}. "
            "Give the original model's folder as well: its tokenizer.json is then used"
        )
    return value


def _strings(metadata: Mapping[str, Value], where: str, name: str) -> list[str]:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, list):
        raise ModelFileError(f"{where}: {_PREFIX}{name}: a list of strings is needed")
    return value


def _bpe(vocabulary: dict[str, int], merges: list[str], where: str) -> models.BPE:
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelFileError(f"{where}: {_PREFIX}merges: {merge[:80]!r} does not join two tokens into a third")
        pairs.append((left, right))
    return models.BPE(vocab=vocabulary, merges=pairs)


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Value], where: str, tokens: list[str]) -> None:
    """Cut control and user-defined tokens out of the text before BPE; only control tokens are special."""
    types = metadata.get(f"{_PREFIX}token_type")
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ModelFileError(f"{where}: {_PREFIX}token_type: one number for each of the {len(tokens)} tokens is needed")
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types.tolist(), strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)


def _added(metadata: Mapping[str, Value], where: str, flag: str, token: str | None) -> list[str]:
    """The token that the flag adds, as a list of one or none."""
    if not metadata.get(_PREFIX + flag, False):
        return []
    if token is None:
        raise ModelFileError(f"{where}: {_PREFIX}{flag} is true, but the file names no such token")
    return [token]
