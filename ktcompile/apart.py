"""A program of ours in a process of its own, for work on what strangers wrote: it answers lines, and can be ended.

The program sets itself a timer (SIGALRM) and a bound of memory: it ends whatever it does, also when its owner is gone.
"""

import signal
import subprocess
import sys
import threading
from contextlib import suppress
from os import pathsep
from pathlib import Path

from ktcompile.errors import KtransError


class Ended(KtransError):
    """The process ended before its answer. `was_late`: by its timer."""

    def __init__(self, text: str, was_late: bool) -> None:
        super().__init__(text)
        self.was_late = was_late


class Apart:
    """One process of the program in `file`, which reads `first`, a line, before all others. For several threads.

    Lines are ASCII without breaks. It is started at the first need, and again after its end.
    """

    def __init__(self, file: Path, first: str = "") -> None:
        self._command = [sys.executable, "-P", str(file)]  # -P: the files beside it are no modules for themselves
        self._first = first
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None

    def ask(self, line: str) -> str:
        """The line that it answers to this one. Raises Ended."""
        with self._lock:
            running = self._started()
            told = ""
            with suppress(OSError):  # it is gone
                told = _said(running, line)
            if told:
                return told
            running.kill()
            code = running.wait()
        self.start_soon()
        raise Ended(f"its process ended with {code}", code == -signal.SIGALRM)

    def start_soon(self) -> None:
        """Start it meanwhile, so that who comes next need not wait."""

        def start() -> None:
            with self._lock:
                self._started()

        threading.Thread(target=start, name="apart", daemon=True).start()

    def _started(self) -> "subprocess.Popen[str]":
        if self._running is not None and self._running.poll() is None:
            return self._running
        self._running = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            env={"PYTHONPATH": pathsep.join(sys.path)},  # and no keys
            start_new_session=True,  # Ctrl-C is not for it
        )
        if self._first:
            with suppress(OSError):  # one that ends at once is found so by who asks it
                _write(self._running, self._first)
        return self._running


def _write(running: "subprocess.Popen[str]", line: str) -> None:
    assert running.stdin is not None
    running.stdin.write(line + "\n")
    running.stdin.flush()


def _said(running: "subprocess.Popen[str]", line: str) -> str:
    _write(running, line)
    assert running.stdout is not None
    return running.stdout.readline()


__all__ = ["Apart", "Ended"]
