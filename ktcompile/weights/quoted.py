"""Names of unknown origin in messages: nothing in them may move a terminal's cursor, and none may fill the screen."""

import re
from collections.abc import Sequence

MOST = 200  # characters; real names have 80

_PLAIN = re.compile(r"[\w.+/-]{1,100}", re.ASCII)


def quoted(name: str) -> str:
    """The name in quotes, with escape codes for what cannot be printed, cut after `MOST` characters."""
    text = repr(name[: MOST + 1])
    return text if len(text) <= MOST else f"{text[:MOST]}…"


def plain(name: str) -> str:
    """The name as it is if it is a word, else in quotes."""
    return name if _PLAIN.fullmatch(name) else quoted(name)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of the names, and how many there are beside them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(plain, names[:most]))}{more}"
