"""The text of an answer as its tokens come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence, Set

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Stops:
    """Text piece by piece up to the first stop string, however the pieces are cut.

    The first one is the one that is complete first, of several the longest. What might be the beginning of one is held
    back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(dict.fromkeys(s for s in stops if s))
        self.longest = max(map(len, self.stops), default=0)
        self.held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What can be said now. Once `found` is set, nothing more."""
        if self.found is not None or not piece:
            return ""
        text = self.held + piece
        ends = [(at + len(s), at, s) for s in self.stops if (at := text.find(s)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self.held = ""
            return text[:at]
        most = min(self.longest - 1, len(text))
        hold = next((n for n in range(most, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)
        said, self.held = text[: len(text) - hold], text[len(text) - hold :]
        return said

    def rest(self) -> str:
        """What was held back and is no stop string, as nothing follows."""
        said, self.held = self.held, ""
        return said


class Text:
    """The text of one answer. Special tokens have none if `skip_special`, but for those of `say`."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], skip_special: bool, say: Set[int] = frozenset()
    ) -> None:
        self.tokenizer, self.stops, self.say = tokenizer, Stops(stops), say
        self.stream = DecodeStream(skip_special_tokens=skip_special)

    def push(self, token: int) -> str:
        """What can be said with one more token; half a character waits for its other half."""
        said = self.tokenizer.id_to_token(token) if token in self.say else self.stream.step(self.tokenizer, token)
        return self.stops.push(said or "")


__all__ = ["Stops", "Text"]
