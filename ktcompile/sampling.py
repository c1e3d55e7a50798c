"""The next token of each row of logits, chosen where the logits are: no value is read on the host.

A row's token is a function of its logits, its settings, its seed and its position, whatever rows are beside it:
sums are of integers, so their order does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from secrets import randbits
from struct import pack, unpack

import torch
from torch import Tensor

from ktcompile.errors import KtransError, RulesError

ONE = 1 << 40
"""The weight of a row's most likely token. What is less likely by more than that is never drawn."""

LIKELY = 1024
"""The most likely tokens of a row, which the host looks at before it sorts them all."""

MAX_VOCABULARY = 1 << 22
"""Tokens of which so many weights can be summed in 63 bits."""

_FIELDS = ("temperature", "top_k", "top_p", "min_p", "uniform")


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen, see `sample`. Temperature 0: the most likely one. RulesError."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("top_k", 0, 1 << 31), ("min_p", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise RulesError(f"{name.replace('_', '-')} {value}: allowed is {low} to {high}")

    def seeded(self) -> "Sampling":
        """The same with a seed: its own, or one that nobody can foresee."""
        return self if self.seed is not None else replace(self, seed=randbits(64))


@dataclass(frozen=True)
class Choices:
    """How the token of each row is chosen: float64 `[rows]` each, on one device.

    `uniform`: in [0, 1), what decides; see `uniform`. `top_k` 0, `top_p` 1 and `min_p` 0 keep every token.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    @staticmethod
    def of(requests: Sequence[Sampling], positions: Sequence[int]) -> "Choices":
        """Of rows, on the CPU. `positions`: those of the tokens to choose. A request without a seed has seed 0."""
        return Choices(*torch.tensor(_fields(requests, positions), dtype=torch.float64).unbind(0))

    @staticmethod
    def numbers(requests: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
        """What `Choices.of(requests, positions).packed()` holds, row by row, made without a tensor.

        A call of torch takes microseconds, but a hundred of them once the experts have emptied the CPU's caches.
        """
        values = [*chain.from_iterable(_fields(requests, positions))]
        return [*unpack(f"{len(values)}q", pack(f"{len(values)}d", *values))]

    @staticmethod
    def shape(rows: int) -> tuple[int, int]:
        """Of `packed`."""
        return len(_FIELDS), rows

    def packed(self) -> Tensor:
        """All of it, as int64 of the same bits: one copy brings it to another device."""
        return torch.stack([getattr(self, name) for name in _FIELDS]).view(torch.int64)

    @staticmethod
    def unpacked(packed: Tensor) -> "Choices":
        """From the `packed`, without a copy."""
        return Choices(*packed.view(torch.float64).unbind(0))

    def to(self, device: torch.device) -> "Choices":
        """On another device."""
        if self.uniform.device == device:
            return self
        return Choices.unpacked(self.packed().to(device, non_blocking=True))


@dataclass(frozen=True)
class Sampled:
    """Tokens, and the logarithms of their probabilities, a row each, on the host.

    The latter are under the logits as they were given: of temperature 1, with every token kept. A token is -1 where a
    row's logits hold NaN or +inf, or nothing but -inf; its probability is then NaN.
    """

    tokens: list[int]
    logprobs: list[float]

    @staticmethod
    def of(found: Tensor) -> "Sampled":
        """What `sample` returned; waits for the device."""
        tokens, logprobs = found.tolist()
        return Sampled([int(token) for token in tokens], logprobs)

    def ids(self) -> list[int]:
        """The tokens. Raises KtransError naming rows that have none."""
        if bad := [str(row) for row, token in enumerate(self.tokens) if token < 0]:
            raise KtransError(
                f"the logits of row {', '.join(bad)} of {len(self.tokens)} are no distribution: they hold NaN or +inf, "
                "or nothing but -inf"
            )
        return self.tokens


def _fields(requests: Sequence[Sampling], positions: Sequence[int]) -> tuple[list[float], ...]:
    """Each of `_FIELDS`, of all rows."""
    drawn = [uniform(r.seed or 0, p) for r, p in zip(requests, positions, strict=True)]
    settings = ([float(getattr(r, name)) for r in requests] for name in _FIELDS[:-1])
    return *settings, drawn


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), one of 2^53, for a seed (its low 64 bits) and a position: what a row is drawn with.

    Source: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), entered at
    `position` of the stream that begins at the mixed seed.
    """
    step = 0x9E3779B97F4A7C15
    return float(_mixed(_mixed(seed + step) + (position + 1) * step) >> 11) * 2.0**-53


