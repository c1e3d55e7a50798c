"""Routed experts run by the pool's driver: submitted, rung for by a flag, or started from C; the results of `moe`."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from native.reference import inputs, layer, route
from torch import Tensor

from ktcompile.backends import native

HERE = [isa for isa, reason in native.isas().items() if reason is None]
HIDDEN, WIDTH, EXPERTS, TOP_K = 256, 288, 5, 3
WEIGHTS = layer(("int8_row",) * 3, EXPERTS, HIDDEN, WIDTH, "swiglu_oai", biases=True).weights  # what every isa takes


@pytest.fixture
def pool() -> Iterator[native.Pool]:
    made = native.Pool(2)
    yield made
    made.close()


def problem(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return inputs(HIDDEN, tokens) + seed, *route("random", EXPERTS, tokens, TOP_K, seed)


def fill(to: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)


class Doorbell:
    """Two flags, and their use from Python as a GPU would."""

    def __init__(self) -> None:
        self.start, self.done = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def ring(self) -> None:
        self.done.zero_()
        self.start.fill_(1)
        end = time.monotonic() + 30
        while not self.done.item():
            assert time.monotonic() < end, "nobody answers"
            time.sleep(0)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("tokens", [0, 1, 8, 33])
def test_the_same_to_the_bit_as_a_call(pool: native.Pool, tokens: int, isa: str) -> None:
    given = problem(tokens)
    made = native.Submission(pool, isa, WEIGHTS, *given)
    expected = native.moe(pool, isa, WEIGHTS, *given)
    made.out.fill_(5)
    made.submit()
    assert made.wait() is made.out and torch.equal(made.out, expected)


def test_fewer_tokens_than_prepared_for(pool: native.Pool) -> None:
    given = problem(33)
    made = native.Submission(pool, HERE[-1], WEIGHTS, *given)
    for tokens in (9, 33, 0, 1):
        made.out.fill_(5)
        made.resize(tokens)
        made.submit()
        assert torch.equal(made.wait()[:tokens], native.moe(pool, HERE[-1], WEIGHTS, *(t[:tokens] for t in given)))
        assert (made.out[tokens:] == 5).all()
    with pytest.raises(ValueError, match="34 tokens; x, ids, scores and out have 33 rows"):
        made.resize(34)


def test_many_in_a_row(pool: native.Pool) -> None:
    """What the tensors hold when it runs is what counts, and nothing but them is kept from run to run."""
    given, out = tuple(t.clone() for t in problem(9)), torch.empty(9, HIDDEN)
    made = native.Submission(pool, HERE[-1], WEIGHTS, *given, out)
    for seed in range(100):
        fill(given, problem(9, seed))
        made.submit()
        assert torch.equal(made.wait(), native.moe(pool, HERE[-1], WEIGHTS, *problem(9, seed))), seed


def test_several_wait_in_one_pool_and_in_two(pool: native.Pool) -> None:
    other = native.Pool(3)
    several = [native.Submission(p, HERE[-1], WEIGHTS, *problem(9, i)) for i in range(4) for p in (pool, other)]
    expected = [native.moe(pool, HERE[-1], WEIGHTS, *problem(9, i // 2)) for i in range(8)]
    for _ in range(20):
        for made in several:
            made.submit()
        for made, want in zip(reversed(several), reversed(expected), strict=True):
            assert torch.equal(made.wait(), want)
    other.close()


@pytest.mark.parametrize(("bad", "why"), [(EXPERTS, r"allowed is \[0, 5\)"), (-2, r"allowed is"), (None, "twice")])
def test_errors_are_raised_at_wait(pool: native.Pool, bad: int | None, why: str) -> None:
    x, ids, scores = problem(9)
    good = ids.clone()
    ids[-1, -1] = ids[-1, 0] if bad is None else bad
    made = native.Submission(pool, "scalar", WEIGHTS, x, ids, scores)
    made.out.fill_(5)
    made.submit()
    with pytest.raises(ValueError, match=why):
        made.wait()
    assert (made.out == 5).all()
    ids.copy_(good)
    made.submit()
    assert torch.equal(made.wait(), native.moe(pool, "scalar", WEIGHTS, x, good, scores))


def test_what_does_not_fit_is_said_when_it_is_prepared(pool: native.Pool) -> None:
    x, ids, scores = problem(3)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        native.Submission(pool, "scalar", WEIGHTS, x.double(), ids, scores)
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        native.Submission(pool, "sse9", WEIGHTS, x, ids, scores)
    made, flag = native.Submission(pool, "scalar", WEIGHTS, x, ids, scores), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"done is torch\.int64 \(1,\) on cpu, not one int32 or uint32 on the CPU"):
        made.listen(flag, flag.long())
    with pytest.raises(ValueError, match=r"start is torch\.int32 \(2,\)"):
        made.listen(torch.zeros(2, dtype=torch.int32), flag)
    with pytest.raises(ValueError, match="start and done are the same flag"):
        made.listen(flag, flag)


def test_order_of_calls(pool: native.Pool) -> None:
    made, bell = native.Submission(pool, "scalar", WEIGHTS, *problem(3)), Doorbell()
    with pytest.raises(RuntimeError, match="there is no run to wait for"):
        made.wait()
    with pytest.raises(RuntimeError, match="it does not listen to a flag"):
        made.unlisten()
    made.listen(bell.start, bell.done)
    for call in (made.submit, lambda: made.listen(bell.start, bell.done)):
        with pytest.raises(RuntimeError, match="it is under way or listens to a flag: wait, or unlisten, first"):
            call()
    bell.ring()
    made.unlisten()
    made.submit()
    made.wait()
    made.close()
    made.close()
    for call in (made.submit, made.wait, made.unlisten, made.host_functions):
        with pytest.raises(ValueError, match="the submission is closed"):
            call()


def test_a_flag_written_by_another_thread(pool: native.Pool) -> None:
    given = tuple(t.clone() for t in problem(9))
    made, bell, wrong = native.Submission(pool, HERE[-1], WEIGHTS, *given), Doorbell(), []
    expected = [native.moe(pool, HERE[-1], WEIGHTS, *problem(9, seed)) for seed in range(50)]
    made.listen(bell.start, bell.done)

    def writer() -> None:
        for seed, want in enumerate(expected):
            fill(given, problem(9, seed))
            bell.ring()
            if not torch.equal(made.check(), want):
                wrong.append(seed)

    thread = threading.Thread(target=writer)
    thread.start()
    thread.join()
    assert not wrong
    made.unlisten()
    bell.start.fill_(1)
    made.submit()
    made.wait()
    assert bell.start.item() == 1, "nobody listens any more"


def test_a_flag_is_seen_after_rest(pool: native.Pool) -> None:
    given = problem(3)
    made, bell = native.Submission(pool, HERE[-1], WEIGHTS, *given), Doorbell()
    made.listen(bell.start, bell.done)
    pool.rest(True)
    time.sleep(0.05)
    assert bell.done.item() == 0
    bell.start.fill_(1)
    time.sleep(0.01)
    assert bell.start.item() == 1, "it sleeps"
    pool.rest(False)
    while not bell.done.item():
        time.sleep(0.0001)
    assert torch.equal(made.check(), native.moe(pool, HERE[-1], WEIGHTS, *given))


def test_the_first_error_of_many_rings_is_kept(pool: native.Pool) -> None:
    x, ids, scores = problem(3)
    good = ids.clone()
    made, bell = native.Submission(pool, "scalar", WEIGHTS, x, ids, scores), Doorbell()
    made.listen(bell.start, bell.done)
    for row in (good[0], torch.tensor([0, 0, 1]), torch.tensor([0, 99, 1]), good[0]):
        ids[0] = row
        bell.ring()
    with pytest.raises(ValueError, match="an expert appears twice among the experts of a token"):
        made.check()
    assert torch.equal(made.check(), native.moe(pool, "scalar", WEIGHTS, x, good, scores))


def test_the_pool_serves_others_while_it_listens(pool: native.Pool) -> None:
    given = problem(9)
    expected, wrong = native.moe(pool, HERE[-1], WEIGHTS, *given), []
    listening, submitted = (native.Submission(pool, HERE[-1], WEIGHTS, *given) for _ in range(2))
    bell, stop = Doorbell(), threading.Event()
    listening.listen(bell.start, bell.done)

    def call() -> None:
        while not stop.is_set():
            if not torch.equal(native.moe(pool, HERE[-1], WEIGHTS, *given), expected):
                wrong.append("moe")

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(30):
        for made in (listening, submitted):
            made.out.zero_()
        submitted.submit()
        bell.ring()
        if not torch.equal(submitted.wait(), expected) or not torch.equal(listening.check(), expected):
            wrong.append("submission")
    stop.set()
    thread.join()
    assert not wrong


def test_started_and_waited_for_from_c(pool: native.Pool) -> None:
    """The addresses are those of C functions of one pointer, as cudaLaunchHostFunc takes them."""
    given = problem(9)
    made = native.Submission(pool, "scalar", WEIGHTS, *given)
    expected, host = native.moe(pool, "scalar", WEIGHTS, *given), made.host_functions()
    submit, wait = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address) for address in (host.submit, host.wait))
    for _ in range(10):
        made.out.zero_()
        submit(host.argument)
        wait(host.argument)
        assert torch.equal(made.check(), expected)


def test_forgotten_while_under_way_or_listening(pool: native.Pool) -> None:
    """Its memory stays until the driver is done with it, and a flag that nobody owns is not touched again."""
    bell = Doorbell()
    for _ in range(20):
        made = native.Submission(pool, "scalar", WEIGHTS, *problem(33))
        made.submit()
        del made
        listening = native.Submission(pool, "scalar", WEIGHTS, *problem(33))
        listening.listen(bell.start, bell.done)
        bell.start.fill_(1)
        del listening
        bell.start.fill_(1)
        time.sleep(0.001)
        assert bell.start.item() == 1
        bell.start.zero_()
    out = torch.empty(33, HIDDEN)
    native.moe(pool, "scalar", WEIGHTS, *problem(33), out)
    made = native.Submission(pool, "scalar", WEIGHTS, *problem(33))
    made.submit()
    assert torch.equal(made.wait(), out)


def test_closed_while_listening() -> None:
    pool, bell = native.Pool(2), Doorbell()
    first, second = (native.Submission(pool, "scalar", WEIGHTS, *problem(3)) for _ in range(2))
    first.listen(bell.start, bell.done)
    first.close()
    second.listen(bell.start, bell.done)
    bell.ring()
    pool.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        second.unlisten()
    assert torch.equal(second.check(), second.out)
    second.close()


def test_in_a_forked_child(pool: native.Pool) -> None:
    """The child is told, and ends without waiting for a driver that it does not have."""
    made, bell = native.Submission(pool, "scalar", WEIGHTS, *problem(3)), Doorbell()
    made.listen(bell.start, bell.done)
    child = os.fork()
    if child == 0:
        try:
            made.unlisten()
        except RuntimeError as error:
            made.close()
            os._exit(0 if "before fork()" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    bell.ring()
