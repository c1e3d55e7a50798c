"""The tokenizer inside a GGUF file, rebuilt so that its ids equal those of the original tokenizer.json."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ktcompile.errors import ModelFileError
from ktcompile.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from ktcompile.tokenizer.scores import merges_by_rank
from ktcompile.weights.gguf_header import Value

PREFIX = "tokenizer.ggml."
SPACE_PREFIX = "ktcompile.space_prefix"
"""Which Metaspace scheme puts the first space, "first" or "always"; GGUF itself knows only that there is one.

Without this key a space goes before the text and after each special token, as llama.cpp does.
"""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token_type
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
MAX_ADDED = 65_536  # control and user-defined tokens; DeepSeek-V3 has about 800, gpt-oss 1,100
MAX_ADDED_CHARACTERS = 1 << 20
WAY_OUT = "Give the original model's folder as well: its tokenizer.json is then used"
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # of files that do not say: llama.cpp's defaults


def tokenizer_from_gguf(metadata: Mapping[str, Value], where: str) -> Tokenizer:
    """Byte-level BPE or SentencePiece's BPE from the metadata of the file `where`, adding BOS and EOS if it says so.

    Raises ModelFileError if the model or the pre-tokenizer is not known, or the vocabulary does not fit together.
    """
    model = _known(metadata, where, "model", ("gpt2", "llama"))
    name = _known(metadata, where, "pre", tuple(PRE_TOKENIZERS)) if model == "gpt2" else None
    vocabulary = _vocabulary(metadata, where)
    types = _types(metadata, where, len(vocabulary))
    if name is None:
        tokenizer = _sentencepiece(metadata, where, vocabulary, types)
    else:
        tokenizer = _byte_level(metadata, where, vocabulary, types, name)
    _add_tokens(tokenizer, where, vocabulary, types)
    roles = special_tokens(metadata, where)
    begins = PRE_TOKENIZERS[name].add_bos if name is not None else True
    begin = _added(metadata, where, "add_bos_token", roles.get("bos_token"), begins)
    end = _added(metadata, where, "add_eos_token", roles.get("eos_token"), False)
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
    defaults = _SENTENCEPIECE_IDS if metadata.get(f"{PREFIX}model") == "llama" else {}
    found = {}
    for role, name in ROLES.items():
        number = metadata.get(f"{PREFIX}{name}_token_id", defaults.get(name))
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(tokens):
            raise ModelFileError(
                f"{where}: {PREFIX}{name}_token_id is {repr(number)[:80]}; the vocabulary has {len(tokens)}"
            )
        found[role] = tokens[number]
    return found


def _byte_level(
    metadata: Mapping[str, Value], where: str, vocabulary: dict[str, int], types: NDArray[np.integer], name: str
) -> Tokenizer:
    pre = PRE_TOKENIZERS[name]
    if name == "kimi-k2" and f"{PREFIX}merges" not in metadata:
        # Its tiktoken file has no merges, and some GGUF files have none either: a token's id is its rank.
        normal = [t for t, kind in zip(vocabulary, types.tolist(), strict=True) if kind == NORMAL]
        merges = merges_by_rank(normal, vocabulary, where)
    else:
        merges = _merges(metadata, where, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words))
    normalizer = pre.normalizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Value], where: str, vocabulary: dict[str, int], types: NDArray[np.integer]
) -> Tokenizer:
    """BPE on characters, the highest score first; what no token spells is given byte by byte.

    Merges are derived from the scores unless the file has them, as files written here do.
    """
    if _flag(metadata, where, "remove_extra_whitespaces", False):
        raise ModelFileError(f"{where}: {PREFIX}remove_extra_whitespaces is true; only false is known. {WAY_OUT}")
    if f"{PREFIX}merges" in metadata:
        merges = _merges(metadata, where, vocabulary)
    else:
        merges = merges_by_score(vocabulary, _scores(metadata, where, len(vocabulary)), types, where)
    unknown = special_tokens(metadata, where).get("unk_token")
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    space = _space_prefix(metadata, where)
    if space in ("first", "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=space, split=False)
    elif space == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if space != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_by_score(
    vocabulary: Mapping[str, int], scores: NDArray[np.generic], types: NDArray[np.integer], where: str
) -> list[tuple[str, str]]:
    """Merges into normal tokens, the highest score first, the lowest id first among equals.

    Some converters write the same score for every token; ids then give the order in which tokens were learnt.
    """
    tokens = list(vocabulary)
    order = np.lexsort((np.arange(len(tokens)), -scores.astype(np.float64)))
    normal = [tokens[i] for i in order.tolist() if types[i] == NORMAL]
    return merges_by_rank(normal, set(normal), where)


def _space_prefix(metadata: Mapping[str, Value], where: str) -> str:
    if not _flag(metadata, where, "add_space_prefix", True):
        return "never"
    scheme = metadata.get(SPACE_PREFIX, "prepend")
    if not isinstance(scheme, str) or scheme not in ("prepend", "first", "always"):
        raise ModelFileError(f"{where}: {SPACE_PREFIX} is {str(scheme)[:80]!r}; 'first' and 'always' are known")
    return scheme


def _known(metadata: Mapping[str, Value], where: str, name: str, known: tuple[str, ...]) -> str:
    value = metadata.get(PREFIX + name)
    if not isinstance(value, str) or value not in known:
        raise ModelFileError(f"{where}: {PREFIX}{name} is {str(value)[:80]!r}; known are {', '.join(known)}. {WAY_OUT}")
    return value


def _flag(metadata: Mapping[str, Value], where: str, name: str, default: bool) -> bool:
    value = metadata.get(PREFIX + name, default)
    if not isinstance(value, bool):
        raise ModelFileError(f"{where}: {PREFIX}{name} is {str(value)[:80]!r}; true or false is needed")
    return value


def _strings(metadata: Mapping[str, Value], where: str, name: str) -> list[str]:
    value = metadata.get(PREFIX + name)
    if not isinstance(value, list):
        raise ModelFileError(f"{where}: {PREFIX}{name}: a list of strings is needed")
    return value


def _vocabulary(metadata: Mapping[str, Value], where: str) -> dict[str, int]:
    """Ids by token, in the order of ids."""
    tokens = _strings(metadata, where, "tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ModelFileError(f"{where}: {PREFIX}tokens: {twice[:80]!r} occurs twice")
    return vocabulary


def _types(metadata: Mapping[str, Value], where: str, count: int) -> NDArray[np.integer]:
    types = metadata.get(f"{PREFIX}token_type")
    if not isinstance(types, np.ndarray) or len(types) != count or types.dtype.kind not in "iu":
        raise ModelFileError(f"{where}: {PREFIX}token_type: one number for each of the {count} tokens is needed")
    return types.astype(np.int64)


def _scores(metadata: Mapping[str, Value], where: str, count: int) -> NDArray[np.generic]:
    scores = metadata.get(f"{PREFIX}scores")
    if not isinstance(scores, np.ndarray) or len(scores) != count or not np.isfinite(scores.astype(np.float64)).all():
        raise ModelFileError(f"{where}: {PREFIX}scores: one finite number for each of the {count} tokens is needed")
    return scores


def _merges(metadata: Mapping[str, Value], where: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in _strings(metadata, where, "merges"):
        left, space, right = merge.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelFileError(f"{where}: {PREFIX}merges: {merge[:80]!r} does not join two tokens into a third")
        pairs.append((left, right))
    return pairs


def _add_tokens(tokenizer: Tokenizer, where: str, vocabulary: Mapping[str, int], types: NDArray[np.integer]) -> None:
    """Cut control, unknown and user-defined tokens out of the text before BPE; user-defined ones are not special."""
    found = [
        (token, kind)
        for token, kind in zip(vocabulary, types.tolist(), strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    characters = sum(len(token) for token, _ in found)
    if len(found) > MAX_ADDED or characters > MAX_ADDED_CHARACTERS:
        raise ModelFileError(
            f"{where}: {PREFIX}token_type: {len(found)} control and user-defined tokens of {characters} characters; "
            f"{MAX_ADDED} of {MAX_ADDED_CHARACTERS} are allowed"
        )
    tokenizer.add_tokens([AddedToken(t, special=kind != USER_DEFINED, normalized=False) for t, kind in found])


def _added(metadata: Mapping[str, Value], where: str, flag: str, token: str | None, default: bool) -> list[str]:
    """The token that the flag adds, as a list of one or none."""
    if not _flag(metadata, where, flag, default and token is not None):
        return []
    if token is None:
        raise ModelFileError(f"{where}: {PREFIX}{flag} is true, but the file names no such token")
    return [token]