def _mixed(value: int) -> int:
    low = (1 << 64) - 1
    value &= low
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & low
    value = (value ^ value >> 27) * 0x94D049BB133111EB & low
    return value ^ value >> 31


def sample(logits: Tensor, choices: Choices) -> Tensor:
    """What `Sampled.of` reads, float64 `[2, rows]`, where the logits are: one copy brings it to the host.

    One token a row of `logits [rows, vocabulary]`, any float type, computed in float32, where the logits are.

    At temperature 0 it is the most likely token, of several the one of the lowest id. Else the probability of a token
    is proportional to w = exp((logit - largest) / temperature), rounded down to 1 / ONE, among those kept, which are

        top_k    the k most likely, and what is as likely as the last of these;
        top_p    of these, each of which those more likely hold less than top_p of their sum, and in any case the first;
        min_p    of these, each whose w is at least min_p, the largest being 1.

    The token is the first, by id, up to which the kept hold more than `uniform` of their sum. Equal logits are kept or
    left together. A graph can record this: nothing waits. ValueError for a vocabulary over MAX_VOCABULARY.
    """
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits must be [rows, 1 to {MAX_VOCABULARY}], not {list(logits.shape)}")
    logits = logits.float()
    largest = logits.amax(-1, keepdim=True)  # NaN where there is one
    token = logits.argmax(-1)
    on_host = logits.device.type == "cpu"  # what no row asks for can be seen and is left out there
    if not (on_host and bool((choices.temperature == 0).all())):
        drawn = _drawn(logits, largest, choices, on_host)
        token = torch.where(choices.temperature == 0, token, drawn)
    token = token.clamp(max=logits.shape[1] - 1)  # of NaN, anything may have come
    logprobs = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    token = torch.where(largest[:, 0].abs() < torch.inf, token, -1)
    return torch.stack([token.double(), logprobs.double()])


def _drawn(logits: Tensor, largest: Tensor, choices: Choices, on_host: bool) -> Tensor:
    relative = _relative(logits, largest, choices.temperature)
    weights = (relative * ONE).long()
    kept = relative >= choices.min_p[:, None]
    if not (on_host and bool((choices.top_k == 0).all() and (choices.top_p >= 1).all())):
        kept &= logits >= _least(logits, weights, choices, on_host)
    below = (weights * kept).cumsum(-1)
    total = below[:, -1:]
    at = torch.minimum((choices.uniform[:, None] * total).long(), total - 1)
    return torch.searchsorted(below, at, right=True)[:, 0]


def _least(logits: Tensor, weights: Tensor, choices: Choices, on_host: bool) -> Tensor:
    """The smallest logit of each row that top_k and top_p keep: `[rows, 1]`."""
    width = logits.shape[1]
    k = torch.where(choices.top_k == 0, width, choices.top_k.clamp(max=width)).long()[:, None]
    top_p = choices.top_p[:, None]
    if on_host and width > LIKELY:
        found, share, held = _least_of(*logits.topk(LIKELY, -1), logits, weights, k, top_p)
        enough = ((k <= LIKELY) | (k == width)) & ((top_p >= 1) | (held >= share))
        if bool(enough.all()):
            return found
    return _least_of(*logits.sort(-1, descending=True), logits, weights, k, top_p)[0]


def _least_of(
    falling: Tensor, order: Tensor, logits: Tensor, weights: Tensor, k: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_least` from the most likely tokens, the share that top_p wants, and what these hold: `[rows, 1]` each."""
    width, known = logits.shape[1], falling.shape[1]
    least = torch.where(k < width, falling.gather(1, (k - 1).clamp(max=known - 1)), -torch.inf)
    share = top_p * (weights * (logits >= least)).sum(-1, keepdim=True)
    held = weights.gather(1, order)
    until = held.cumsum(-1)
    few = (until - held < share).sum(-1, keepdim=True).clamp(min=1)
    likely = torch.where(top_p < 1, falling.gather(1, few - 1), -torch.inf)
    return torch.maximum(least, likely), share, until[:, -1:]


def _relative(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """Of each token, how likely it is beside the most likely one: float32."""
    divisor = torch.where(temperature == 0, 1, temperature).float().clamp(min=torch.finfo(torch.float32).tiny)
    return ((logits - largest) / divisor[:, None]).exp()


__all__ = ["MAX_VOCABULARY", "ONE", "Choices", "Sampled", "Sampling", "sample", "uniform"]
