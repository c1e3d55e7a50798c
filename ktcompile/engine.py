"""Continuous batching: many requests over one loaded model, a step at a time, on one thread.

Requests come from any thread and leave as events; `schedule.py` says who takes part in a step.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktcompile.cache import PagedCache
from ktcompile.errors import BusyError, CapacityError, KtransError
from ktcompile.generate import chunk_of
from ktcompile.penalties import penalised
from ktcompile.request import Event, Finished, Handle, Piece, Reason, Request
from ktcompile.sampling import Choices, Sampled, Sampling, sample
from ktcompile.schedule import MIXED_CHUNK, Active, Schedule
from ktcompile.symbols import PAGE
from ktcompile.text import Text

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)
"""Rows of a decode step on a GPU: a graph is recorded for each. Others are filled up with copies of the last row."""

NO_DISTRIBUTION = "the model's logits are no distribution: they hold NaN or +inf, or nothing but -inf"


@dataclass(frozen=True)
class Statistics:
    """The engine after its last step. Pages are `free`, `used`, or `idle`: written and kept for a prompt like it.

    `read`: tokens that went through the model, some more than once if `preempted`; `reused`: those found in pages
    instead; `prompts`: tokens of the prompts that were answered; `said`: tokens of answers. `model_s` of `step_s`
    seconds are the model's. `finished`: requests by reason.
    """

    running: int = 0
    waiting: int = 0
    pages: int = 0
    used: int = 0
    idle: int = 0
    read: int = 0
    reused: int = 0
    prompts: int = 0
    said: int = 0
    preempted: int = 0
    steps: int = 0
    step_s: float = 0.0
    model_s: float = 0.0
    finished: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class _Chosen:
    """The token after a row, -1 where there is none."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Engine:
    """Answers requests by `model`, as `ktcompile.load` returns it, whose only user it is.

    `cache_tokens`: of all requests together; default: the model's context. `max_batch` requests run at once and
    `max_queue` wait. A step takes at most `chunk` tokens, and `mixed_chunk` of prompts while others are answered, fewer
    if it would take much longer than one of answers alone (`Pace`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        cache_tokens: int | None = None,
        max_batch: int = 8,
        max_queue: int = 256,
        chunk: int | None = None,
        mixed_chunk: int | None = None,
    ) -> None:
        for name, value, least in (("cache_tokens", cache_tokens, PAGE), ("max_queue", max_queue, 1)):
            if value is not None and value < least:
                raise KtransError(f"{name} {value}: {least} or more")
        chunk = chunk_of(model) if chunk is None else chunk
        mixed_chunk = min(chunk, MIXED_CHUNK) if mixed_chunk is None else mixed_chunk
        self.model, self.tokenizer = model, tokenizer.backend_tokenizer
        self.max_queue = max_queue
        self.cache: PagedCache = model.new_cache(1, cache_tokens)
        self.schedule = Schedule(self.cache.pages_each, max_batch, chunk, mixed_chunk)
        self.context = min(int(model.context), self.cache.pages_each * PAGE)
        self.statistics = Statistics(pages=self.cache.pages_each)
        self._has_graphs = self.cache.all_pages.device.type == "cuda"
        self._aside = ThreadPoolExecutor(1, "grammar")  # it has no thread before it is asked
        self._batches: dict[tuple[int, bool], PagedCache] = {}  # by rows, and whether each brings one token
        self._finished: Counter[str] = Counter()
        self._read = self._prompts = self._said = self._steps = 0
        self._step_s = self._model_s = 0.0
        self._lock = threading.Lock()  # of the five below
        self._inbox: deque[Active | Callable[[], None]] = deque()
        self._order = self._queued = self._open = 0
        self._closed = ""  # why nothing is accepted
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._ending = False

    # -------------------------------------------------------------------------------------- from any thread

    def submit(self, request: Request, tell: Callable[[Event], None] | None = None) -> Handle:
        """Queue a request. `tell` gets its events, on the engine's thread, in place of the handle.

        Raises BusyError when the queue is full, CapacityError for a prompt that does not fit, KtransError for one that
        makes no sense or when the engine is closed.
        """
        request.check(int(self.model.config.vocab_size))
        length = len(request.prompt)
        if length >= self.context:
            raise CapacityError(
                f"the prompt has {length} tokens; the context holds {self.context}, the answer included. "
                "Shorten it, or load with a larger context if the model has one"
            )
        room = self.context - length + 1  # the last token of an answer is not stored
        text = Text(self.tokenizer, request.stop_strings, request.skip_special, request.say)
        handle = Handle(request, self._wake.set, tell)
        most = room if request.most is None else min(request.most, room)
        matcher = None if request.grammar is None else request.grammar.matcher()
        with self._lock:
            if self._closed:
                raise KtransError(self._closed)
            if self._queued >= self.max_queue:
                raise BusyError(f"{self._queued} requests wait, as many as may (max_queue); try again later")
            self._order += 1
            self._queued += 1
            self._open += 1
            tokens = list(request.prompt)
            sampling = request.sampling.seeded()
            self._inbox.append(Active(handle, self._order, sampling, tokens, most, text, matcher))
        self._wake.set()
        return handle

    def start(self) -> None:
        """Begin to answer, on a thread of its own."""
        if self._thread is not None:
            raise KtransError("the engine has started already")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the step that runs now; what is not finished is cancelled."""
        with self._lock:
            self._closed = self._closed or "the engine has stopped"
        self._ending = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._aside.shutdown()
        self._receive()
        self._end_all(self.schedule.requests, "cancelled", "the engine has stopped")
        self._publish()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Accept nothing more and wait for what was accepted. False when time is over first."""
        with self._lock:
            self._closed = self._closed or "the engine is about to stop"
        end = None if timeout_s is None else time.perf_counter() + timeout_s
        while self._open:
            if end is not None and time.perf_counter() >= end:
                return False
            if self._thread is None:
                self.step()
            else:
                time.sleep(0.005)
        return True

    def clear_prefixes(self) -> None:
        """Free the pages that no request has; those of running requests are kept for later ones as before."""
        if self._thread is None:
            self.schedule.pages.forget()
            self._publish()
            return
        done = threading.Event()

        def forget() -> None:
            self.schedule.pages.forget()
            done.set()

        self._inbox.append(forget)
        self._wake.set()
        while not done.wait(0.1) and not self._ending:
            pass

    # -------------------------------------------------------------------------------------- the loop

    def _loop(self) -> None:
        while not self._ending:
            try:
                is_busy = self.step()
            except Exception as error:  # one of this file's own: no page can be trusted
                requests = self.schedule.reset()
                self._end_all(requests, "error", _told(error))
                is_busy = False
            if not is_busy:
                self._wake.wait()
                self._wake.clear()

    def step(self) -> bool:
        """Everything once: new requests, cancelled ones, one step of the model. Whether there is more to do.

        For who has not called `start`.
        """
        start = time.perf_counter()
        self._receive()
        for a in [a for a in self.schedule.requests if a.handle.cancelled]:
            self._finish(a, "cancelled")
        self.schedule.admit()
        for a in self.schedule.active:
            self._leave_queue(a)
        rows = self.schedule.plan()
        if rows:
            prompt = sum(count for a, count in rows if a.pending > 1)
            answers = sum(a.pending == 1 for a, _ in rows)
            self._run(rows)
            took = time.perf_counter() - start
            self.schedule.pace.took(took, prompt, answers)
            self._steps += 1
            self._step_s += took
        self._publish()
        return bool(rows or self.schedule.requests)

    def _receive(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Active):
                self.schedule.add(item)
            else:
                item()

    # -------------------------------------------------------------------------------------- one step of the model

    def _run(self, rows: list[tuple[Active, int]]) -> None:
        """One step of these rows. Where it fails each row has one of its own, and who fails there is finished."""
        try:
            found = self._chosen(rows)
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0][0], _told(error), isinstance(error, CapacityError))
                return
            found = [_Chosen(-1, 0.0)] * len(rows)
        again = []
        for row, chosen in zip(rows, found, strict=True):
            if chosen.token < 0 and len(rows) > 1:
                again.append(row)  # NaN of one row may be in the others, too, where attention multiplies it by 0
                continue
            try:
                self._accept(*row, chosen)
            except Exception as error:
                self._fail(row[0], _told(error))
        for row in again:
            self._run([row])

    def _chosen(self, rows: list[tuple[Active, int]]) -> list[_Chosen]:
        """The token after each row. One in the middle of a prompt is chosen too: whether it can be tells of NaN."""
        batch, filled = self._batch(rows)
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        for i, (a, count) in enumerate(filled):
            batch.assign(i, a.table.pages, a.stored)
            ids += a.tokens[a.stored : a.stored + count]
            positions += range(a.stored, a.stored + count)
            keep.append(len(ids) - 1)
        greedy = Sampling(0.0)
        how = [a.sampling if count == a.pending else greedy for a, count in filled]
        given = ids, positions, [count for _, count in filled], keep, batch
        start = time.perf_counter()
        try:
            if any(count == a.pending and a.request.needs_logits for a, count in rows):
                masks = self._masks(rows)
                choices = Choices.of(how, [a.stored + count for a, count in filled])
                return _from_logits(rows, self.model.step(*given), choices, masks)
            sampled = self.model.next_tokens(*given, how)
        finally:
            self._model_s += time.perf_counter() - start
        return [_Chosen(t, p) for t, p in zip(sampled.tokens[: len(rows)], sampled.logprobs, strict=False)]

    def _masks(self, rows: Sequence[tuple[Active, int]]) -> dict[int, Future[Tensor]]:
        """The tokens that grammars allow after each row that has one, found while the model works."""
        asked = [(i, a.matcher) for i, (a, count) in enumerate(rows) if a.matcher and count == a.pending]
        return {i: self._aside.submit(matcher.allowed) for i, matcher in asked}

    def _batch(self, rows: list[tuple[Active, int]]) -> tuple[PagedCache, list[tuple[Active, int]]]:
        """Where these rows go, and the rows with copies of the last one, which write the same to the same place."""
        is_decode, count = all(n == 1 for _, n in rows), len(rows)
        if is_decode and self._has_graphs:
            wanted = next((n for n in ROWS if n >= count), count)
            if self.model.graphs.get(wanted, "") == "":
                count = wanted
        if (count, is_decode) not in self._batches:
            self._batches[count, is_decode] = self.cache.batch(count, self.context)
        return self._batches[count, is_decode], rows + rows[-1:] * (count - len(rows))

    def _accept(self, a: Active, count: int, chosen: _Chosen) -> None:
        """These tokens are stored, and that is the next one, if they were the last."""
        if chosen.token < 0:
            self._fail(a, NO_DISTRIBUTION)
            return
        is_answer = a.pending == count
        a.stored += count
        self._read += count
        self.schedule.pages.keep(a.table, a.tokens, a.stored)
        if not is_answer:
            return
        now = time.perf_counter()
        if len(a.times) == 1:
            self._prompts += len(a.request.prompt)
        a.times[1:] = [a.times[1] if len(a.times) > 1 else now, now]
        if chosen.token in a.request.stop:
            self._finish(a, "stop")
            return
        if a.matcher is not None:
            a.matcher.push(chosen.token)
        a.tokens.append(chosen.token)
        self._said += 1
        text = a.text.push(chosen.token)
        a.handle.tell(Piece(text, chosen.token, chosen.logprob, chosen.top))
        if a.text.stops.found is not None or (a.matcher is not None and a.matcher.is_complete):
            self._finish(a, "stop")
        elif len(a.tokens) - len(a.request.prompt) >= a.most:
            self._finish(a, "length")

    def _fail(self, a: Active, message: str, is_full: bool = False) -> None:
        """Finish it, and zero what it wrote: attention of some kernels multiplies what it must not see by 0."""
        own = a.table.pages[a.table.kept :]
        for pool in self.cache.pools if own else ():
            pool[torch.tensor(own, device=pool.device)] = 0
        self._finish(a, "error", message, is_full)

    # -------------------------------------------------------------------------------------- ends

    def _finish(self, a: Active, reason: Reason, message: str = "", is_full: bool = False) -> None:
        self.schedule.remove(a)
        self._finished[reason] += 1
        text = a.text.stops.rest()
        event = Finished(reason, a.usage(), text, message, a.text.stops.found, is_full)
        a.handle.finished = event
        with suppress(Exception):  # whoever listens has no say in this loop
            a.handle.tell(event)
        self._leave_queue(a)
        with self._lock:
            self._open -= 1

    def _leave_queue(self, a: Active) -> None:
        if not a.is_new:
            return
        a.is_new = False
        with self._lock:
            self._queued -= 1

    def _end_all(self, requests: Sequence[Active], reason: Reason, message: str) -> None:
        for a in requests:
            self._finish(a, reason, message)

    def _publish(self) -> None:
        schedule = self.schedule
        self.statistics = Statistics(
            running=len(schedule.active),
            waiting=len(schedule.waiting),
            pages=schedule.pages.total,
            used=schedule.pages.used,
            idle=len(schedule.pages.idle),
            read=self._read,
            reused=schedule.reused,
            prompts=self._prompts,
            said=self._said,
            preempted=schedule.preempted,
            steps=self._steps,
            step_s=self._step_s,
            model_s=self._model_s,
            finished=tuple(self._finished.items()),
        )


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, KtransError) else f"{type(error).__name__}: {error}"


def _from_logits(
    rows: Sequence[tuple[Active, int]], logits: Tensor, choices: Choices, masks: Mapping[int, Future[Tensor]]
) -> list[_Chosen]:
    """The tokens chosen from logits on the CPU, `[at least rows, vocabulary]`, with what each request wants done."""
    adjusted = logits.to(torch.float32, copy=True)
    for i, (a, count) in enumerate(rows):
        if count == a.pending and a.request.penalties:
            adjusted[i] = penalised(logits[i], a.request.penalties, a.request.prompt, a.answer)
        if i in masks:
            allowed = masks[i].result()[: logits.shape[1]]
            adjusted[i].masked_fill_(~allowed, -torch.inf)
    sampled = Sampled.of(sample(adjusted, choices))
    found = []
    for i, (a, _) in enumerate(rows):
        token, logprob = sampled.tokens[i], sampled.logprobs[i]
        top: tuple[tuple[int, float], ...] = ()
        if token >= 0 and a.request.needs_logits:
            own = logits[i].float().log_softmax(-1)
            logprob = float(own[token])
            likely = own.topk(min(a.request.top, len(own)))
            top = tuple(zip(likely.indices.tolist(), likely.values.tolist(), strict=True))
        found.append(_Chosen(token, logprob, top))
    return found


__all__ = ["Engine", "Statistics"]
