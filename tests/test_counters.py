"""What a model counts of its work: exact bytes, seconds that others are not asked to wait for."""

import time
from contextlib import suppress
from typing import Any

import pytest
import torch

import ktcompile
from ktcompile import counters
from ktcompile.backends import native
from ktcompile.counters import StreamClock
from ktcompile.target import Target, detect

EXPERTS, HIDDEN, WIDTH = 8, 64, 32
TYPES = ("q8_0", "q4_0", "bf16")


@pytest.fixture(scope="module")
def weights() -> native.MoeWeights:
    def packed(type: str, rows: int, cols: int) -> torch.Tensor:
        one = native.pack(torch.randn(rows, cols), "f32", "bf16", rows, cols) if type == "bf16" else None
        if one is None:
            raw = native.quantize(torch.randn(rows, cols), type)
            assert isinstance(raw, torch.Tensor)
            one = native.pack(raw, type, type, rows, cols)
        return one.repeat(EXPERTS, 1)

    gate, up = (packed(t, WIDTH, HIDDEN) for t in TYPES[:2])
    down = packed(TYPES[2], HIDDEN, WIDTH)
    return native.MoeWeights(EXPERTS, HIDDEN, WIDTH, "silu", gate, up, down, *TYPES, tile_tokens=0)


def run(pool: native.Pool, weights: native.MoeWeights, ids: list[list[int]]) -> None:
    chosen = torch.tensor(ids)
    native.moe(pool, "scalar", weights, torch.randn(len(ids), HIDDEN), chosen, torch.ones(chosen.shape))


SIZES = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
EXPERT_BYTES = sum(native.packed_bytes(t, *size) for t, size in zip(TYPES, SIZES, strict=True))


@pytest.mark.parametrize(
    ("ids", "experts"),
    [
        ([[3, 5]], 2),
        ([[3, 5], [5, 3]], 2),
        ([[0, 1], [2, 3], [4, -1]], 5),
        ([[-1, -1]], 0),
        ([[i, 7] for i in range(7)] * 9, 8),
    ],
)
def test_bytes_of_a_call_are_those_of_its_experts(
    pool: native.Pool, weights: native.MoeWeights, ids: list[list[int]], experts: int
) -> None:
    before, start = pool.counts(), time.perf_counter()
    run(pool, weights, ids)
    after, took = pool.counts(), time.perf_counter() - start
    assert (after.runs - before.runs, after.nbytes - before.nbytes) == (1, experts * EXPERT_BYTES)
    assert 0 < after.seconds - before.seconds < took


def test_a_call_that_is_refused_counts_nothing(pool: native.Pool, weights: native.MoeWeights) -> None:
    before = pool.counts()
    with pytest.raises(ValueError, match="ids lie in"):
        run(pool, weights, [[3, EXPERTS]])
    assert pool.counts() == before


def test_a_closed_pool_has_no_counts() -> None:
    pool = native.Pool(1)
    pool.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        pool.counts()


def test_a_model_counts_its_steps() -> None:
    model: Any = ktcompile.load(target=Target((detect().host,)))
    before = model.work()
    model(torch.tensor([[1, 5, 9]]))
    first = model.work()
    model(torch.tensor([[1]]))
    second = model.work()
    assert before.gpu_s is first.gpu_s is None
    assert 0 < second.expert_bytes - first.expert_bytes < first.expert_bytes - before.expert_bytes
    assert before.cpu_moe_s < first.cpu_moe_s < second.cpu_moe_s


class Event:
    """A CUDA event that is over when the test says so; it has the time at which it was recorded."""

    over = True
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return Event.over

    def elapsed_time(self, end: "Event") -> float:
        assert Event.over
        return (end.at - self.at) * 1e3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StreamClock:
    monkeypatch.setattr(counters.torch.cuda, "Event", Event)
    monkeypatch.setattr(counters.torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "over", True)
    monkeypatch.setattr(Event, "now", 0.0)
    return StreamClock(torch.device("cuda:0"))


def step(clock: StreamClock, seconds: float) -> None:
    with clock.step():
        Event.now += seconds
    Event.now += 100.0  # between steps


def test_a_step_counts_once_it_is_over(clock: StreamClock, monkeypatch: pytest.MonkeyPatch) -> None:
    step(clock, 2.0)
    assert clock.seconds == 2.0
    monkeypatch.setattr(Event, "over", False)
    step(clock, 3.0)
    step(clock, 0.5)
    assert clock.seconds == 2.0  # nobody waited
    monkeypatch.setattr(Event, "over", True)
    assert clock.seconds == 5.5


def test_a_step_that_fails_does_not_count(clock: StreamClock) -> None:
    with suppress(RuntimeError), clock.step():
        Event.now += 1.0
        raise RuntimeError
    step(clock, 2.0)
    assert clock.seconds == 2.0
