"""A decode step of fixed addresses, with the experts handed over to the CPU, is the step that runs op by op.

Without a GPU the same graph runs eagerly: Triton's kernels interpreted, flags polled by this thread.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from test_families import opened
from test_simulated_gpu import HOST, gpu, without_planes
from torch import Tensor

from ktcompile import Target
from ktcompile.backends.handover import Flags, HostFunctions
from ktcompile.errors import KtransError
from ktcompile.model import _sampled, load
from ktcompile.sampling import Choices, Sampled, Sampling, sample
from ktcompile.step_graph import Recordings, StepGraph, StreamedStep, handover
from ktcompile.step_parts import NotCapturable, with_handovers

MAIN = torch.device("cpu:1")
LAYERS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rules = without_planes(tmp_path_factory.mktemp("rules"))  # those take minutes in the interpreter
    return load(target=gpu(1 << 30), dtype="fp32", context=64, rules=rules)


def graph_of(model: Any, cache: Any, **options: Any) -> StepGraph:
    count = cache.requests
    state = {f"cache.layers.{i}.pool": pool for i, pool in enumerate(cache.pools)}
    state["cache.page_table"] = cache.all_pages
    shapes = {
        "ids": (1, count),
        "positions": (1, count),
        "keep": (count,),
        "cache.seq_len": (count,),
        "cache.query_start": (count + 1,),
    }
    if "last" in options:
        shapes["choices"] = Choices.shape(count)
    executable = model.phases["decode" if count == 1 else "prefill"]
    return StepGraph(executable, MAIN, count, state, shapes, **options)


def step(model: Any, cache: Any, ids: list[int]) -> Tensor:
    count = len(ids)
    logits: Tensor = model.step(torch.tensor(ids), torch.tensor(cache.lengths), [1] * count, torch.arange(count), cache)
    return logits


def check_choices(model: Any, one: Any, graph: StepGraph, other: Any, temperatures: tuple[float, ...]) -> None:
    """Steps of two requests whose settings change: the graph on `other` chooses what follows from `one`."""
    rows = 2
    for i, temperature in enumerate(temperatures):
        choices = Choices.of([Sampling(temperature, seed=1), Sampling(1.0, 1.0, top_k=3, seed=2)], [i + 1] * rows)
        want = step(model, one, [5 + i, 9 + i])
        other.check([1] * rows)
        numbers = [5 + i, 9 + i, *other.lengths, *range(rows), *other.rows(), *choices.packed().flatten().tolist()]
        found = Sampled.of(graph(numbers))
        other.advance()
        wanted = Sampled.of(sample(want, choices))
        assert found.ids() == wanted.ids() and found.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


def check_streamed(model: Any, one: Any, streamed: StreamedStep, other: Any, counts: list[int]) -> None:
    """A step that brings so many tokens of each request: logits on `other` are those of `one`."""
    total = sum(counts)
    ids = torch.arange(20, 20 + total)
    positions = torch.cat([n + torch.arange(c) for n, c in zip(one.lengths, counts, strict=True)])
    keep = torch.arange(total)
    want = model.step(ids, positions, counts, keep, one)
    other.begin(counts)
    values = {"ids": ids[None], "positions": positions[None], "keep": keep}
    values |= {f"cache.{n}": getattr(other, n) for n in ("page_table", "seq_len", "query_start")}
    values |= {f"cache.layers.{i}.pool": pool for i, pool in enumerate(other.pools)}
    got = streamed(values)[0]
    other.advance()
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("requests", [1, 3])
def test_the_same_logits_as_region_by_region(model: Any, requests: int) -> None:
    one, other = model.new_cache(requests), model.new_cache(requests)
    graph = graph_of(model, other)
    for i in range(3):
        ids = [5 + 7 * i + r for r in range(requests)]
        want = step(model, one, ids)
        other.check([1] * requests)
        got = graph([*ids, *other.lengths, *range(requests), *other.rows()])[0].clone()
        other.advance()
        assert (got - want).norm() <= 1e-5 * want.norm()  # another width of the page table, so another order of sums
    for a, b in zip(one.pools, other.pools, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    graph.close()


def test_rows_of_a_batch(model: Any) -> None:
    """Requests that share the pools of one cache, in pages told row by row, some of which change their row."""
    own, pool = model.new_cache(2), model.new_cache(1, 96)
    batch = pool.batch(2, 64)
    graph = graph_of(model, batch)
    tables = [[4], [1]]
    for i, lengths in enumerate(([0, 0], [1, 1], [2, 2])):
        ids = [9 + i, 20 + i]
        want = step(model, own, ids)
        if i == 2:
            ids, want, tables = ids[::-1], want.flip(0), tables[::-1]
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            batch.assign(row, table, length)
        batch.check([1, 1])
        got = graph([*ids, *lengths, 0, 1, *batch.rows()])[0].clone()
        assert (got - want).norm() <= 1e-5 * want.norm()
    assert all(p is q for p, q in zip(batch.pools, pool.pools, strict=True))
    assert {int(n) for n in pool.pools[0].flatten(1).any(1).nonzero()} == {1, 4}
    graph.close()


def test_a_rotation_by_complex_numbers(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite has a graph like others: what its kernel reads of complex numbers are views."""
    lite = load(opened("deepseek_v2_lite", tmp_path), target=gpu(1 << 30), dtype="fp32", context=64)
    test_the_same_logits_as_region_by_region(lite, 2)


