"""Perplexity on the held-out text, as tests/data/expected.json defines it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
BOS = 0


def row(ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)])


def chunks(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The held-out text as `method.perplexity` says."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        text = (DATA / "heldout.txt").read_text(encoding="utf-8")
        tokens = [BOS, *backend.encode(text, add_special_tokens=False).ids]
    finally:
        backend.encode_special_tokens = False
    assert len(tokens) == EXPECTED["heldout"]["tokens_with_bos"]
    cut = [[BOS, *tokens[i + 1 : i + 512]] for i in range(0, len(tokens) - 511, 512)]
    assert len(cut) == EXPECTED["heldout"]["chunks"]
    return cut


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """exp of the mean negative log-likelihood of positions 257..511 of every chunk, each in one step."""
    total = 0.0
    cut = chunks(tokenizer)
    for chunk in cut:
        kept = model(row(chunk), logits_to_keep=256).logits[0, :-1]  # positions 256..510
        total -= float(kept.log_softmax(-1).gather(-1, torch.tensor(chunk[257:])[:, None]).double().sum())
    return math.exp(total / (255 * len(cut)))
