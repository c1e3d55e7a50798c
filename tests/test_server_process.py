"""`ktrans serve` as a process: what it logs, signals, strange surroundings, being killed while it loads."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
STORY = {"messages": [{"role": "user", "content": "Tell me a story about a dog named Max."}], "temperature": 0}
SERVE = [sys.executable, "-c", "from ktcompile.cli import script; script()", "serve", "--port", "0"]


class Process:
    """A server of its own: `log` is what it wrote, `base` its address once it has one."""

    def __init__(self, *args: str, **environment: str) -> None:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
        self.running = subprocess.Popen(
            [*SERVE, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True, encoding="utf-8"
        )
        self.log, self.base = "", ""
        self.served = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.running.stdout is not None
        for line in self.running.stdout:
            self.log += line
            if line.startswith("serving "):
                self.base = line.split(" at ")[1].split("/,")[0]
                self.served.set()
        self.served.set()

    def ready(self) -> "Process":
        assert self.served.wait(180) and self.base, self.log
        return self

    def ask(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        return httpx.post(f"{self.base}/v1/chat/completions", json=body, headers=headers, timeout=120)

    def end(self, sign: signal.Signals = signal.SIGTERM) -> int:
        self.running.send_signal(sign)
        code = self.running.wait(40)
        self.reader.join(10)
        return code


@contextmanager
def process(*args: str, **environment: str) -> Iterator[Process]:
    made = Process(*args, **environment)
    try:
        yield made
    finally:
        made.running.kill()
        made.running.wait()


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text("sesame-7f3a\n")
    with process("--api-key-file", str(file)) as made:
        yield made.ready()


def test_it_keeps_secrets(keyed: Process) -> None:
    """Neither the key nor what people write is logged, also where a request is refused or fails."""
    key = {"authorization": "Bearer sesame-7f3a"}
    secret = [{"role": "user", "content": "tangerine " * 3}]
    assert keyed.ask({"messages": secret, "max_tokens": 2}, **key).status_code == 200
    assert keyed.ask({"messages": secret}, authorization="Bearer sesame-7f3").status_code == 401
    assert keyed.ask({"messages": secret, "n": "tangerine"}, **key).status_code == 400
    assert keyed.ask({"messages": [{"role": "tangerine", "content": "tangerine"}]}, **key).status_code == 400
    with httpx.stream("GET", f"{keyed.base}/v1/models?key=sesame-7f3a&q=tangerine", timeout=60) as answer:
        assert answer.status_code == 401
    httpx.post(f"{keyed.base}/tangerine", headers=key, timeout=60)
    assert "sesame" not in keyed.log and "tangerine" not in keyed.log
    assert b"sesame" not in Path(f"/proc/{keyed.running.pid}/cmdline").read_bytes()


def test_large_bodies_leave_no_memory(keyed: Process) -> None:
    """Bodies of the most that is taken, and of more, several at once."""
    key = {"authorization": "Bearer sesame-7f3a"}

    def burst() -> None:
        for size, status in ((15 << 20, 400), (17 << 20, 413)):
            body = b'{"messages": "' + b"x" * size + b'"}'
            url = f"{keyed.base}/v1/chat/completions"
            answer = httpx.post(url, content=body, headers={**key, "content-type": "application/json"}, timeout=60)
            assert answer.status_code == status

    for _ in range(6):  # the allocator takes more until it has had enough
        burst()
    before = resident(keyed.running.pid)
    for _ in range(8):
        burst()
    assert resident(keyed.running.pid) - before <= 2 * (17 << 20), "no more than two of sixteen bodies"
    assert content(keyed.ask(QUESTION, **key)) == "The capital of France is Paris."


def test_a_client_that_has_gone_does_not_end_it(keyed: Process) -> None:
    """What is written to a connection that the other side has reset may raise this signal."""
    keyed.running.send_signal(signal.SIGPIPE)
    assert content(keyed.ask(QUESTION, authorization="Bearer sesame-7f3a")) == "The capital of France is Paris."


def test_killed_while_loading(tmp_path: Path) -> None:
    """At any moment of packing and of writing packed weights: the next start is like a first one."""
    packed = tmp_path / "packed"
    for delay in (0.0, 0.3, 0.8):
        with process("--packed-cache", str(packed)) as made:
            end = time.monotonic() + 60
            while not (packed.is_dir() and any(packed.iterdir())) and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(delay)
            made.running.kill()
            made.running.wait()
    with process("--packed-cache", str(packed)) as made:
        assert content(made.ready().ask(QUESTION)) == "The capital of France is Paris."
        assert made.end() == -signal.SIGTERM


def test_a_strange_environment(tmp_path: Path) -> None:
    """A path with spaces and letters of others, no HOME that can be written to, and no locale."""
    folder = tmp_path / "mes modèles 模型"
    folder.mkdir()
    file = folder / "tiny model é.gguf"
    with (files("ktcompile.assets") / "tiny-deepseek-v3-Q4_K_M.gguf").open("rb") as source, file.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    nowhere = {
        "HOME": "/proc/nowhere",
        "XDG_CACHE_HOME": "/proc/nowhere/cache",
        "XDG_STATE_HOME": "/proc/nowhere/state",
    }
    with process(str(file), LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="", **nowhere) as made:
        assert content(made.ready().ask(QUESTION)) == "The capital of France is Paris."
        answer = made.ask({"messages": [{"role": "user", "content": "Zoë 漢字 🙂"}], "max_tokens": 4})
        assert answer.status_code == 200
        assert made.end() == -signal.SIGTERM
    assert "Traceback" not in made.log


def test_a_signal_drains() -> None:
    """What is being said is said to its end, others are refused, and the process ends then."""
    with process("--max-new-tokens", "400") as made:
        base = made.ready().base
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=STORY | {"stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            made.running.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.TransportError):
                made.ask(QUESTION)
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]" and '"finish_reason": "' in said[-2]
        assert made.running.wait(20) == -signal.SIGTERM


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it(second: signal.Signals) -> None:
    with process() as made:
        url = f"{made.ready().base}/v1/chat/completions"
        with httpx.stream("POST", url, json=STORY | {"stream": True, "logit_bias": {"1": -100}}, timeout=60) as stream:
            next(stream.iter_lines())
            made.running.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            start = time.monotonic()
            made.running.send_signal(second)
            assert made.running.wait(20) < 0
            assert time.monotonic() - start < 5
