"""Work on many pieces of a model at once: reading and C code let other threads run."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def each(work: Callable[[Item], object], items: Iterable[Item], threads: int = 0) -> None:
    """`work(item)` for every item, by `threads` threads (0: as many as this process may use).

    At most four times as many items as threads wait at a time, so `items` may be a generator of large things. The first
    exception ends it: what has not begun is dropped, and the exception is raised.
    """
    count = threads or len(os.sched_getaffinity(0))
    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(count, "ktrans") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 4 * count:
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
