"""How long `ktrans serve` takes until it is ready, and that a second start neither captures nor plans."""

import resource
from pathlib import Path

import httpx
from test_server_process import process

SECONDS = 10.0
"""Of CPU time that a second start takes at most: it is three (docs/performance.md), and other tests run beside it."""


def started(cache: Path) -> tuple[float, str]:
    """CPU seconds from the command to the end of a server that was asked once it was healthy, and what it said."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with process(XDG_CACHE_HOME=str(cache)) as server:
        assert httpx.get(f"{server.ready().base}/health").status_code == 200
        server.end()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, server.log


def test_a_second_start_reuses_the_first(tmp_path: Path) -> None:
    first, told = started(tmp_path)
    assert "graphs kept in" in told and "serving tiny-deepseek-v3" in told, told
    second, told = started(tmp_path)
    assert "graphs read from" in told and "serving tiny-deepseek-v3" in told, told
    assert second < 0.8 * first and second < SECONDS, (first, second)
