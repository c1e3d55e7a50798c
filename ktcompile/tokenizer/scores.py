"""Merges of a vocabulary that has ranks instead: SentencePiece's scores, or tiktoken's order of tokens."""

from collections.abc import Container, Sequence

from ktcompile.errors import ModelFileError

MAX_TOKEN_CHARACTERS = 256  # Mixtral's longest has 16, tiktoken's vocabularies 128
MAX_CHARACTERS = 2 << 20  # in all tokens; Mixtral's have 0.2 million, Kimi-K2's about 1.1 million


def merges_by_rank(ranked: Sequence[str], pieces: Container[str], where: str) -> list[tuple[str, str]]:
    """For each token in order of rank, every way to make it of two pieces, the longest left half first.

    That is the order of transformers' generate_merges. Raises ModelFileError if the tokens are too long to be split.
    """
    longest = max(ranked, key=len, default="")
    characters = sum(map(len, ranked))
    if len(longest) > MAX_TOKEN_CHARACTERS or characters > MAX_CHARACTERS:
        raise ModelFileError(
            f"{where}: tokenizer.ggml.tokens: {longest[:80]!r} has {len(longest)} characters, all have {characters}; "
            f"{MAX_TOKEN_CHARACTERS} and {MAX_CHARACTERS} are allowed in a file without merges"
        )
    merges: list[tuple[str, str]] = []
    for token in ranked:
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                merges.append((left, right))
    return merges
