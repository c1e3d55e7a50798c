"""How each family of models cuts text into words before byte-level BPE: the meaning of `tokenizer.ggml.pre`.

Facts from the pre_tokenizer of each model's tokenizer.json (Kimi: from its tiktoken pattern), which llama.cpp's
src/llama-vocab.cpp repeats under the names used here.
"""

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

DIGITS = "every digit alone"
"""A cut that is no regular expression: tokenizers' Digits(individual_digits=True)."""


@dataclass(frozen=True)
class PreTokenizer:
    """Cuts applied one after the other, each to the pieces of the one before; none means GPT-2's own.

    whole_words: a word that is a token is that token, whatever the merges say (tiktoken's rule).
    nfc: text is brought to Unicode's composed form first, so that decoding gives the composed form.
    add_bos: BOS goes in front if the file does not say. mark: a token that only these models have.
    """

    cuts: tuple[str, ...] = ()
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False
    mark: str = ""

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer, which ends in bytes."""
        if not self.cuts:
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Digits(individual_digits=True)
            if cut == DIGITS
            else pre_tokenizers.Split(Regex(cut), "isolated")
            for cut in self.cuts
        ]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def normalizer(self) -> normalizers.Normalizer | None:
        """What changes text before it is cut."""
        return normalizers.NFC() if self.nfc else None


def _letters(ranges: str) -> str:
    """A regular expression's ranges from code points in hexadecimal: "41-5A B5"."""
    return "".join("-".join(chr(int(end, 16)) for end in item.split("-")) for item in ranges.split())


_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_MARKS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, without: str = "") -> str:
    """Words that end where capitals follow small letters; `without` takes a script out of the letters."""
    upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}" + without + "]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}" + without + "]"
    front = r"[^\r\n\p{L}\p{N}]?"
    return f"{front}{upper}*{lower}+{ending}|{front}{upper}+{lower}*{ending}"


_LLAMA3 = "|".join((_CONTRACTION, _WORD, r"\p{N}{1,3}", _MARKS, _SPACES))
_QWEN2 = "|".join((_CONTRACTION, _WORD, r"\p{N}", _MARKS, _SPACES))
_O200K = "|".join((_cased(f"{_CONTRACTION}?"), r"\p{N}{1,3}", _MARKS_OR_SLASH, _SPACES))
_TEKKEN = "|".join((_cased(""), r"\p{N}", _MARKS_OR_SLASH, _SPACES))
_KIMI = "|".join((r"[\p{Han}]+", _cased(f"{_CONTRACTION}?", r"&&[^\p{Han}]"), r"\p{N}{1,3}", _MARKS, _SPACES))

_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)

# Letters with a case, as the file lists them; Armenian small letters are missing there too.
_CASED_LETTERS = _letters(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_ASIAN = f"[{_letters('4E00-9FA5 800-4E00 AC00-D7FF')}]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    rf"\s?[!-/:-~{_letters('FF01-FF0F FF1A-FF5E 2018-201F 3000-3002')}]+",
    r"\s+$",
    _ASIAN,
    DIGITS,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, DIGITS)

# No model was trained with this: it is what llama.cpp does for files that name nothing better.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),  # V3, V3.1, R1
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),  # V2, V2-Lite
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),  # DeepSeek-Coder
    "kimi-k2": PreTokenizer((_KIMI,), whole_words=True),  # Kimi-K2, Moonlight
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),  # Qwen1.5 to Qwen3
    "glm4": PreTokenizer((_LLAMA3,), whole_words=True, mark="[gMASK]"),  # GLM-4.5 and later
    "chatglm-bpe": PreTokenizer((_LLAMA3,), whole_words=True, mark="[gMASK]"),  # GLM-4
    "olmo": PreTokenizer(nfc=True),  # OLMo, OLMoE: GPT-NeoX's
    "gpt-4o": PreTokenizer((_O200K,), whole_words=True),  # gpt-oss
    "llama-bpe": PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True, mark="<|begin_of_text|>"),  # Llama 3
    "llama3": PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True, mark="<|begin_of_text|>"),
    "llama-v3": PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True, mark="<|begin_of_text|>"),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),  # Llama 3's cuts with plain merges
    "dbrx": PreTokenizer((_LLAMA3,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),  # Mistral Nemo and later
    "gpt-2": PreTokenizer(),
    "default": PreTokenizer(_DEFAULT),
}

PROBE = """I've TOLD you: 1 22 333 4444 55555 a1b22c333 3.14159 1,000,000 ½²Ⅷ ١٢٣٤ １２３.
\tif (x != y) {\r\n\t\treturn foo_bar->baz[i]++;  // HelloWorld HTTPServer camelCase iPhone's\n    }\n\n\n   \n  end
'RE 'll we'LL don't DON'T a'S ''' \"\"\" ``` ... !!! ?? -- == <|x|> </s> $5 €6 #7 @you %d ~/path//x a/\n/b
中文English混合 漢字かなカナ々 한국어 텍스트 ไทยที่นี่ हिन्दी العربية עברית Ελληνικά Кириллица Հայերեն ქართული
🚀 \U0001f468\u200d\U0001f469\u200d\U0001f467 ✅🦙🦙 e\u0301 é ﬁ \u212b \u00a0nbsp\u3000wide\u2003em \u200b\ufeff
’quoted‘ “x” «y» 、。！？ ƻǀ ʔ ꙮ   trailing   """
"""Text that every pre-tokenizer above cuts in its own way."""


def names_of(backend: Tokenizer, vocabulary: Container[str], whole_words: bool) -> tuple[str, ...]:
    """Names of the pre-tokenizers that cut text as this tokenizer does, the best fitting first; none if none do.

    Structures are compared first; if none is equal, the pieces of PROBE are.
    """
    ours = {name: _shaped(pre) for name, pre in PRE_TOKENIZERS.items() if not pre.mark or pre.mark in vocabulary}
    found = [name for name, theirs in ours.items() if _structure(theirs) == _structure(backend)]
    if not found:
        found = [name for name, theirs in ours.items() if _pieces(theirs) == _pieces(backend)]
    return tuple(
        sorted(found, key=lambda n: (not PRE_TOKENIZERS[n].mark, PRE_TOKENIZERS[n].whole_words != whole_words))
    )


def _shaped(pre: PreTokenizer) -> Tokenizer:
    """A tokenizer that has nothing but this way to cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.build()
    normalizer = pre.normalizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def _pieces(tokenizer: Tokenizer) -> list[str]:
    text = tokenizer.normalizer.normalize_str(PROBE) if tokenizer.normalizer else PROBE
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _structure(tokenizer: Tokenizer) -> tuple[list[object], list[object]]:
    """Normaliser and pre-tokenizer as flat lists of steps, without what changes no id."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer)
    normalizer, pre = (None if part is None else json.loads(part.__getstate__()) for part in parts)
    return list(_steps(normalizer, "normalizers")), list(_steps(pre, "pretokenizers"))


def _steps(node: object, inner: str) -> Iterable[object]:
    if not isinstance(node, dict):
        return
    if node.get("type") == "Sequence":
        for step in node[inner]:
            yield from _steps(step, inner)
        return
    step = {key: value for key, value in node.items() if key != "trim_offsets"}
    regex = step["pattern"].get("Regex") if isinstance(step.get("pattern"), dict) else None
    if isinstance(regex, str):
        # The files write a line break either as itself or as an escape.
        step["pattern"] = regex.replace("\r", r"\r").replace("\n", r"\n")
    yield step
