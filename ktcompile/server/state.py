"""What all endpoints share: the engine once it is there, before that how far loading is."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ktcompile.grammar import Grammars
from ktcompile.sampling import Sampling
from ktcompile.server.errors import ApiError


@dataclass
class State:
    """One model being loaded or served. Fields are written by the thread that loads, and read by all."""

    name: str
    default: Sampling
    max_new_tokens: int | None = None
    think: bool = False  # answers begin inside <think>
    started: float = field(default_factory=time.time)
    progress: tuple[str, int, int] = ("reading the model", 0, 1)
    failed: str | None = None
    engine: Any = None
    tokenizer: Any = None
    stop_tokens: frozenset[int] = frozenset()
    page: str = ""
    draining: bool = False

    def ready(self) -> Any:
        """The engine. ApiError 503 while the model loads, if it cannot be, and once the server is about to end."""
        if self.failed is not None:
            raise ApiError(503, f"the model could not be loaded: {self.failed}", code="load_failed")
        if self.draining:
            raise ApiError(503, "the server is about to stop", code="draining", headers={"retry-after": "10"})
        if self.engine is None:
            what, done, total = self.progress
            raise ApiError(503, f"loading: {what}, {done} of {total}", code="loading", headers={"retry-after": "5"})
        return self.engine

    def check_model(self, name: str | None) -> None:
        """404 for another model than this one; editors that know no name may leave it out or say "default"."""
        if name not in (None, "", "default", self.name):
            raise ApiError(
                404, f"there is no model {name!r} here; there is {self.name!r}", param="model", code="model_not_found"
            )

    @cached_property
    def grammars(self) -> Grammars:
        """Of this model; the first who asks waits until its tokens are compiled."""
        return Grammars(self.engine.tokenizer, int(self.engine.model.config.vocab_size), self.stop_tokens)

    @property
    def bos(self) -> list[int]:
        """The token that a text begins with, if the model has one."""
        return [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]

    @property
    def context(self) -> int:
        """Tokens of a request, answer included."""
        return int(self.engine.context)


__all__ = ["State"]
