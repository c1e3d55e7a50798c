"""Penalties and bias, against the definition in loops and transformers' own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from ktcompile.errors import RulesError
from ktcompile.penalties import Penalties, penalised

IDS = st.lists(st.integers(0, 9), max_size=12)


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=10, max_size=10),
    IDS,
    IDS,
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.5, 2),
    st.dictionaries(st.integers(0, 9), st.sampled_from([-100.0, -1.0, 5.5, -math.inf])),
)
def test_the_definition(
    row: list[float],
    prompt: list[int],
    answer: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    want = []
    for token, logit in enumerate(row):
        if token in prompt or token in answer:
            logit = logit / repetition if logit > 0 else logit * repetition
        count = answer.count(token)
        logit -= frequency * count + (presence if count else 0)
        want.append(logit + bias.get(token, 0))
    given = torch.tensor(row)
    got = penalised(given, Penalties(presence, frequency, repetition, bias), prompt, answer)
    assert torch.allclose(got, torch.tensor(want), atol=1e-5)
    assert torch.equal(given, torch.tensor(row)), "the logits stay as they are"


def test_repetition_is_that_of_transformers() -> None:
    row = torch.randn(40, generator=torch.Generator().manual_seed(0))
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 7, 7, 9]]), row[None].clone())[0]  # type: ignore[arg-type]
    assert torch.equal(penalised(row, Penalties(repetition=1.3), [3, 7], [7, 9]), want)


def test_what_is_refused() -> None:
    for values in ({"presence": math.nan}, {"frequency": 101}, {"repetition": 0}):
        with pytest.raises(RulesError, match=r"penalty .*: allowed is"):
            Penalties(**values)
    for value in (math.inf, math.nan):
        with pytest.raises(RulesError, match="the bias of token 5"):
            Penalties(bias={5: value})
    assert not Penalties() and Penalties(bias={1: 0.5}) and Penalties(presence=0.1)
