"""A server over the embedded model, on a thread of this process."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from openai import OpenAI

from ktcompile import load
from ktcompile.checkpoint import open_checkpoint
from ktcompile.engine import Engine
from ktcompile.generate import Sampling, stop_tokens
from ktcompile.request import Event, Finished, Handle, Piece, Request
from ktcompile.server import State, listen, serve

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a dog named Max."}]
KEY = "secret-key"


class Served:
    """A running server: its engine, its address, and OpenAI's client for it."""

    def __init__(self) -> None:
        checkpoint = open_checkpoint()
        self.state = State("tiny", Sampling(), None)
        self.loaded = threading.Event()
        self.go = threading.Event()

        def loading(state: State) -> None:
            self.go.wait(60)
            model: Any = load(checkpoint, context=1024)
            engine = Engine(model, checkpoint.tokenizer, max_batch=8, max_queue=4)
            engine.start()
            state.tokenizer, state.page = checkpoint.tokenizer, model.plans["decode"].text()
            state.stop_tokens = stop_tokens(checkpoint.tokenizer, checkpoint.generation)
            state.engine = engine

        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        given = {"listener": listener, "key": KEY, "hosts": ("127.0.0.1",), "ready": self.loaded.set}
        threading.Thread(target=serve, args=(self.state, loading), kwargs=given, daemon=True).start()
        self.http = httpx.Client(base_url=self.base, headers={"authorization": f"Bearer {KEY}"}, timeout=120)
        self.client = OpenAI(base_url=f"{self.base}/v1", api_key=KEY, max_retries=0, timeout=120)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def idle(self) -> bool:
        """Wait until the engine has nothing left; whether all pages came back."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            now = self.state.engine.statistics
            if not now.running and not now.waiting and not now.used:
                return True
            time.sleep(0.02)
        return False


def scripted(end: Finished, *texts: str) -> Callable[..., Handle]:
    """What answers in place of `Engine.submit`: these texts, a token each, and that end."""

    def submit(request: Request, tell: Callable[[Event], None]) -> Handle:
        for text in texts:
            tell(Piece(text, 0, 0.0))
        tell(end)
        return Handle(request, lambda: None, tell)

    return submit


def running() -> Iterator[Served]:
    """A server that has its model, and at the end gave all pages back."""
    found = Served()
    for _ in range(200):  # while it loads, it says so
        try:
            answer = found.http.get("/health")
            break
        except httpx.ConnectError:
            time.sleep(0.05)
    assert answer.status_code == 503 and answer.json()["status"] == "loading" and "progress" in answer.json()
    refused = found.post("/v1/chat/completions", {"messages": QUESTION})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
    assert refused.headers["retry-after"] == "5"
    found.go.set()
    assert found.loaded.wait(120)
    yield found
    assert found.idle()
