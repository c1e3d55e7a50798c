"""How long `ktrans serve` takes until it is ready, and that a second start neither captures nor plans."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

SECONDS = 15.0
"""A second start, on a machine that is busy with other tests; quiet it is three (docs/performance.md)."""


def started(cache: Path) -> tuple[float, str]:
    """Seconds from the command to a healthy server, and what it said."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start = time.perf_counter()
    command = [sys.executable, "-m", "ktcompile.cli", "serve", "--port", str(port)]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while process.poll() is None and time.perf_counter() - start < 120:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        took = time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    return took, told


def test_a_second_start_reuses_the_first(tmp_path: Path) -> None:
    first, told = started(tmp_path)
    assert "graphs kept in" in told and "serving tiny-deepseek-v3" in told, told
    second, told = started(tmp_path)
    assert "graphs read from" in told and "serving tiny-deepseek-v3" in told, told
    assert second < first and second < SECONDS, (first, second)
