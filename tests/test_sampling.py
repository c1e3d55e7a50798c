"""Tokens are drawn as the definition says: against loops over Python's integers, and by counting."""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ktcompile import Target
from ktcompile import sampling as module
from ktcompile.checkpoint import open_checkpoint
from ktcompile.errors import KtransError, RulesError
from ktcompile.generate import Session, stop_tokens
from ktcompile.model import load
from ktcompile.sampling import ONE, Choices, Sampled, Sampling, sample, uniform
from ktcompile.target import detect

HIGHEST = 1 - 2.0**-53
INF = math.inf


def choices(rows: int = 1, u: float = 0.5, **values: Any) -> Choices:
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": u} | values
    return Choices(**{k: torch.full((rows,), v, dtype=torch.float64) for k, v in given.items()})


def drawn(logits: Tensor, given: Choices) -> list[int]:
    """The tokens as a GPU would choose them and as the host does, which must be the same."""
    rows = logits.float()
    largest = rows.amax(-1, keepdim=True)
    there = torch.where(given.temperature == 0, rows.argmax(-1), module._drawn(rows, largest, given, False))
    here = Sampled.of(sample(logits, given)).ids()
    assert here == there.tolist()
    return here


def kept(logits: list[float], **values: Any) -> set[int]:
    """The tokens that can be drawn, found with a `uniform` in the middle of each one's share."""
    row = torch.tensor([logits])
    found = {drawn(row, choices(u=u, **values))[0] for u in (0.0, HIGHEST)}
    steps = 64
    return found | {drawn(row, choices(u=(i + 0.5) / steps, **values))[0] for i in range(steps)}


def by_loops(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """The definition in `sample`, word by word."""
    row = torch.tensor(logits)
    if temperature == 0:
        return logits.index(max(logits))
    relative = ((row - row.max()) / torch.tensor(temperature).float()).exp().tolist()
    weights = [int(r * ONE) for r in relative]
    ids = range(len(logits))
    left = [i for i in ids if not top_k or sum(logits[j] > logits[i] for j in ids) < top_k]
    total = sum(weights[i] for i in left)
    before = {i: sum(weights[j] for j in left if logits[j] > logits[i]) for i in left}
    if top_p < 1:
        left = [i for i in left if before[i] < top_p * total or logits[i] == max(logits)]
    left = [i for i in left if relative[i] >= min_p]
    at = min(int(u * sum(weights[i] for i in left)), sum(weights[i] for i in left) - 1)
    for i in left:
        at -= weights[i]
        if at < 0:
            return i
    raise AssertionError("nothing was drawn")


LOGITS = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-40, 40, width=32), st.just(-INF)), min_size=1, max_size=12
).filter(lambda row: max(row) > -INF)


@settings(deadline=None)
@given(
    LOGITS,
    st.sampled_from([0.0, 0.25, 1.0, 100.0]),
    st.integers(0, 14),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.one_of(st.just(0.0), st.floats(0, 1)),
    st.floats(0, HIGHEST),
    st.sampled_from([1, 3, 1024]),
)
@example([0.0] * 4, 1.0, 0, 0.5, 0.0, 0.75, 1)  # all are tied at the border
@example([3.0, -INF, -INF], 1.0, 3, 0.5, 0.0, HIGHEST, 1)
def test_the_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, u: float, likely: int
) -> None:
    given = choices(u=u, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LIKELY", likely)  # the host looks at so many first
        assert drawn(torch.tensor([logits]), given) == [by_loops(logits, temperature, top_k, top_p, min_p, u)]


# ---------------------------------------------------------------------------------------------------------- borders

HALVES = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2, 3}),  # the third and the fourth are as likely
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"top_k": 1 << 31}, {0, 1, 2, 3}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2, 3}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # a share of what top_k kept: 2/3 and 1/3
        ({"top_k": 2, "top_p": 0.7}, {0, 1}),
        ({"min_p": 0.51}, {0}),
        ({"min_p": 0.49}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"temperature": 2.0, "min_p": 0.69}, {0, 1}),  # of the probabilities after the temperature
    ],
)
def test_what_is_kept(values: dict[str, float], want: set[int]) -> None:
    assert kept(HALVES, **values) == want


def test_equal_logits_are_kept_or_left_together() -> None:
    tied = [1.0, 0.0, 1.0, 1.0, -1.0]
    assert kept(tied, top_k=1) == kept(tied, top_p=0.0) == kept(tied, top_p=0.2) == kept(tied, min_p=1.0) == {0, 2, 3}
    assert kept([2.0] * 4, top_p=0.5) == {0, 1, 2, 3}, "an exact border: nothing is more likely than the others"
    assert drawn(torch.tensor([tied]), choices(temperature=0.0)) == [0], "the lowest of the ids"


