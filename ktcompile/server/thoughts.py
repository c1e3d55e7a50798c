"""Parting an answer, as it comes, into what the model thinks and what it says."""

from ktcompile.generate import THINK as OPEN
from ktcompile.generate import THOUGHT as CLOSE


class Thoughts:
    """`push` text, take pieces `(thought, text)`: whether it is between the tags, and what of it is certain.

    Thoughts are only what an answer begins with (after white space), or what it is `inside` of from the start, where
    the prompt ends with the opening tag. A tag may come in pieces; what could become one is kept back until it is
    known. White space next to the tags belongs to neither.
    """

    def __init__(self, inside: bool = False) -> None:
        self._state = "thought" if inside else "start"
        self._held = ""
        self._trim = inside

    @property
    def inside(self) -> bool:
        """Whether what comes now is thought."""
        return self._state == "thought"

    def push(self, text: str) -> list[tuple[bool, str]]:
        """What is certain after this text."""
        self._held += text
        found: list[tuple[bool, str]] = []
        if self._state == "start":
            begun = self._held.lstrip()
            if len(begun) < len(OPEN) and OPEN.startswith(begun):
                return found
            self._state = "said"
            if begun.startswith(OPEN):
                self._state, self._held, self._trim = "thought", begun[len(OPEN) :], True
        if self._state == "thought":
            before, tag, after = self._held.partition(CLOSE)
            if tag:
                self._add(found, True, before.rstrip())
                self._state, self._held, self._trim = "said", after, True
            else:
                sure = len(self._held) - _pending(self._held)
                self._add(found, True, self._held[:sure])
                self._held = self._held[sure:]
        if self._state == "said":
            self._add(found, False, self._held)
            self._held = ""
        return found

    def finish(self) -> list[tuple[bool, str]]:
        """What was kept back."""
        found: list[tuple[bool, str]] = []
        self._add(found, self._state == "thought", self._held.rstrip() if self._state == "thought" else self._held)
        self._held = ""
        return found

    def _add(self, found: list[tuple[bool, str]], thought: bool, text: str) -> None:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        if text:
            found.append((thought, text))


def _pending(text: str) -> int:
    """How many of the last characters may be white space before a closing tag, or the tag's beginning."""
    tag = next((n for n in range(min(len(text), len(CLOSE) - 1), 0, -1) if text.endswith(CLOSE[:n])), 0)
    before = text[: len(text) - tag]
    return tag + len(before) - len(before.rstrip())


__all__ = ["CLOSE", "OPEN", "Thoughts"]
