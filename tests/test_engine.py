"""Many requests at once say what each says alone; pages come back; nothing waits for ever.

Against a stand-in whose answers are defined exactly (`byte_model`), then against the embedded model.
"""

import threading
import time
from typing import Any

import pytest
import torch
from byte_model import CRASH, POISON, VOCABULARY, ByteModel, alone, byte_engine, check, logits_of, settle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ktcompile.engine import Engine
from ktcompile.errors import BusyError, CapacityError, KtransError
from ktcompile.penalties import Penalties
from ktcompile.request import Finished, Handle, Piece, Request
from ktcompile.sampling import Sampling
from ktcompile.schedule import PATIENCE, shares
from ktcompile.symbols import PAGE

GREEDY = Sampling(0.0, seed=0)


def prompt(count: int, seed: int = 0) -> tuple[int, ...]:
    """Letters."""
    found = torch.randint(97, 123, (count,), generator=torch.Generator().manual_seed(seed))
    return tuple(found.tolist())


def seeded(seed: int, temperature: float = 0.9) -> Sampling:
    return Sampling(temperature, 0.95, seed=seed)


MIXED = [
    Request(prompt(length, seed), most, seeded(seed, temperature), penalties)
    for seed, (length, most, temperature, penalties) in enumerate(
        [
            (1, 40, 0.0, Penalties()),
            (100, 9, 0.0, Penalties(frequency=0.5)),
            (17, 30, 0.9, Penalties()),
            (16, 1, 0.9, Penalties(bias={65: 4.0, 66: -100.0})),
            (33, 33, 1.4, Penalties(repetition=1.2)),
            (7, 50, 0.0, Penalties(presence=1.0)),
            (64, 20, 0.6, Penalties()),
            (90, 2, 2.0, Penalties()),
        ]
    )
]


# ------------------------------------------------------------------------------------------------ the same answers


@pytest.mark.parametrize(
    "options",
    [
        {"cache_tokens": 1024},
        {"cache_tokens": 1024, "chunk": 8, "max_batch": 3},
        {"cache_tokens": 1024, "mixed_chunk": 1},
        {"cache_tokens": 160},  # they do not fit together: some are read several times
        {"cache_tokens": 144, "chunk": 16},
    ],
)
def test_as_alone(options: dict[str, int]) -> None:
    model = ByteModel(context=160)
    engine = byte_engine(model, **options)
    handles = [engine.submit(request) for request in MIXED]
    settle(engine)
    context = engine.context
    for request, handle in zip(MIXED, handles, strict=True):
        _, tokens, end = handle.result()
        assert tokens == alone(request, context)
        assert (end.reason, end.message) == ("length", "")
        assert end.usage.cached_tokens == 0, "what it read itself before is not what it found"
        assert end.usage.prompt_tokens == len(request.prompt) and end.usage.completion_tokens == len(tokens)
    shown = engine.statistics
    assert shown.said == sum(len(alone(r, context)) for r in MIXED) and dict(shown.finished) == {"length": 8}
    assert (shown.preempted > 0) == (options["cache_tokens"] < 1024)
    assert max(map(sum, model.seen)) <= options.get("chunk", model.chunk)


def test_a_step_of_answers_alone_is_a_decode_step() -> None:
    """One token a row, every row's wanted: what a GPU replays."""
    model = ByteModel()
    engine = byte_engine(model)
    for request in MIXED:
        engine.submit(request)
    settle(engine)
    assert [1] * 5 in model.seen
    assert {rows for rows, is_decode in engine._batches if is_decode} >= {1, 5}


def test_where_steps_are_graphs_there_are_few_sizes() -> None:
    """Rows that are missing are copies, whose tokens nobody sees."""
    model = ByteModel(chunk=256)
    engine = byte_engine(model, cache_tokens=2048, max_batch=20)
    engine._has_graphs = True
    requests = [Request(prompt(3 + seed, seed), 2 + seed, GREEDY) for seed in range(14)]
    handles = [engine.submit(request) for request in requests]
    settle(engine)
    assert [h.result()[1] for h in handles] == [alone(r, 256) for r in requests]
    assert {len(counts) for counts in model.seen if set(counts) == {1}} == {1, 2, 3, 4, 5, 6, 7, 8, 12, 16}
    assert engine.statistics.said == sum(r.most or 0 for r in requests)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 500), max_size=9), st.integers(1, 300))
