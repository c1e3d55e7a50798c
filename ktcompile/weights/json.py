"""Read JSON of unknown origin: bounded, objects only, no key twice, no NaN."""

import json
from pathlib import Path
from typing import NoReturn

from ktcompile.errors import ModelFileError


def load_json(path: Path, most_bytes: int) -> dict[str, object]:
    """A JSON object from a file; ModelFileError if it is too large, not JSON, has a key twice or a NaN."""
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise ModelFileError(f"{path}: {size} bytes; {most_bytes} are allowed")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(text: bytes, where: str) -> dict[str, object]:
    """A JSON object; ModelFileError starting with `where` if it is anything else."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content: dict[str, object] = {}
        for name, value in pairs:
            if name in content:
                raise ModelFileError(f"{where}: {name[:200]!r} occurs twice")
            content[name] = value
        return content

    def constant(name: str) -> NoReturn:
        raise ModelFileError(f"{where}: holds {name}, which is no JSON number")

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{where}: is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{where}: must be a JSON object, not {type(content).__name__}")
    return content
