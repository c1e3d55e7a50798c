"""PagedCache under unmodified Hugging Face models, and its ops against lists of rows."""

from typing import Any

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ktcompile import CapacityError
from ktcompile.cache import PagedCache, row_layout
from ktcompile.symbols import PAGE

ops = torch.ops.ktrans


def rows(cache: PagedCache, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random `[1, heads, tokens, dim]` keys and values, or latents and rotated keys."""
    generator = torch.Generator().manual_seed(seed)
    row = cache.row
    return (
        torch.randn(1, row.heads, tokens, row.first, generator=generator),
        torch.randn(1, row.heads, tokens, row.second, generator=generator),
    )


def step(cache: PagedCache, counts: list[int], seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """One ragged step of every layer: the rows given to each request (layer 0), and what layer 0 returned."""
    cache.begin(counts)
    given_keys, given_values = rows(cache, sum(counts), seed)
    outs = [cache.update(given_keys + i, given_values + i, i) for i in range(len(cache.layers))]
    cache.advance()
    cache.columns = max(cache.lengths)
    both = torch.cat([given_keys.transpose(1, 2).flatten(2), given_values.transpose(1, 2).flatten(2)], -1)[0]
    return list(both.split(counts)), *outs[0]


def stored(cache: PagedCache, request: int, keys: Tensor, values: Tensor) -> Tensor:
    """The rows of one request in what `update` returned, `[length, width]`."""
    flat = torch.cat([x.transpose(1, 2).flatten(2) for x in (keys, values)], -1)[0]
    each = flat.shape[0] // cache.requests
    return flat[request * each : request * each + cache.lengths[request]]


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("family", "name", "heads", "width"),
    [
        ("deepseek_v3", "latent", 1, 40),
        ("qwen3_moe", "keys/values", 2, 64),
        ("mixtral", "keys/values", 2, 64),
        ("glm4_moe", "keys/values", 2, 64),
    ],
)
def test_row_layout(family: str, name: str, heads: int, width: int) -> None:
    row = row_layout(tiny.config(family))
    assert (row.name, row.heads, row.width) == (name, heads, width)


def test_head_dim_by_default() -> None:
    """Without head_dim in the configuration it is hidden size by heads."""
    config = tiny.config("mixtral", head_dim=None)
    assert row_layout(config).first == config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_nbytes(family: str) -> None:
    """All memory is allocated at once, whole pages of it; pools are where their layers are."""
    cache = PagedCache(tiny.config(family), requests=3, context=33, dtype=torch.bfloat16, device=["cpu", "cpu"])
    assert cache.context == 33
    assert cache.nbytes == 2 * 3 * 48 * cache.row.width * 2 == sum(layer.pool.nbytes for layer in cache.layers)


# ------------------------------------------------------------------------------------------------ rectangular


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_generate(family: str, batch: int) -> None:
    """`generate` with a PagedCache gives the tokens it gives without, left padding included."""
    model = tiny.model(family)
    ids = tiny.ids(batch, 13)
    ids[-1, :5] = 0
    asked: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 24,
        "do_sample": False,
    }
    cache = PagedCache(model.config, requests=batch, context=64)
    assert torch.equal(model.generate(**asked, past_key_values=cache), model.generate(**asked))
    assert int(cache.get_seq_length()) == 13 + 23


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
@torch.no_grad()
def test_clear(family: str) -> None:
    """A cleared cache remembers nothing."""
    model = tiny.model(family)
    cache = PagedCache(model.config, context=32)
    wanted = model(tiny.ids(1, 9), past_key_values=cache).logits
    model(tiny.ids(1, 7, seed=1), past_key_values=cache)
    cache.clear()
    assert int(cache.get_seq_length()) == 0
    torch.testing.assert_close(model(tiny.ids(1, 9), past_key_values=cache).logits, wanted)


@torch.no_grad()
def test_crop() -> None:
    """Tokens after the cropped length are forgotten, the others stay."""
    model = tiny.model("qwen3_moe")
    cache, ids = PagedCache(model.config, context=64), tiny.ids(1, 30)
    wanted = model(ids).logits
    model(torch.cat([ids[:, :20], tiny.ids(1, 6, seed=1)], 1), past_key_values=cache)
    cache.crop(20)
    assert int(cache.get_seq_length()) == 20
    torch.testing.assert_close(model(ids[:, 20:], past_key_values=cache).logits, wanted[:, 20:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rectangular_full() -> None:
    """A rectangular cache refuses what it cannot hold."""
    model = tiny.model("qwen3_moe")
    cache = PagedCache(model.config, context=16)
    model(tiny.ids(1, 16), past_key_values=cache)
    with pytest.raises(CapacityError, match="16"):
        model(tiny.ids(1, 1), past_key_values=cache)


# ------------------------------------------------------------------------------------------------ ragged

requests_of_steps = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 20), min_size=n, max_size=n), min_size=1, max_size=5)
)


@settings(max_examples=60)
@given(family=st.sampled_from(["deepseek_v3", "qwen3_moe"]), steps=requests_of_steps, context=st.integers(1, 60))
@example(family="qwen3_moe", steps=[[16, 0], [0, 16], [1, 1]], context=32)
@example(family="deepseek_v3", steps=[[0], [PAGE]], context=PAGE)
def test_ragged(family: str, steps: list[list[int]], context: int) -> None:
    """What was appended, step by step and request by request, comes back; other rows of the pool are untouched."""
    cache = PagedCache(tiny.config(family), requests=len(steps[0]), context=context, ragged=True)
    kept: list[list[Tensor]] = [[] for _ in steps[0]]
    lengths = [0] * len(kept)
    for seed, counts in enumerate(steps):
        if not sum(counts):
            continue
        if any(n + c > cache.context for n, c in zip(lengths, counts, strict=True)):
            before = [cache.page_table.clone(), cache.seq_len.clone(), list(cache.lengths)]
            with pytest.raises(CapacityError, match=f"holds {cache.context} a request"):
                cache.begin(counts)
            assert torch.equal(cache.page_table, before[0])
            assert torch.equal(cache.seq_len, before[1])
            assert cache.lengths == before[2] == lengths
            continue
        new, keys, values = step(cache, counts, seed)
        lengths = [n + c for n, c in zip(lengths, counts, strict=True)]
        assert cache.lengths == lengths
        for request, part in enumerate(new):
            kept[request].append(part)
            assert torch.equal(stored(cache, request, keys, values), torch.cat(kept[request]))
    used = int((cache.layers[0].pool != 0).any(-1).sum())
    assert used == sum(lengths)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=4).filter(
        lambda x: any(c for _, c in x)
    )
)
def test_ragged_mask(lengths: list[tuple[int, int]]) -> None:
    """A token sees its own request up to itself, and nothing else."""
    cache = PagedCache(tiny.config("qwen3_moe"), requests=len(lengths), context=64, ragged=True)
    cache.lengths = [n for n, _ in lengths]
    cache.begin([c for _, c in lengths])
    total = sum(c for _, c in lengths)
    positions = torch.zeros(1, total, dtype=torch.int64)
    mask = ops.ragged_mask(cache.page_table, cache.seq_len, cache.query_start, positions, PAGE)
    width = cache.page_table.shape[1] * PAGE
    wanted = torch.zeros(total, len(lengths) * width, dtype=torch.bool)
    at = 0
    for request, (length, count) in enumerate(lengths):
        for i in range(count):
            wanted[at, request * width : request * width + length + i + 1] = True
            at += 1
    assert torch.equal(mask[0, 0], wanted)
    assert mask.shape[:2] == (1, 1)


def test_ragged_crop_and_clear() -> None:
    """After a crop new rows follow the kept ones; after clear the first ones are new."""
    cache = PagedCache(tiny.config("deepseek_v3"), requests=2, context=64, ragged=True)
    first, *_ = step(cache, [20, 5], 0)
    cache.crop(7)
    assert cache.lengths == [7, 5]
    second, keys, values = step(cache, [2, 1], 1)
    assert torch.equal(stored(cache, 0, keys, values), torch.cat([first[0][:7], second[0]]))
    assert torch.equal(stored(cache, 1, keys, values), torch.cat([first[1], second[1]]))
    cache.clear()
    assert cache.lengths == [0, 0]
    third, keys, values = step(cache, [3, 0], 2)
    assert torch.equal(stored(cache, 0, keys, values), third[0])


def test_begin_without_advance() -> None:
    """A step that was announced and never done changes nothing."""
    cache = PagedCache(tiny.config("qwen3_moe"), requests=1, context=32, ragged=True)
    first, *_ = step(cache, [4], 0)
    cache.begin([9])
    second, keys, values = step(cache, [2], 1)
    assert torch.equal(stored(cache, 0, keys, values), torch.cat([first[0], second[0]]))


def test_pages_in_use() -> None:
    """A step reads the pages that the longest request needs, no more."""
    cache = PagedCache(tiny.config("qwen3_moe"), requests=2, context=160, ragged=True)
    for counts, pages in (([1, 1], 1), ([15, 3], 1), ([1, 0], 2), ([0, 60], 4)):
        step(cache, counts, 0)
        assert cache.page_table.shape == (2, pages)
    assert len(set(cache.all_pages.flatten().tolist())) == 20


def test_a_batch_over_the_pools_of_a_cache() -> None:
    """Two batches whose rows are the same requests: what one stored the other reads, by the pages that it is told."""
    pool = PagedCache(tiny.config("deepseek_v3"), requests=1, context=96, ragged=True)
    two, one = pool.batch(2, 64), pool.batch(1, 64)
    assert two.context == 64 and two.nbytes == pool.nbytes and two.all_pages.shape == (2, 4)
    tables = [[5, 2], [0]]
    for row, table in enumerate(tables):
        two.assign(row, table, 0)
    first, *_ = step(two, [20, 9], 0)
    one.assign(0, tables[1], 9)
    second, keys, values = step(one, [3], 1)
    assert torch.equal(stored(one, 0, keys, values), torch.cat([first[1], second[0]]))
    tables[1].append(3)  # it grows in place
    for row, (table, length) in enumerate(zip(tables, (20, 12), strict=True)):
        two.assign(row, table, length)
    third, keys, values = step(two, [2, 10], 2)
    assert torch.equal(stored(two, 0, keys, values), torch.cat([first[0], third[0]]))
    assert torch.equal(stored(two, 1, keys, values), torch.cat([first[1], second[0], third[1]]))
    two.assign(0, [2], 4)  # another request in this row: the end of the first one's page 2
    _, keys, values = step(two, [0, 1], 3)
    assert torch.equal(stored(two, 0, keys, values), torch.cat([first[0], third[0]])[16:20])
    with pytest.raises(CapacityError, match="request 1 has 23 tokens and brings 42; the cache holds 64"):
        two.begin([0, 42])