def test_exactly_top_p_is_enough() -> None:
    """Of 4 and 4 equal tokens of relative weight 1 and 2^-2: the first hold 4/5."""
    row = [0.0] * 4 + [-2 * math.log(2)] * 4
    weights = [int(w * ONE) for w in torch.tensor(row).exp().tolist()]
    exact = sum(weights[:4]) / sum(weights)
    assert kept(row, top_p=exact - 1e-9) == {0, 1, 2, 3}
    assert kept(row, top_p=exact + 1e-9) == set(range(8))


def test_one_token_that_is_possible() -> None:
    row = [-INF] * 9
    row[7] = -30.0
    for values in (
        {},
        {"top_k": 3},
        {"top_p": 0.9},
        {"min_p": 0.5},
        {"temperature": 0.0},
        {"temperature": 1e-30},
        {"temperature": 5e-324},
    ):
        assert kept(row, **values) == {7}


@pytest.mark.parametrize("bad", [[1.0, math.nan, 0.0], [1.0, INF, 0.0], [-INF] * 3, [math.nan] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_distribution_is_an_error_and_no_token(bad: list[float], temperature: float) -> None:
    rows = torch.tensor([[0.0, 5.0, 0.0], bad])
    found = Sampled.of(sample(rows, choices(2, temperature=temperature, top_p=0.9)))
    assert found.tokens == [1, -1]
    with pytest.raises(KtransError, match="logits of row 1 of 2 are no distribution: they hold NaN or"):
        found.ids()


def test_settings_and_shapes_that_are_refused() -> None:
    for values in ({"top_p": 1.1}, {"temperature": -1}, {"min_p": math.nan}):
        with pytest.raises(RulesError, match="allowed is"):
            Sampling(**values)
    for shape in ((4,), (1, 0)):
        with pytest.raises(ValueError, match="logits must be"):
            sample(torch.zeros(shape), choices())


def test_the_kept_are_those_of_transformers() -> None:
    """Where nothing is tied; its order of warpers is ours."""
    for seed in range(20):
        row = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
        top_k, top_p, min_p = (0, 7)[seed % 2], (1.0, 0.8)[seed // 2 % 2], (0.0, 0.2)[seed // 4 % 2]
        warpers = LogitsProcessorList([TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)])
        if top_k:
            warpers.insert(0, TopKLogitsWarper(top_k))
        want = warpers(torch.zeros(1, 1, dtype=torch.int64), row)[0].isfinite()  # type: ignore[arg-type]
        found: set[int] = set()
        for u in torch.linspace(0, HIGHEST, 1000, dtype=torch.float64).tolist():
            found |= set(Sampled.of(sample(row, choices(u=u, top_k=top_k, top_p=top_p, min_p=min_p))).ids())
        assert found == set(want.nonzero()[:, 0].tolist())


# ------------------------------------------------------------------------------------------------------- statistics


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Standard deviations that the statistic is above its mean; about normal for many degrees of freedom."""
    freedom = len(expected) - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("what", ["positions", "seeds"])
def test_uniforms_are_uniform(what: str) -> None:
    """Of one seed over positions, of one position over neighbouring seeds; and each says nothing about the next."""
    found = torch.tensor([uniform(7, i) if what == "positions" else uniform(i, 7) for i in range(20_000)]).double()
    assert found.min() >= 0 and found.max() < 1
    bins = (found * 50).long()
    assert chi_square(bins.bincount(minlength=50), torch.full((50,), 400.0)) < 3.5
    pairs = (bins[:-1] // 5) * 10 + bins[1:] // 5
    assert chi_square(pairs.bincount(minlength=100), torch.full((100,), 199.99)) < 3.5


@pytest.mark.parametrize("values", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_tokens_have_their_probabilities(values: dict[str, float]) -> None:
    row = torch.randn(12, generator=torch.Generator().manual_seed(0))
    count = 20_000
    given = Choices.of([Sampling(1.0, 1.0, seed=3)] * count, range(count))
    given = Choices(**{**vars(given), **{k: torch.full((count,), v).double() for k, v in values.items()}})
    found = torch.tensor(drawn(row.expand(count, -1), given)).bincount(minlength=12)
    probabilities = (row / values.get("temperature", 1)).softmax(0)
    order = probabilities.argsort(descending=True)
    few = 12
    if "top_k" in values:
        few = int(values["top_k"])
    if "top_p" in values:
        few = int((probabilities[order].cumsum(0) < values["top_p"]).sum()) + 1
    if "min_p" in values:
        few = int((probabilities >= values["min_p"] * probabilities.max()).sum())
    left = order[:few]
    assert found.sum() == found[left].sum() == count
    assert chi_square(found[left], count * probabilities[left] / probabilities[left].sum()) < 3.5


def test_log_probabilities_are_of_the_logits_as_given() -> None:
    rows = torch.randn(5, 33, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = Sampled.of(sample(rows, choices(5, temperature=0.3, top_k=3)))
    want = rows.float().log_softmax(-1).gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    assert found.logprobs == want.tolist()


# --------------------------------------------------------------------------------------------------- reproducibility


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    requests = [Sampling(t, p, k, m, seed=s) for s, (t, p, k, m) in enumerate([
        (0.0, 1.0, 0, 0.0), (0.6, 0.95, 0, 0.0), (1.0, 1.0, 0, 0.0), (1.0, 1.0, 50, 0.0), (2.0, 0.9, 900, 0.01),
        (1.3, 1.0, 0, 0.1), (0.6, 0.95, 0, 0.0),
    ])]  # fmt: skip
    logits = 3 * torch.randn(7, 3001, generator=torch.Generator().manual_seed(2))
    positions = [5, 9, 0, 100, 1 << 20, 3, 9]
    alone = [
        drawn(logits[i : i + 1], Choices.of([r], [p]))[0]
        for i, (r, p) in enumerate(zip(requests, positions, strict=True))
    ]
    for order in ([6, 5, 4, 3, 2, 1, 0], [1, 1, 1], [0, 4], [2, 5, 0]):
        rows = [requests[i] for i in order], [positions[i] for i in order]
        given = Choices.of(*rows)
        assert drawn(logits[order], given) == [alone[i] for i in order]
        assert Choices.numbers(*rows) == given.packed().flatten().tolist()
    there = Choices.unpacked(given.packed())
    assert all(torch.equal(a, b) for a, b in zip(vars(there).values(), vars(given).values(), strict=True))


def test_a_seed_of_its_own() -> None:
    assert Sampling(seed=5).seeded() == Sampling(seed=5)
    assert Sampling().seeded().seed != Sampling().seeded().seed
    assert uniform(5, 3) == uniform(5 + (1 << 64), 3) != uniform(5, 4)
    assert uniform(-1, 0) == uniform((1 << 64) - 1, 0)


def test_a_conversation_is_repeated_by_its_seed() -> None:
    """And in the cache or not, its tokens are the same: they depend on their places."""
    opened = open_checkpoint()
    model: Any = load(opened, target=Target((detect().host,)), context=64)
    stop = stop_tokens(opened.tokenizer, opened.generation)
    prompt = opened.tokenizer("What is the capital of")["input_ids"]

    def answer(seed: int, chunk: int = 64) -> str:
        model.chunk = chunk
        session = Session(model, opened.tokenizer, Sampling(1.5, 1.0, seed=seed), stop)
        first = "".join(session.stream(prompt, 12))
        assert "".join(session.stream(prompt, 12)) == first and session.statistics.reused > 0
        return first

    assert answer(1) == answer(1, chunk=3) != answer(2)


def test_tokens_of_a_step_are_those_of_its_logits() -> None:
    model: Any = load(target=Target((detect().host,)), context=64)
    how = [Sampling(0.0), Sampling(2.0, seed=4)]
    given = Choices.of(how, [3, 2])
    ids, positions, keep = torch.arange(5, 10), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 4])
    logits = model.step(ids, positions, [3, 2], keep, model.new_cache(2))
    cache = model.new_cache(2)
    found = model.next_tokens(ids.tolist(), positions.tolist(), [3, 2], keep.tolist(), cache, how)
    assert cache.lengths == [3, 2]
    assert found.ids() == Sampled.of(sample(logits, given)).ids()
    assert found.ids()[0] == int(logits[0].argmax())


class Watched(TorchDispatchMode):
    """Notes every operation, and refuses those that a graph cannot record: values from the host, or for it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
        assert {t.device.type for t in tensors} == {"meta"}, f"{func} has a tensor on the host"
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.names.append(str(func))
        return found


@pytest.mark.parametrize("rows", [1, 3])
def test_a_graph_can_record_it(rows: int) -> None:
    """Away from the host every tensor is made there and no value is read: on the device that has none, `meta`."""
    packed = torch.zeros(Choices.shape(rows), dtype=torch.int64, device="meta")
    logits = torch.zeros(rows, 129280, dtype=torch.bfloat16, device="meta")
    with Watched() as watched:
        found = sample(logits, Choices.unpacked(packed))
    assert (found.shape, found.dtype) == ((2, rows), torch.float64)
    assert len(watched.names) < 80
