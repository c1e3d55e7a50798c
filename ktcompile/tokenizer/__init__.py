"""Tokenizers from the metadata of a GGUF file, and back."""

from ktcompile.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from ktcompile.tokenizer.read import special_tokens, tokenizer_from_gguf
from ktcompile.tokenizer.write import tokenizer_metadata

__all__ = ["PRE_TOKENIZERS", "special_tokens", "tokenizer_from_gguf", "tokenizer_metadata"]
