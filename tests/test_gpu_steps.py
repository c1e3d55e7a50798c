"""Steps on a real GPU that fail, are watched, or share it: nothing hangs, and the next step is right."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_triton_mla import DEVICE
from torch import Tensor

from ktcompile import CapacityError, load
from ktcompile.sampling import Sampling, sample

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU")
GREEDY = Sampling(0.0)
SECONDS = 120
"""A step that hangs is not waited for; the first of a process compiles kernels."""


@pytest.fixture(scope="module")
def model() -> Any:
    return load(context=256)


def soon(work: Callable[[], Any]) -> Any:
    """Its result or error; it fails if that takes too long."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if failed:
        raise failed[0]
    assert found, f"it hangs: {SECONDS} s"
    return found[0]


def said(model: Any, cache: Any, rows: int, steps: int) -> list[list[int]]:
    """Greedy tokens of as many rows, which begin differently; each step is one of decode."""
    tokens = [[20 + row] for row in range(rows)]
    for _ in range(steps):
        at, ids = [*cache.lengths], [t[-1] for t in tokens]
        found = model.next_tokens(ids, at, [1] * rows, range(rows), cache, [GREEDY] * rows)
        for row, token in zip(tokens, found.ids(), strict=True):
            row.append(token)
    return tokens


def test_no_memory_while_a_step_is_recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last thing of a step fails when all its layers are under way, with the CPU's experts in them."""
    want = soon(lambda: said(model, model.new_cache(2), 2, 8))

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")

    cache = model.new_cache(2)
    with monkeypatch.context() as patched:
        patched.setattr("ktcompile.model._sampled", full)
        with pytest.raises(CapacityError, match=r"out of memory for 1\.50 GiB more"):
            soon(lambda: said(model, cache, 2, 1))
    assert cache.lengths == [0, 0]
    assert soon(lambda: said(model, cache, 2, 8)) == want


def test_no_memory_left_for_the_recording_itself(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first run was well; a step that was recorded before goes on."""
    earlier = model.new_cache(2)
    want = soon(lambda: said(model, earlier, 2, 8))
    whole = sample

    def full(*args: Any) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")
        return whole(*args)

    cache = model.new_cache(3)
    with monkeypatch.context() as patched:
        patched.setattr("ktcompile.model.sample", full)
        with pytest.raises(CapacityError, match=r"out of memory for 1\.50 GiB more"):
            soon(lambda: said(model, cache, 3, 1))
    earlier.clear()
    assert soon(lambda: said(model, earlier, 2, 8)) == want
    assert soon(lambda: said(model, cache, 3, 8))[:2] == want


def test_another_error_while_a_step_is_recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = soon(lambda: said(model, model.new_cache(3), 3, 8))

    def interrupted(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    cache = model.new_cache(3)
    with monkeypatch.context() as patched:
        patched.setattr("ktcompile.model._sampled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            soon(lambda: said(model, cache, 3, 1))
    assert soon(lambda: said(model, cache, 3, 8)) == want
    assert model.graphs[3] == ""


def test_it_is_asked_what_it_did_while_it_records(model: Any) -> None:
    """As a server is, by whoever looks at its page."""
    over = threading.Event()
    seen: list[float] = []

    def watch() -> None:
        while not over.is_set():
            seen.append(model.work().gpu_s)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        for rows in (4, 5, 6, 7):
            soon(lambda rows=rows: said(model, model.new_cache(rows), rows, 3))  # type: ignore[misc]
    finally:
        over.set()
        watcher.join()
    assert {rows: model.graphs[rows] for rows in (4, 5, 6, 7)} == dict.fromkeys((4, 5, 6, 7), "")
    assert seen == sorted(seen) and model.work().gpu_s > 0


def test_recorded_steps_share_memory(model: Any) -> None:
    """What one leaves another uses; a pool that nobody uses any more is not asked for."""
    caches = [model.new_cache(rows) for rows in (3, 1, 2)]
    want = [soon(lambda cache=cache: said(model, cache, cache.requests, 8)) for cache in caches]  # type: ignore[misc]
    held = model.step.__self__._recorded
    assert len({graph.pool() for cache in caches for step in held[cache].values() for graph in step._graphs}) == 1
    for cache in caches:
        cache.clear()
    assert [said(model, cache, cache.requests, 8) for cache in caches] == want
    del held, cache
    caches.clear()
    gc.collect()
    assert soon(lambda: said(model, model.new_cache(2), 2, 8)) == want[2]


def test_a_recorded_step_outlives_others(model: Any) -> None:
    """What cuBLAS worked with while it was recorded is still its own, whatever else was let go and given away."""
    cache = model.new_cache(2)

    def both() -> list[list[int]]:
        found = said(model, cache, 2, 8)
        said(model, model.new_cache(3), 3, 8)  # on the same stream, and let go
        return found

    want = soon(both)
    gc.collect()
    torch.cuda.empty_cache()
    taken = [torch.ones(size << 18, device=DEVICE) for size in (1, 2, 4, 8, 16, 32, 64) * 4]  # of MiB
    cache.clear()
    assert soon(lambda: said(model, cache, 2, 8)) == want
    assert all(bool((held == 1).all()) for held in taken)


def test_two_models_take_turns(model: Any) -> None:
    """One ends its steps, and is idle, while the other is in the middle of one."""
    longer, shorter = (model, model.new_cache(1), 100), ((other := load(context=64)), other.new_cache(1), 50)
    found: dict[int, list[list[int]]] = {}

    def run(model: Any, cache: Any, steps: int) -> None:
        found[steps] = said(model, cache, 1, steps)

    for each, cache, _ in (longer, shorter):
        soon(lambda each=each, cache=cache: said(each, cache, 1, 2))  # type: ignore[misc]
        cache.clear()
    threads = [threading.Thread(target=run, args=args, daemon=True) for args in (longer, shorter)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    (want,) = soon(lambda: said(model, model.new_cache(1), 1, 100))
    assert found == {100: [want], 50: [want[:51]]}


def test_pages_come_as_they_are_needed(model: Any) -> None:
    """As a server gives them: the page table is the same tensor, with other pages in it every 16 tokens."""
    want = soon(lambda: said(model, model.new_cache(1), 1, 70))
    batch = model.new_cache(1, 128).batch(1, 128)

    def paged() -> list[int]:
        pages, tokens = list[int](), [20]
        for at in range(70):
            if at % 16 == 0:
                pages.append((3, 5, 1, 0, 7)[at // 16])
            batch.assign(0, pages, at)
            tokens += model.next_tokens(tokens[-1:], [at], [1], [0], batch, [GREEDY]).ids()
        return tokens

    assert [soon(paged)] == want
