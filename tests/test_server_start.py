"""How long `ktrans serve` takes until it is ready, and that a second start neither captures nor plans."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

SECONDS = 10.0
"""Of CPU time that a second start takes at most: it is three (docs/performance.md), and other tests run beside it."""


def started(cache: Path) -> tuple[float, str]:
    """CPU seconds from the command to the end of a server that was asked once it was healthy, and what it said."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    end, before = time.monotonic() + 300, resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "ktcompile.cli", "serve", "--port", str(port)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while process.poll() is None and time.monotonic() < end:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, told


def test_a_second_start_reuses_the_first(tmp_path: Path) -> None:
    first, told = started(tmp_path)
    assert "graphs kept in" in told and "serving tiny-deepseek-v3" in told, told
    second, told = started(tmp_path)
    assert "graphs read from" in told and "serving tiny-deepseek-v3" in told, told
    assert second < 0.8 * first and second < SECONDS, (first, second)
