"""What a loaded model has done: seconds of CPU and GPU, bytes of experts read. Asking makes nobody wait."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ktcompile.kernel import Counting


@dataclass(frozen=True)
class Work:
    """Since the process began. `gpu_s`: of steps on a GPU from the first to the last kernel, so with waiting for the
    CPU's experts; None without a GPU.
    """

    cpu_moe_s: float
    expert_bytes: int
    gpu_s: float | None


class StreamClock:
    """Seconds of steps on a GPU's stream, by two events a step, which are read once they are over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, work is enqueued on the current stream. A step that fails does not count."""
        stream = torch.cuda.current_stream(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        yield
        end.record(stream)
        self._fold()
        self._open.append((start, end))

    @property
    def seconds(self) -> float:
        """Of the steps that are over."""
        self._fold()
        return self._seconds

    def _fold(self) -> None:
        with self._lock:
            while self._open and self._open[0][1].query():
                start, end = self._open.popleft()
                self._seconds += start.elapsed_time(end) / 1e3


def work(counting: Iterable[Counting], clock: StreamClock | None) -> Work:
    """The sum of what these have counted, each of them once."""
    counts = [c.counts() for c in {id(c): c for c in counting}.values()]
    return Work(sum(c.seconds for c in counts), sum(c.nbytes for c in counts), clock.seconds if clock else None)


__all__ = ["StreamClock", "Work", "work"]
