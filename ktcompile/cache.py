"""PagedCache: a transformers Cache over pages, ragged or rectangular; latents (MLA) or keys and values (GQA)."""

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from ktcompile.errors import CapacityError, ModelFileError
from ktcompile.ops.base import register
from ktcompile.ops.mla import packed, unpacked
from ktcompile.symbols import PAGE


@dataclass(frozen=True)
class RowLayout:
    """What one token stores in one layer: `heads` times `first` values, then `heads` times `second`.

    Latent (MLA): 1 head, the normalised latent and the rotated key. Keys and values (GQA): one of each a head.
    """

    name: str
    heads: int
    first: int
    second: int

    @property
    def width(self) -> int:
        return self.heads * (self.first + self.second)


def row_layout(config: PretrainedConfig) -> RowLayout:
    """The row that a model of this configuration stores a token and layer."""
    if getattr(config, "kv_lora_rank", None):
        return RowLayout("latent", 1, config.kv_lora_rank, config.qk_rope_head_dim)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return RowLayout("keys/values", config.num_key_value_heads, dim, dim)


def windows(config: PretrainedConfig) -> dict[str, int | None]:
    """How many of the last positions, its own one counted, a token sees, by kind of layer; None: all of them.

    The kinds are those of `layer_types`; where a configuration has no such list all layers are of the kind "". Raises
    ModelFileError for a kind that needs more than keys and values of earlier tokens.
    """
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"": window}
    known = {"full_attention": None, "sliding_attention": window}
    if unknown := [k for k in kinds if k not in known]:
        raise ModelFileError(f"layer_types has {unknown[0]!r}; known are {', '.join(known)}")
    return {kind: known[kind] for kind in dict.fromkeys(kinds)}


# ------------------------------------------------------------------------------------------------ torch ops