def test_shares(remaining: list[int], budget: int) -> None:
    given = shares(remaining, budget)
    assert sum(given) == min(sum(remaining), budget)
    assert all(0 <= g <= r for g, r in zip(given, remaining, strict=True))
    if remaining:
        assert given[0] >= min(remaining[0], -(-budget // 2)), "the first comes to an end"
        shortest = min(range(len(remaining)), key=lambda i: remaining[i])
        assert given[shortest] >= min(remaining[shortest], budget // 2), "and the shortest does not wait"


class Requests(RuleBasedStateMachine):
    """Submitting, cancelling, stepping in any order, with prompts that begin alike and too few pages."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = byte_engine(ByteModel(context=96), cache_tokens=128, max_batch=4, chunk=24, mixed_chunk=20)
        self.handles: list[tuple[Handle, bool]] = []

    @rule(
        length=st.integers(1, 80),
        split=st.integers(0, 80),
        other=st.integers(0, 3),
        most=st.integers(1, 40),
        temperature=st.sampled_from([0.0, 1.0]),
        broken=st.sampled_from([None, None, None, None, POISON, CRASH]),
    )
    def submit(self, length: int, split: int, other: int, most: int, temperature: float, broken: int | None) -> None:
        ids = [*prompt(80)[:split], *prompt(80, other)][:length]
        if broken is not None:
            ids[min(split, length - 1)] = broken
        request = Request(tuple(ids), most, Sampling(temperature, seed=length), Penalties(presence=other % 2))
        self.handles.append((self.engine.submit(request), broken is not None))

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            check(self.engine)

    @rule(which=st.integers(0, 5))
    def cancel(self, which: int) -> None:
        if which < len(self.handles):
            self.handles[-1 - which][0].cancel()

    @rule()
    def forget(self) -> None:
        self.engine.clear_prefixes()

    @invariant()
    def pages(self) -> None:
        self.engine.schedule.pages.check([a.table for a in self.engine.schedule.requests])

    def teardown(self) -> None:
        settle(self.engine)
        for handle, broken in self.handles:
            _, tokens, end = handle.result()
            if broken:
                assert end.reason in ("error", "cancelled") and not tokens
                continue
            want = alone(handle.request, self.engine.context)
            assert tokens == want[: len(tokens)], end
            assert (end.reason == "length" and tokens == want) or (handle.cancelled and end.reason == "cancelled")


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=30, stateful_step_count=25)


# ------------------------------------------------------------------------------------------------ prefixes


def test_a_prefix_is_read_once() -> None:
    model = ByteModel()
    engine = byte_engine(model)
    ids = prompt(100)
    handles = []
    for tail in (b"one", b"two", b"two"):
        handles.append(engine.submit(Request((*ids, *tail), 20, GREEDY)))
        while engine.step():
            check(engine)
    ends = [h.result()[2].usage.cached_tokens for h in handles]
    assert ends == [0, 96, 96], "of 103 tokens six pages are full, and the last token's logits are wanted"
    assert engine.statistics.prompts == 3 * 103 and engine.statistics.said == 3 * 20
    assert engine.statistics.reused == 192 and engine.statistics.read == 3 * (103 + 19) - 192
    assert sum(map(sum, model.seen)) == engine.statistics.read
    assert model.logit_steps == 0, "logits are fetched where they are wanted only"
    settle(engine)


def test_an_answer_is_a_prefix_too() -> None:
    engine = byte_engine()
    first = Request(prompt(30), 40, GREEDY)
    handle = engine.submit(first)
    settle_once(engine)
    _, tokens, _ = handle.result()
    second = engine.submit(Request((*first.prompt, *tokens, 65, 66), 4, GREEDY))
    settle(engine)
    assert second.result()[2].usage.cached_tokens == 64
    assert second.request.prompt[:70] == (*first.prompt, *tokens)


def settle_once(engine: Engine) -> None:
    while engine.step():
        check(engine)


def test_pages_are_shared_while_they_are_used() -> None:
    """Of equal prompts at the same time, too: the second goes on where the first one is."""
    engine = byte_engine(chunk=32)
    one = engine.submit(Request(prompt(150), 30, GREEDY))
    for _ in range(3):
        engine.step()
    other = engine.submit(Request(prompt(150), 30, GREEDY))
    engine.step()
    tables = [a.table.pages for a in engine.schedule.active]
    assert len(set(tables[0]) & set(tables[1])) >= 5
    settle(engine)
    assert one.result()[1] == other.result()[1] == alone(one.request, 256)
    assert engine.statistics.read < 150 + 30 + 30 + 40


def test_what_was_used_longest_ago_is_evicted_first() -> None:
    """And of one prefix its end before its beginning."""
    engine = byte_engine(ByteModel(context=160), cache_tokens=160)
    pages = engine.schedule.pages

    def found(seed: int) -> int:
        table = pages.table()
        count = pages.adopt(table, prompt(49, seed))
        pages.release(table)
        return count

    for seed in (1, 2, 3):  # each leaves three pages of ten
        engine.submit(Request(prompt(49, seed), 1, GREEDY))
        settle_once(engine)
    assert [found(seed) for seed in (2, 3, 1)] == [3, 3, 3]
    engine.submit(Request(prompt(47, 4), 1, GREEDY))  # takes the one that is free, then two of the oldest
    settle_once(engine)
    assert [len(pages.free), found(2), found(3), found(1)] == [1, 1, 3, 3]


# ------------------------------------------------------------------------------------------------ fairness, limits


def test_a_short_prompt_beside_a_long_one() -> None:
    model = ByteModel(context=2048)
    engine = byte_engine(model, cache_tokens=2048, chunk=64, mixed_chunk=32)
    long = engine.submit(Request(prompt(900), 5, GREEDY))
    engine.step()
    short = engine.submit(Request(prompt(20, 1), 5, GREEDY))
    steps = 0
    while short.finished is None:
        engine.step()
        steps += 1
    assert steps == 5, "one for its prompt and its first token, then one a token"
    assert long.finished is None
    settle(engine)
    assert long.result()[1] == alone(long.request, 2048)
    assert len(model.seen) < 900 / 32 + 10


def test_answers_go_on_beside_a_prompt() -> None:
    """A token a step for everyone, with a bounded number of others' prompt tokens."""
    model = ByteModel(context=2048)
    engine = byte_engine(model, cache_tokens=2048, chunk=128, mixed_chunk=32)
    answers = [engine.submit(Request(prompt(5, seed), 40, GREEDY)) for seed in range(3)]
    engine.step()
    engine.submit(Request(prompt(900, 9), 1, GREEDY))
    before = engine.statistics.said
    for _ in range(20):
        engine.step()
        assert model.seen[-1][:3] == [1, 1, 1] and 0 < sum(model.seen[-1][3:]) <= 32
    assert engine.statistics.said == before + 60
    settle(engine)
    assert all(h.finished is not None and h.finished.reason == "length" for h in answers)


def test_chunks_end_where_pages_do() -> None:
    """So that another request can go on from there."""
    model = ByteModel()
    engine = byte_engine(model, chunk=40)
    engine.submit(Request(prompt(100), 1, GREEDY))
    settle(engine)
    assert model.seen == [[32], [32], [36]]


def test_a_prompt_leaves_a_page_for_each_answer() -> None:
    """Else one of them would soon have to go."""
    engine = byte_engine(ByteModel(context=160), cache_tokens=160)
    engine.submit(Request(prompt(30, 1), 10, GREEDY))
    engine.step()
    engine.submit(Request(prompt(128, 2), 1, GREEDY))  # eight pages are left
    engine.step()
    assert (engine.statistics.running, engine.statistics.waiting) == (1, 1)
    settle(engine)
    assert engine.statistics.preempted == 0


def test_one_that_finds_no_pages_is_passed_and_not_forgotten() -> None:
    engine = byte_engine(ByteModel(context=192), cache_tokens=192, max_batch=2)
    engine.submit(Request(prompt(30, 1), 100, GREEDY))
    engine.step()
    large = engine.submit(Request(prompt(170, 2), 2, GREEDY))
    small = [engine.submit(Request(prompt(3, 3 + i), 1, GREEDY)) for i in range(2 * PATIENCE)]
    for _ in range(PATIENCE + 2):
        engine.step()
        check(engine)
    done = sum(h.finished is not None for h in small)
    assert done == PATIENCE and large.finished is None
    settle(engine)
    assert large.result()[1] == alone(large.request, 192)


def test_the_queue_has_an_end() -> None:
    engine = byte_engine(max_queue=3, max_batch=1)
    for _ in range(3):
        engine.submit(Request(prompt(4), 2, GREEDY))
    with pytest.raises(BusyError, match=r"3 requests wait, as many as may \(max_queue\); try again later"):
        engine.submit(Request(prompt(4), 2, GREEDY))
    engine.step()
    engine.submit(Request(prompt(4), 2, GREEDY))  # one has left it
    with pytest.raises(BusyError):
        engine.submit(Request(prompt(4), 2, GREEDY))
    settle(engine)


def test_an_answer_ends_with_the_context() -> None:
    engine = byte_engine(ByteModel(context=40))
    handles = [engine.submit(Request(prompt(n), most, GREEDY)) for n, most in ((30, None), (30, 1 << 40), (39, 9))]
    settle(engine)
    assert [len(h.result()[1]) for h in handles] == [11, 11, 2], "the last token is not stored"
    with pytest.raises(CapacityError, match="the prompt has 40 tokens; the context holds 40"):
        engine.submit(Request(prompt(40), 1, GREEDY))
    with pytest.raises(CapacityError, match="the context holds 32"):
        byte_engine(ByteModel(context=40), cache_tokens=32).submit(Request(prompt(32), 1, GREEDY))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (3, VOCABULARY)}, "token 256: the vocabulary has 0 to 255"),
        ({"prompt": (-1,)}, "token -1"),
        ({"penalties": Penalties(bias={300: 1.0})}, "token 300"),
        ({"most": 0}, "an answer of 0 tokens"),
        ({"top": 101}, "the 101 most likely"),
    ],
)
def test_what_no_model_could_answer(values: dict[str, Any], why: str) -> None:
    with pytest.raises(KtransError, match=why):
        byte_engine().submit(Request(**{"prompt": (1, 2), **values}))


