"""A stand-in for a loaded model: 256 tokens that are bytes, logits that depend on every token it finds in the pages.

What it says is a definition over lists of tokens (`logits_of`, `alone`), so an engine over it must agree exactly.
"""

import zlib
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ktcompile.cache import PagedCache, slots
from ktcompile.engine import Engine
from ktcompile.pace import Pace
from ktcompile.penalties import penalised
from ktcompile.request import Request
from ktcompile.sampling import Choices, Sampled, Sampling, sample
from ktcompile.symbols import PAGE

VOCABULARY = 256
POISON, CRASH = 254, 255
"""After POISON logits are NaN; a step in which CRASH is seen raises."""


class Tokens:
    """As a transformers tokenizer: one token a byte."""

    def __init__(self) -> None:
        names = bytes_to_unicode()
        self.backend_tokenizer = Tokenizer(BPE({names[i]: i for i in range(256)}, []))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.backend_tokenizer.decoder = decoders.ByteLevel()


def logits_of(tokens: Sequence[int]) -> Tensor:
    """`[256]`; what cannot be decoded as one byte is unlikely, and so are the tokens that break things."""
    if POISON in tokens:
        return torch.full((VOCABULARY,), torch.nan)
    seed = zlib.crc32(bytes(tokens))
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[128:] = -1e4
    return logits


def alone(request: Request, context: int) -> list[int]:
    """The tokens of the answer, by the definition. `request` must have a seed and no stop strings."""
    tokens, start = list(request.prompt), len(request.prompt)
    most = context - start + 1
    while len(tokens) - start < (most if request.most is None else min(most, request.most)):
        row = penalised(logits_of(tokens), request.penalties, request.prompt, tokens[start:])
        (token,) = Sampled.of(sample(row[None], Choices.of([request.sampling], [len(tokens)]))).ids()
        if token in request.stop:
            break
        tokens.append(token)
    return tokens[start:]


class ByteModel:
    """The pool's first value is the token. `seen`: counts of each step. `gone`: what a page not assigned would hold."""

    def __init__(self, context: int = 256, chunk: int = 64) -> None:
        self.context, self.chunk = context, chunk
        self.graphs: dict[int, str] = {}
        self.config = SimpleNamespace(num_hidden_layers=1, kv_lora_rank=1, qk_rope_head_dim=1, vocab_size=VOCABULARY)
        self.seen: list[list[int]] = []
        self.logit_steps = 0

    def new_cache(self, requests: int = 1, context: int | None = None) -> PagedCache:
        return PagedCache(self.config, requests=requests, context=context or self.context, ragged=True)  # type: ignore[arg-type]

    def step(
        self, ids: list[int], positions: list[int], counts: Sequence[int], keep: list[int], cache: PagedCache
    ) -> Tensor:
        self.logit_steps += 1
        return self._step(ids, positions, counts, keep, cache)

    def _step(
        self, ids: list[int], positions: list[int], counts: Sequence[int], keep: list[int], cache: PagedCache
    ) -> Tensor:
        cache.begin(counts)
        self.seen.append(list(counts))
        flat = cache.pools[0].view(-1, 2)
        flat[slots(cache.page_table, cache.seq_len, cache.query_start, len(ids), PAGE), 0] = torch.tensor(ids).float()
        rows = []
        start = 0
        for request, (length, count) in enumerate(zip(cache.lengths, counts, strict=True)):
            assert positions[start : start + count] == [*range(length, length + count)]
            pages = cache.page_table[request, : -(-(length + count) // PAGE)]
            tokens = cache.pools[0][pages, :, 0].flatten().int().tolist()
            if CRASH in tokens[: length + count]:
                raise RuntimeError("it crashed")
            rows += [tokens[: length + i + 1] for i in range(count)]
            start += count
        cache.advance()
        return torch.stack([logits_of(rows[i]) for i in keep])

    def next_tokens(
        self,
        ids: list[int],
        positions: list[int],
        counts: Sequence[int],
        keep: list[int],
        cache: PagedCache,
        how: Sequence[Sampling],
    ) -> Sampled:
        choices = Choices.of(how, [positions[i] + 1 for i in keep])
        return Sampled.of(sample(self._step(ids, positions, counts, keep, cache), choices))


class Steady(Pace):
    """Steps as large as they may be, however long they take: what a test sees does not depend on the time."""

    def took(self, seconds: float, prompt: int, answers: int) -> None:
        """Nothing is learned."""


def byte_engine(model: ByteModel | None = None, **options: int) -> Engine:
    """An engine over the stand-in, not started."""
    engine = Engine(model or ByteModel(), Tokens(), **options)  # type: ignore[arg-type]
    engine.schedule.pace = Steady(engine.schedule.pace.most)
    engine.schedule.pace.tokens = engine.schedule.pace.most
    return engine


def check(engine: Engine) -> None:
    """Every page is where it should be, and no table holds more than it needs."""
    schedule = engine.schedule
    schedule.pages.check([a.table for a in schedule.requests])
    for a in schedule.requests:
        assert len(a.table.pages) * PAGE < len(a.tokens) + PAGE, "nothing is reserved"
        assert a.table.kept == a.stored // PAGE
    assert not any(a.table.pages for a in schedule.waiting)
    assert [a.order for a in schedule.waiting] == sorted(a.order for a in schedule.waiting)
    assert len(schedule.active) <= schedule.max_batch
    shown = engine.statistics
    assert (shown.running, shown.waiting) == (len(schedule.active), len(schedule.waiting))


def settle(engine: Engine) -> None:
    """Step until nothing is left; then no page is used, and without prefixes none is kept."""
    while engine.step():
        check(engine)
    check(engine)
    assert engine.schedule.pages.used == engine.statistics.used == engine._open == engine._queued == 0
    engine.clear_prefixes()
    assert len(engine.schedule.pages.free) == engine.schedule.pages.total
    assert engine.statistics.idle == 0