def slots(page_table: Tensor, seq_len: Tensor, query_start: Tensor, tokens: int, page: int) -> Tensor:
    """Where each of `tokens` new rows goes in a pool, `[tokens]`: its request's page, and the place in it."""
    row = torch.arange(tokens, device=page_table.device)
    request = torch.searchsorted(query_start[1:].contiguous(), row, right=True)
    position = seq_len[request] + row - query_start[request]
    return page_table[request, position // page].long() * page + position % page


def _append(
    pool: Tensor, page_table: Tensor, seq_len: Tensor, query_start: Tensor, first: Tensor, second: Tensor
) -> None:
    one, other = (x.transpose(1, 2).flatten(2).flatten(0, 1) for x in (first, second))
    rows = packed(one, other, pool.dtype)  # [B S, width]
    try:
        at = slots(page_table, seq_len, query_start, rows.shape[0], pool.shape[1])
    except IndexError as error:
        raise CapacityError(
            f"the cache holds {page_table.shape[1] * pool.shape[1]} tokens a request, and one brings more"
        ) from error
    pool.view(-1, pool.shape[-1])[at] = rows


def _gather(
    pool: Tensor, page_table: Tensor, heads: int, first: int, second: int, ragged: bool
) -> tuple[Tensor, Tensor]:
    rows = pool[page_table.long()]  # [R, P, page, width]
    batch = 1 if ragged else page_table.shape[0]
    split = unpacked(rows.reshape(batch, -1, rows.shape[-1]), heads * first)
    return tuple(x.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for x in split)


def _gather_fake(
    pool: Tensor,
    page_table: Tensor,
    heads: int,
    first: int,
    second: int,
    ragged: bool,
) -> tuple[Tensor, Tensor]:
    length = page_table.shape[1] * pool.shape[1]
    batch, length = (1, page_table.shape[0] * length) if ragged else (page_table.shape[0], length)
    kept = (torch.float8_e4m3fn, torch.bfloat16) if pool.dtype == torch.uint8 else (pool.dtype, pool.dtype)
    one, other = ((batch, heads, length, dim) for dim in (first, second))
    return pool.new_empty(one, dtype=kept[0]), pool.new_empty(other, dtype=kept[1])


def _mask(
    page_table: Tensor, seq_len: Tensor, query_start: Tensor, positions: Tensor, page: int, window: int | None = None
) -> Tensor:
    requests, width = page_table.shape[0], page_table.shape[1] * page
    tokens = positions.shape[-1]
    row = torch.arange(tokens, device=page_table.device)
    request = torch.searchsorted(query_start[1:].contiguous(), row, right=True)  # [T]
    last = seq_len[request] + row - query_start[request]
    column = torch.arange(requests * width, device=page_table.device)
    position = column % width
    seen = (column // width == request[:, None]) & (position <= last[:, None])
    if window is not None:
        seen &= position > last[:, None] - window
    return seen[None, None]  # [1, 1, T, R P page]


def _mask_fake(
    page_table: Tensor, seq_len: Tensor, query_start: Tensor, positions: Tensor, page: int, window: int | None = None
) -> Tensor:
    columns = page_table.shape[0] * page_table.shape[1] * page
    return page_table.new_empty(1, 1, positions.shape[-1], columns, dtype=torch.bool)


register(
    "cache_append(Tensor(a!) pool, Tensor page_table, Tensor seq_len, Tensor query_start, Tensor first, "
    "Tensor second) -> ()",
    _append,
    lambda *_: None,
)
register(
    "cache_gather(Tensor pool, Tensor page_table, int heads, int first, int second, bool ragged) -> (Tensor, Tensor)",
    _gather,
    _gather_fake,
)
register(
    "ragged_mask(Tensor page_table, Tensor seq_len, Tensor query_start, Tensor positions, int page) -> Tensor",
    _mask,
    _mask_fake,
)
register(  # an op of its own: `ragged_mask` is the mark by which attention is known to see all that came before
    "ragged_window_mask(Tensor page_table, Tensor seq_len, Tensor query_start, Tensor positions, int page, "
    "int window) -> Tensor",
    _mask,
    _mask_fake,
)


# ------------------------------------------------------------------------------------------------ the cache


class _PagedLayer(CacheLayerMixin):
    """One layer's pool `[pages, page, width]`; pages, lengths and mode are the owner's."""

    is_compileable = False
    is_sliding = False

    def __init__(self, owner: "PagedCache", pool: Tensor, last: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner, self.pool, self.last = ref(owner), pool, last  # no circle: pools go at once
        self.is_initialized = True

    @property
    def owner(self) -> "PagedCache":
        """The cache."""
        owner = self._owner()
        assert owner is not None, "a layer without its cache"
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pool exists from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new rows, return all: `[B, heads, capacity, dim]`, or `[1, heads, R * capacity, dim]` if ragged."""
        owner, row = self.owner, self.owner.row
        start = owner.query_start
        if not owner.ragged:
            count = key_states.shape[2]
            start = torch.arange(0, (owner.requests + 1) * count, count, device=self.pool.device)
        torch.ops.ktrans.cache_append(self.pool, owner.page_table, owner.seq_len, start, key_states, value_states)
        keys, values = torch.ops.ktrans.cache_gather(
            self.pool, owner.page_table, row.heads, row.first, row.second, owner.ragged
        )
        if self.last and not owner.ragged:
            owner.seq_len.add_(key_states.shape[2])
        if owner.fp8:
            keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.page_table.shape[1] * self.pool.shape[1], 0

    def get_seq_length(self) -> Any:
        return self.owner.columns if self.owner.ragged else self.owner.seq_len[0]

    def get_max_length(self) -> int:
        return self.owner.context

    def reset(self) -> None:
        self.owner.clear()


class PagedCache(Cache):
    """Keys and values (or latents) of several requests in pages of 16 tokens.

    Rectangular (as any Hugging Face model uses it): `[B, S]` ids with B = `requests`; every row grows by S a step.
    Ragged (`ragged=True`; what `ktcompile.load` runs): ids `[1, T]`, the tokens of request r are
    `query_start[r]:query_start[r + 1]`; call `begin(counts)` before a step and `advance()` after it.

    `fp8` keeps latents in 8 bits and their keys in bfloat16 (`ktcompile.ops.mla.packed`), whatever `dtype` is.
    `device`: where pools are, of all layers or of each. `main`: where the page table and lengths are, by default with
    the first pool. `context` is the most tokens a request may hold. Memory is `requests * context` tokens, all of it
    allocated at once; `hollow`: none, for tracing.
    Raises CapacityError when a request outgrows it.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        requests: int = 1,
        context: int = 4096,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | Sequence[torch.device | str] = "cpu",
        main: torch.device | str | None = None,
        ragged: bool = False,
        hollow: bool = False,
        fp8: bool = False,
    ) -> None:
        count = config.num_hidden_layers
        devices = [device] * count if isinstance(device, (str, torch.device)) else list(device)
        self.requests, self.ragged, self.row = requests, ragged, row_layout(config)
        self.pages_each = -(-context // PAGE)
        self.context, self.dtype, self.fp8 = context, dtype, fp8
        self.columns = 0
        self.lengths = [0] * requests
        self.counts = [0] * requests
        self.assigned: list[tuple[list[int], int]] = []
        main = main or devices[0]
        # Pages of a request are scattered on purpose: nothing may rely on their order.
        first, row = (torch.arange(n, device=main) for n in (self.pages_each, requests))
        table = first * requests + row[:, None]  # [R, P]
        self.all_pages = table
        self.page_table = table
        self.seq_len = torch.zeros(requests, dtype=torch.int64, device=main)
        self.query_start = torch.zeros(requests + 1, dtype=torch.int64, device=main)
        shape = requests * self.pages_each, PAGE, self.row.width + (self.row.second if fp8 else 0)
        kept, size = torch.uint8 if fp8 else dtype, (1, 1, 1) if hollow else shape
        pools = [torch.zeros(size, dtype=kept, device=d).expand(shape) for d in devices]
        self.pools = pools
        super().__init__(layers=self._layers())

    def _layers(self) -> list[Any]:
        last = len(self.pools) - 1
        return [_PagedLayer(self, pool, i == last) for i, pool in enumerate(self.pools)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        made = memo[id(self)] = copy(self)
        for name, value in vars(self).items():
            if name != "layers":
                setattr(made, name, deepcopy(value, memo))
        made.layers = made._layers()
        return made

    def batch(self, requests: int, context: int) -> "PagedCache":
        """Rows of `requests` requests over the pools of this cache, of which `assign` says the pages: no new pools.

        A row holds at most `context` tokens. Addresses are this batch's own and stay: a step graph may record them.
        """
        made = copy(self)
        main = self.all_pages.device
        made.requests, made.context, made.pages_each = requests, context, -(-context // PAGE)
        made.all_pages = made.page_table = torch.zeros(requests, made.pages_each, dtype=torch.int64, device=main)
        made.seq_len = torch.zeros(requests, dtype=torch.int64, device=main)
        made.query_start = torch.zeros(requests + 1, dtype=torch.int64, device=main)
        made.lengths, made.counts = [0] * requests, [0] * requests
        made.assigned = [([], 0) for _ in range(requests)]
        made.layers = made._layers()
        return made

    def assign(self, row: int, pages: list[int], length: int) -> None:
        """Row `row` of a `batch` holds `length` tokens, in these pages. A list may come again longer, not changed."""
        held, written = self.assigned[row]
        if held is not pages:
            written = 0
        if written < len(pages):
            self.all_pages[row, written : len(pages)] = torch.tensor(pages[written:])
        self.assigned[row] = pages, len(pages)
        self.lengths[row] = length

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pool in self.pools)

    def begin(self, counts: Sequence[int]) -> None:
        """Announce that request r brings `counts[r]` tokens; the page table is cut to the pages in use."""
        self.check(counts)
        longest = max(n + c for n, c in zip(self.lengths, counts, strict=True))
        self.page_table = self.all_pages[:, : max(1, -(-longest // PAGE))]
        rows = self.rows()
        self.seq_len.copy_(torch.tensor(rows[: self.requests]))
        self.query_start.copy_(torch.tensor(rows[self.requests :]))

    def rows(self) -> list[int]:
        """What `begin` writes for the announced step: lengths `[R]`, then where the tokens of each start, `[R + 1]`."""
        return [*self.lengths, *accumulate(self.counts, initial=0)]

    def check(self, counts: Sequence[int]) -> None:
        """Announce a step as `begin` does, without writing to any device. Raises CapacityError."""
        for request, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self.context:
                raise CapacityError(
                    f"request {request} has {length} tokens and brings {count}; the cache holds "
                    f"{self.context} a request. Load with a larger context, or start a new conversation"
                )
        self.counts = list(counts)

    def advance(self) -> None:
        """The announced tokens are stored."""
        self.lengths = [n + c for n, c in zip(self.lengths, self.counts, strict=True)]

    def masks(self, positions: Tensor, kinds: Mapping[str, int | None], additive: bool) -> Tensor | dict[str, Tensor]:
        """What each token of a ragged step sees, `[1, 1, T, R * capacity]`: one mask, or one by kind where they differ.

        `kinds`: see `windows`. Booleans; if `additive`, what eager attention adds to its scores: 0 or the least number.
        """
        made = {window: self._mask(positions, window, additive) for window in kinds.values()}
        if len(made) == 1:  # every model takes one mask; only those with several kinds take a mapping
            return made[next(iter(made))]
        return {kind: made[window] for kind, window in kinds.items()}

    def _mask(self, positions: Tensor, window: int | None, additive: bool) -> Tensor:
        tables = self.page_table, self.seq_len, self.query_start, positions, PAGE
        op = torch.ops.ktrans
        seen: Tensor = op.ragged_mask(*tables) if window is None else op.ragged_window_mask(*tables, window)
        if not additive:
            return seen
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)

    def clear(self) -> None:
        """Forget every token; memory stays."""
        self.lengths = [0] * self.requests
        self.columns = 0
        self.seq_len.zero_()

    def crop(self, length: int) -> None:
        """Forget the tokens of every request from position `length` on."""
        self.lengths = [min(n, length) for n in self.lengths]
        self.columns = min(self.columns, length)
        self.seq_len.clamp_(max=length)
