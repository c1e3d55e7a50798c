"""What capture.py knows of torch and transformers: how dynamo counts graphs, which attention a class has."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import GptOssForCausalLM, MixtralForCausalLM

from ktcompile.capture import attention_of, graph_limit, graph_number


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class _Backend:
    """Notes the number of each graph; fails while `broken`."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.broken = False

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.numbers.append(graph_number())
        if self.broken:
            raise ValueError("broken")
        return gm.forward


def test_graphs_are_counted_by_function() -> None:
    backend = _Backend()

    def first(x: Tensor) -> Tensor:
        return x + 1

    def second(x: Tensor) -> Tensor:
        return x + 2

    both = [torch.compile(f, backend=backend, dynamic=False) for f in (first, second)]
    for size in range(2, 5):
        for f in both:
            f(torch.zeros(size))
    assert backend.numbers == [1, 1, 2, 2, 3, 3]
    both[0](torch.zeros(3))  # a graph that dynamo has
    assert len(backend.numbers) == 6


def test_the_limit_is_dynamo_s() -> None:
    """Past graph number `graph_limit()` dynamo asks no backend, and runs the function eagerly."""
    backend = _Backend()
    f = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    for size in range(2, 2 + graph_limit() + 3):
        f(torch.zeros(size))
    assert backend.numbers == list(range(1, graph_limit() + 1))


def test_failed_compilations_are_not_graphs() -> None:
    backend = _Backend()
    f = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    f(torch.zeros(2))
    backend.broken = True
    for _ in range(5):
        with pytest.raises(Exception, match="broken"):
            f(torch.zeros(3))
    backend.broken = False
    f(torch.zeros(3))
    assert backend.numbers == [1, 2, 2, 2, 2, 2, 2]


def test_attempts_have_a_limit_of_their_own() -> None:
    """Past it dynamo runs eagerly too, however few graphs it has."""
    backend = _Backend()
    backend.broken = True
    f = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(accumulated_recompile_limit=10):
        for _ in range(10):
            with pytest.raises(Exception, match="broken"):
                f(torch.zeros(2))
        backend.broken = False
        f(torch.zeros(2))
    assert backend.numbers == [1, 1, 1, *range(2, 9)]
    assert backend.numbers[-1] == graph_limit()


def test_outside_of_dynamo() -> None:
    assert graph_number() == 1


def test_attention() -> None:
    """Sinks are what sdpa does not have."""
    assert attention_of(MixtralForCausalLM) == "sdpa"
    assert attention_of(GptOssForCausalLM) == "eager"