def test_sizes_that_are_refused() -> None:
    least = {"chunk": 1, "mixed_chunk": 1, "max_batch": 1, "max_queue": 1, "cache_tokens": PAGE}
    for name, size in least.items():
        with pytest.raises(KtransError, match=f"{name} {size - 1}: {size} or more"):
            byte_engine(**{name: size - 1})


# ------------------------------------------------------------------------------------------------ ends


def said(engine: Engine, request: Request) -> tuple[str, list[int], Finished]:
    handle = engine.submit(request)
    settle(engine)
    return handle.result()


def test_stop_strings_and_tokens() -> None:
    engine = byte_engine()
    request = Request(prompt(10), 60, seeded(3))
    text, tokens, _ = said(engine, request)
    assert text == bytes(tokens).decode() and len(text) == 60
    for start, end in ((5, 6), (20, 25), (58, 60)):
        stop = text[start:end]
        at = text.index(stop)
        cut, some, finished = said(engine, Request(request.prompt, 60, seeded(3), stop_strings=("\x80", stop)))
        assert (cut, finished.reason, finished.matched) == (text[:at], "stop", stop)
        assert some == tokens[: at + len(stop)]
    held, _, finished = said(engine, Request(request.prompt, 60, seeded(3), stop_strings=(text[58:] + "\x80",)))
    assert (held, finished.reason, finished.matched) == (text, "length", None), "what was held back is said in the end"
    cut, some, finished = said(engine, Request(request.prompt, 60, seeded(3), stop=frozenset({tokens[30]})))
    first = tokens.index(tokens[30])
    assert (some, finished.reason, finished.usage.completion_tokens) == (tokens[:first], "stop", first)


