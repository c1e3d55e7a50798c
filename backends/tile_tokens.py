"""From how many tokens of a call an expert is computed by tiles: the user's table, before the one that ships.

A table is instruction set -> storage type -> tokens; 0: never. `ktrans tune` measures the user's. The shipped one is
beside this file and complete: it has every instruction set with tiles, and every type that such a one takes.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from ktcompile import RulesError
from ktcompile.backends import native
from ktcompile.files import atomic, cache_folder

Table = Mapping[str, Mapping[str, int]]

MOST = 1 << 20
"""Tokens that an entry may name; more in one call are no use."""

_FIX = "`ktrans tune` writes the file anew; without it the table that ships with ktcompile is used"


def user_file() -> Path:
    """Where `ktrans tune` keeps what it measured for this user."""
    return cache_folder() / "tile_tokens.yaml"


def shipped() -> Table:
    """The table that ships with ktcompile; its instruction sets are those that have tiles."""
    file = files("ktcompile.backends") / "tile_tokens.yaml"
    return _parse(file.read_text(encoding="utf-8"), str(file))


def user() -> Table:
    """The user's table, empty if there is none; RulesError names the file and the entry that is damaged."""
    path = user_file()
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RulesError(f"{path}: cannot be read: {error}; {_FIX}") from error


def tile_tokens(isa: str, types: Iterable[str]) -> int:
    """Experts of these storage types with so many tokens in a call are computed by tiles; 0: none is.

    Each type counts as the user's table says, else the shipped one; the largest decides, and "never" is the largest.
    """
    complete = shipped()
    if isa not in complete:
        return 0
    mine = user().get(isa, {})
    counts = [mine[type] if type in mine else complete[isa][type] for type in types]
    return 0 if 0 in counts else max(counts)


def write(path: Path, measured: Table, about: str) -> str:
    """Keep `measured` in `path`, with what was measured there before and is not in it; returns the text.

    `about` names machine and command. A damaged file is replaced. Raises OSError.
    """
    try:
        before = _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, RulesError):
        before = {}
    text = _text(measured, before, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return text


def _text(measured: Table, before: Table, about: str) -> str:
    lines = [
        "# Experts with so many tokens in a call are computed by tiles, not by streaming their weights; 0: never.",
        f"# {about}",
    ]
    for isa in dict.fromkeys((*measured, *before)):
        new, old = measured.get(isa, {}), before.get(isa, {})
        lines.append(f"{isa}:")
        for type in (t for t in native.TYPES if t in new or t in old):
            lines.append(f"  {type}: {new[type]}" if type in new else f"  {type}: {old[type]}  # from a run before")
    return "\n".join(lines) + "\n"


@cache
def _parse(text: str, file: str) -> Table:
    """The table that a file's text describes; RulesError names the file and the entry."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RulesError(f"{file}: not YAML: {' '.join(str(error).split())}; {_FIX}") from error
    for isa, counts in _entries(found, file, "the file", "an instruction set", native.FAMILY).items():
        for name, tokens in _entries(counts, file, isa, "a storage type", native.TYPES).items():
            if type(tokens) is not int or not 0 <= tokens <= MOST:
                raise RulesError(f"{file}: {isa}: {name}: {tokens!r} is not 0 to {MOST} tokens; {_FIX}")
    table: Table = found
    return table


def _entries(found: object, file: str, where: str, what: str, known: Iterable[str]) -> Mapping[str, object]:
    if not isinstance(found, dict):
        raise RulesError(f"{file}: {where}: {found!r} is no mapping from {what}; {_FIX}")
    for name in found:
        if name not in known:
            raise RulesError(f"{file}: {where}: {name!r} is not {what}; there are {', '.join(known)}; {_FIX}")
    return found
