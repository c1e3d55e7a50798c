"""What is added to a request's logits before its token is chosen: bias, and penalties for what was said already."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktcompile.errors import RulesError


@dataclass(frozen=True)
class Penalties:
    """See `penalised`. The defaults change nothing. RulesError for values outside of what is allowed."""

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low, high in (("presence", -100, 100), ("frequency", -100, 100), ("repetition", 0.01, 100)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise RulesError(f"{name} penalty {value}: allowed is {low} to {high}")
        if bad := [t for t, b in self.bias.items() if math.isnan(b) or b == math.inf]:
            raise RulesError(f"the bias of token {bad[0]} is {self.bias[bad[0]]}: allowed are numbers and -inf")

    def __bool__(self) -> bool:
        """Whether they change anything."""
        return bool(self.bias) or (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0)


def penalised(logits: Tensor, penalties: Penalties, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """`logits [vocabulary]`, on the CPU, with penalties and bias, as float32:

    a token of the prompt or the answer has its logit divided by `repetition` if positive, else multiplied by it; then
    each token that the answer has n > 0 times loses presence + n frequency; then the bias of a token is added.
    Source: Keskar et al., CTRL, 2019 (repetition); OpenAI's API reference (the others).
    """
    out = logits.to(torch.float32, copy=True)
    if penalties.repetition != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), dtype=torch.int64)
        some = out[seen]
        out[seen] = torch.where(some > 0, some / penalties.repetition, some * penalties.repetition)
    if answer and (penalties.presence or penalties.frequency):
        counts = Counter(answer)
        at, n = torch.tensor(list(counts)), torch.tensor(list(counts.values()))
        out[at] -= penalties.presence + penalties.frequency * n
    if penalties.bias:
        out[torch.tensor(list(penalties.bias))] += torch.tensor(list(penalties.bias.values()), dtype=torch.float32)
    return out


__all__ = ["Penalties", "penalised"]