def test_text_of_several_bytes() -> None:
    """The model is made to say characters whose bytes are tokens of their own."""
    spoken = "né漢🙂. the end".encode()

    class Speaker(ByteModel):
        def _step(self, *args: Any) -> torch.Tensor:
            found = super()._step(*args)
            _, positions, _, keep, _ = args
            for row, kept in enumerate(keep):
                found[row] = 0.0
                found[row, spoken[(positions[kept] - 3) % len(spoken)]] = 9.0
            return found

    engine = byte_engine(Speaker())
    request = Request(prompt(4), 30, GREEDY, stop_strings=("漢🙂",))
    handle = engine.submit(request)
    settle(engine)
    events = list(handle)
    assert [e.text for e in events] == ["n", "", "é", "", "", "", "", "", "", "", ""]
    assert isinstance(events[-1], Finished) and events[-1].matched == "漢🙂"
    handle = engine.submit(Request(prompt(4), 5, GREEDY))
    settle(engine)
    assert handle.result()[0] == "né", "and not two thirds of a character"


@pytest.mark.parametrize("when", ["queued", "read", "answered"])
def test_cancel(when: str) -> None:
    engine = byte_engine(chunk=16, max_batch=1)
    if when == "queued":
        engine.submit(Request(prompt(5), 9, GREEDY))
        engine.step()
    handle = engine.submit(Request(prompt(100, 2), 50, GREEDY))
    for _ in range({"queued": 2, "read": 3, "answered": 12}[when]):
        engine.step()
    used = engine.statistics.used
    handle.cancel()
    engine.step()
    text, tokens, end = handle.result()
    assert end.reason == "cancelled" and (len(tokens) > 0) == (when == "answered") == (len(text) > 0)
    assert engine.statistics.used < used or when == "queued"
    handle.cancel()
    settle(engine)


