"""CUDA has no memory left in the middle of a call: that call says what was asked, and the next one works."""

import gc
from copy import deepcopy
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from ktcompile import CapacityError, Kernel, Target, load
from ktcompile.backends.reference import Reference
from ktcompile.backends.torch_mla import TorchMLA
from ktcompile.memory import out_of_memory
from ktcompile.sampling import Sampling
from ktcompile.target import detect

FULL = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 1 has a total capacity of 23.65 GiB."


@pytest.fixture(scope="module")
def model() -> Any:
    return load(target=Target((detect().host,)), dtype="fp32", context=64)


def step(model: Any, cache: Any, ids: list[int]) -> Tensor:
    positions = torch.arange(cache.lengths[0], cache.lengths[0] + len(ids))
    logits: Tensor = model.step(torch.tensor(ids), positions, [len(ids)], torch.tensor([len(ids) - 1]), cache)
    return logits


def failing(monkeypatch: pytest.MonkeyPatch, path: str) -> list[Any]:
    """From now on the kernel of this region finds no memory; what it is given is remembered weakly."""
    seen = list[Any]()

    def full(kernel: type[Kernel]) -> None:
        real = kernel.__call__

        def call(self: Kernel, packed: Any, region: Any, *inputs: Any) -> Any:
            if region.path.endswith(path):
                seen.extend(ref(i) for i in inputs if isinstance(i, Tensor))
                raise torch.OutOfMemoryError(FULL)
            return real(self, packed, region, *inputs)

        monkeypatch.setattr(kernel, "__call__", call)

    full(Reference)
    full(TorchMLA)
    return seen


@pytest.mark.parametrize("ids", [[5, 6, 7], [5]], ids=["prefill", "decode"])
@pytest.mark.parametrize("path", ["layers.3.self_attn", "lm_head"])
def test_the_next_call_works(model: Any, monkeypatch: pytest.MonkeyPatch, ids: list[int], path: str) -> None:
    """The cache holds what it held; no value of the failed call is left."""
    one, other = model.new_cache(), model.new_cache()
    for cache in (one, other):
        step(model, cache, [1, 2, 3, 4])
    want = step(model, one, ids)
    with monkeypatch.context() as full:
        seen = failing(full, path)
        with pytest.raises(CapacityError) as error:
            step(model, other, ids)
        assert len(seen) > 0
        assert str(error.value) == (
            f"cuda:1 is out of memory for 1.50 GiB more: asked was a step of {len(ids)} tokens for 1 requests, the "
            "longest of 4 tokens of 64. Ask for fewer tokens at once, load with a shorter context, or end what else "
            "uses this GPU"
        )
        gc.collect()
        kept = {id(t) for t in (*other.pools, other.page_table, other.seq_len, other.query_start)}
        assert not [r().shape for r in seen if r() is not None and id(r()) not in kept]
    assert other.lengths == [4]
    assert torch.equal(step(model, other, ids), want)


def test_choosing_tokens_finds_no_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.new_cache()
    step(model, cache, [1, 2, 3])

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("ktcompile.model.sample", full)
    with pytest.raises(CapacityError, match="asked was a step of 2 tokens"):
        model.next_tokens([4, 5], [3, 4], [2], [1], cache, [Sampling(0.0)])
    assert cache.lengths == [3]


def test_a_cache_that_nobody_holds_is_gone(model: Any) -> None:
    """Without waiting for a collection: a call that brings no cache makes one."""
    gc.collect()
    gc.disable()
    try:
        held = model.new_cache()
        alive = ref(model(torch.tensor([[1, 5, 9]]), past_key_values=held).past_key_values)
        pool = ref(held.pools[0])
        copied = deepcopy(held)
        del held
        assert alive() is pool() is None
        assert copied.layers[0].owner is copied and copied.lengths == [3]
    finally:
        gc.enable()


def test_a_cache_that_is_too_large(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("HIP out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", full)
        with pytest.raises(CapacityError, match="asked was a cache for 3 requests of 64 tokens"):
            model.new_cache(3)
    assert model.new_cache(3).requests == 3


def test_graphs_of_the_cache_are_let_go_first() -> None:
    freed: list[str] = []
    with pytest.raises(CapacityError, match=r"^cuda:0 is out of memory: asked was all\. "):
        with out_of_memory("all", lambda: freed.append("now")):
            raise torch.OutOfMemoryError("no numbers in it")
    assert freed == ["now"]
    with pytest.raises(RuntimeError, match="another error"):
        with out_of_memory("all", lambda: freed.append("no")):
            raise RuntimeError("another error")
    assert freed == ["now"]
