"""How long something takes, on a machine that others use too."""

import time
from collections.abc import Callable


def within(seconds: float, act: Callable[[], object], tries: int = 3) -> bool:
    """Whether `act` took less than so many seconds, at least once of a few times."""
    for _ in range(tries):
        start = time.perf_counter()
        act()
        if time.perf_counter() - start < seconds:
            return True
    return False