def test_errors_are_of_one_request() -> None:
    """NaN, a crash, a listener that raises: the others say what they would have said."""
    engine = byte_engine(chunk=32)
    good = [engine.submit(r) for r in MIXED[:3]]
    engine.step()
    poisoned = engine.submit(Request((*prompt(50), POISON, *prompt(3)), 5, GREEDY))
    crashed = engine.submit(Request((*prompt(5), CRASH), 5, GREEDY))
    deaf = engine.submit(Request(prompt(5), 5, GREEDY), tell=lambda event: 1 / 0)  # type: ignore[arg-type,return-value]
    banned = Penalties(bias=dict.fromkeys(range(VOCABULARY), -float("inf")))
    silent = engine.submit(Request(prompt(5), 5, GREEDY, banned))
    settle(engine)
    assert all(h.result()[1] == alone(h.request, 256) for h in good)
    assert poisoned.result()[2].message.startswith("the model's logits are no distribution")
    assert crashed.result()[2].message == "RuntimeError: it crashed"
    assert deaf.finished is not None and deaf.finished.message.startswith("ZeroDivisionError")
    assert "no distribution" in silent.result()[2].message
    assert dict(engine.statistics.finished) == {"length": 3, "error": 4}


def test_out_of_memory_is_of_one_request() -> None:
    class Small(ByteModel):
        def _step(self, ids: list[int], *rest: Any) -> torch.Tensor:
            if len(ids) > 20:
                raise CapacityError("cuda:0 is out of memory")
            return super()._step(ids, *rest)

    engine = byte_engine(Small())
    short = [engine.submit(Request(prompt(12, seed), 30, GREEDY)) for seed in range(3)]
    long = engine.submit(Request(prompt(60, 7), 5, GREEDY))
    settle(engine)
    assert all(h.result()[1] == alone(h.request, 256) for h in short)
    end = long.result()[2]
    assert (end.reason, end.message, end.is_full) == ("error", "cuda:0 is out of memory", True)