def test_every_region_on_the_cpu_is_two_points(model: Any) -> None:
    cache = model.new_cache(1)
    graph = graph_of(model, cache)
    names = [str(n.target) for n in graph.gm.graph.nodes if n.op == "call_module"]
    submits, waits = ([n for n in names if n.endswith(end)] for end in ("_submit", "_wait"))
    assert len(submits) == len(waits) == len(graph.prepared) > 0
    for one, other in zip(submits, waits, strict=True):
        shared = one.replace("experts_submit", "shared_experts")
        assert names.index(one) < names.index(shared) < names.index(other), "the shared expert runs meanwhile"
    assert not any("copy_to" in str(n.target) for n in graph.gm.graph.nodes)
    graph.close()
    assert graph.prepared == []


class Recorded:
    """A CUDA graph without a GPU, with a pool of its own or another's."""

    def __init__(self) -> None:
        self.own: Any = object()

    def pool(self) -> Any:
        return self.own


def test_recordings_share_a_pool(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which that of cuBLAS is in; a recording that failed leaves its pool in no state that is known."""
    did: list[Any] = []

    @contextmanager
    def recording(graph: Recorded, pool: Any, *_: Any, **__: Any) -> Iterator[None]:
        did.append(pool)
        graph.own = pool or graph.own
        yield
        did.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr("ktcompile.step_graph.forget_workspaces", lambda: did.append("clear"))

    beside = Recordings()

    def recorded(error: type[BaseException] | None = None) -> tuple[Any, list[Any]]:
        step = graph_of(model, model.new_cache(1), beside=beside)
        monkeypatch.setattr(step, "_record", Mock(side_effect=error("no") if error else None))
        start = len(did)
        try:
            return step._captured(step.parts[0], []), did[start:]
        finally:
            step.close()

    first, events = recorded()
    assert events == ["clear", None, "end", "clear"]
    second, events = recorded()
    assert events == ["clear", first.pool(), "end", "clear"] and second.pool() is first.pool()
    with pytest.raises(torch.OutOfMemoryError):
        recorded(torch.OutOfMemoryError)
    assert did[-1] == "clear" and recorded()[0].pool() is first.pool(), "it may fit another time"
    with pytest.raises(NotCapturable, match="CUDA refused to record it: no"):
        recorded(RuntimeError)
    third, events = recorded()
    assert events[1] is None
    with pytest.raises(KeyboardInterrupt):
        recorded(KeyboardInterrupt)
    fourth, events = recorded()
    assert events[1] is None and fourth.pool() not in (first.pool(), third.pool())
    del fourth
    gc.collect()
    assert recorded()[1][1] is None, "a pool that nobody uses is not asked for"


def test_a_step_can_end_with_the_choice_of_tokens(model: Any) -> None:
    """Whose settings change from call to call of one graph; the logits stay."""
    one, other = model.new_cache(2), model.new_cache(2)
    graph = graph_of(model, other, last=_sampled)
    check_choices(model, one, graph, other, (0.0, 3.0))
    graph.close()


def test_an_error_of_the_cpu_is_raised_and_the_next_step_works(model: Any) -> None:
    cache = model.new_cache(1)
    graph = graph_of(model, cache)
    cache.check([1])
    numbers = [5, 0, 0, *cache.rows()]
    want = graph(numbers).clone()
    submit = graph.gm.get_submodule(next(str(n.target) for n in graph.gm.graph.nodes if "_submit" in str(n.target)))
    send = submit.handover.submit
    submit.handover.submit = lambda x, ids, scores: send(x, torch.full_like(ids, 1 << 20), scores)
    with pytest.raises(ValueError, match="ids lie in"):
        graph(numbers)
    submit.handover.submit = send
    assert torch.equal(graph(numbers), want)


def test_steps_of_any_size_on_the_stream(model: Any) -> None:
    """Prefill of two requests, then less and less, prepared once for the largest: what runs region by region."""
    one, other = model.new_cache(2), model.new_cache(2)
    streamed = StreamedStep(model.phases["prefill"], MAIN, 16)
    assert all(a.inputs[0] is b.inputs[0] for a, b in zip(streamed.prepared, streamed.prepared[1:], strict=False))
    for counts in ([7, 9], [3, 0], [1, 1]):
        check_streamed(model, one, streamed, other, counts)
    with pytest.raises(ValueError, match="17 tokens"):
        streamed.prepared[0].resize(17)
    streamed.close()


def test_what_cannot_be_handed_over_is_named() -> None:
    plain = load(target=Target((HOST,)), dtype="fp32", context=64)
    with pytest.raises(NotCapturable, match="runs on cpu by reference, which waits for the host"):
        with_handovers(plain.phases["decode"], MAIN, 1, Flags)


def test_the_way_of_handing_over_is_found_or_what_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert handover() is Flags
    assert "no GPU" in str(HostFunctions.missing())
    monkeypatch.setattr(Flags, "missing", staticmethod(lambda: "no stream waits"))
    with pytest.raises(KtransError, match=r"a-flags: no stream waits; b-host-functions: there is no GPU"):
        handover()