def test_the_loop_survives_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = byte_engine()
    monkeypatch.setattr(engine.schedule, "plan", lambda: 1 / 0)
    engine.start()
    assert engine.submit(Request(prompt(20), 4, GREEDY)).result()[2].message.startswith("ZeroDivisionError")
    monkeypatch.undo()
    assert engine.submit(Request(prompt(20), 4, GREEDY)).result()[2].reason == "length"
    engine.stop()
    assert engine.schedule.pages.used == 0


# ------------------------------------------------------------------------------------------------ what is told


def test_log_probabilities() -> None:
    """Of the model's logits, whatever the penalties; the likeliest beside each token."""
    engine = byte_engine()
    how = Penalties(bias={65: 9.0})
    handles = [
        engine.submit(Request(prompt(9), 6, seeded(1), how, top=3)),
        engine.submit(Request(prompt(9), 6, GREEDY)),
    ]
    settle(engine)
    for handle in handles:
        tokens = list(handle.request.prompt)
        for event in handle:
            if not isinstance(event, Piece):
                break
            want = logits_of(tokens).log_softmax(0)
            assert event.logprob == pytest.approx(float(want[event.token]), abs=1e-5)
            likely = want.topk(handle.request.top)
            assert [t for t, _ in event.top] == likely.indices.tolist()
            assert [p for _, p in event.top] == pytest.approx(likely.values.tolist(), abs=1e-5)
            tokens.append(event.token)


def test_times_and_counts() -> None:
    engine = byte_engine()
    start = time.perf_counter()
    handle = engine.submit(Request(prompt(9), 6, GREEDY))
    assert engine.statistics.pages == 16
    settle(engine)
    usage = handle.result()[2].usage
    whole = 1e3 * (time.perf_counter() - start)
    assert 0 < usage.queue_ms < usage.first_token_ms < usage.queue_ms + usage.prompt_ms + 1
    assert usage.predicted_ms > 0 and usage.first_token_ms + usage.predicted_ms < whole
    assert 0 < engine.statistics.model_s < engine.statistics.step_s < whole / 1e3


# ------------------------------------------------------------------------------------------------ threads


def test_eight_threads() -> None:
    model = ByteModel()
    engine = byte_engine(model, max_queue=1000, cache_tokens=512)
    engine.start()
    wrong: list[str] = []

    def ask(thread: int) -> None:
        for i in range(12):
            request = Request(prompt(3 + 11 * i, i % 4), 10 + thread, seeded(thread))
            handle = engine.submit(request)
            if i % 5 == 4:
                handle.cancel()
            _, tokens, end = handle.result()
            want = alone(request, 256)
            if tokens != want[: len(tokens)] or (end.reason == "length") != (tokens == want):
                wrong.append(f"{thread} {i} {end}")
            assert engine.statistics.used <= engine.statistics.pages

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.drain(5)
    engine.clear_prefixes()
    assert len(engine.schedule.pages.free) == engine.schedule.pages.total
    with pytest.raises(KtransError, match="about to stop"):
        engine.submit(Request(prompt(3), 1, GREEDY))
    engine.stop()
    assert sum(count for _, count in engine.statistics.finished) == 96


def test_stop_and_drain() -> None:
    engine = byte_engine(max_batch=2)
    handles = [engine.submit(Request(prompt(9), 200, GREEDY)) for _ in range(4)]
    engine.start()
    with pytest.raises(KtransError, match="has started"):
        engine.start()
    assert not engine.drain(0)
    engine.stop()
    ends = [h.result()[2] for h in handles]
    assert {e.reason for e in ends} <= {"cancelled", "length"} and ends[3].reason == "cancelled"
    assert ends[3].message == "the engine has stopped"
    assert engine.schedule.pages.used == 0
    with pytest.raises(KtransError, match="about to stop"):
        engine.submit(Request(prompt(3), 1, GREEDY))


def test_events_go_to_who_listens() -> None:
    engine = byte_engine()
    heard: list[Any] = []
    engine.submit(Request(prompt(9), 3, GREEDY), heard.append)
    assert engine.drain(5)
    assert [type(e) for e in heard] == [Piece, Piece, Piece, Finished]
