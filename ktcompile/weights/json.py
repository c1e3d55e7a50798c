"""Read JSON of unknown origin: bounded, objects only, no key twice, no NaN, no infinity, no half characters."""

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import NoReturn

from ktcompile.errors import ModelFileError
from ktcompile.weights.quoted import quoted

MAX_VALUES = 400_000  # the index of a trillion-parameter model has 207,000 tensors
MAX_WIDE_BYTES = 8 << 20  # of text that is not ASCII: Python may take four bytes a character for it


def load_json(path: Path, most_bytes: int, most_values: int = MAX_VALUES) -> dict[str, object]:
    """A JSON object from a file; ModelFileError if it is no file, too large or anything that parse_json refuses."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFileError(f"{path}: is no regular file")
            if status.st_size > most_bytes:
                raise ModelFileError(f"{path}: {status.st_size} bytes; {most_bytes} are allowed")
            return parse_json(file.read(status.st_size), str(path), most_values)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to does not block."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse_json(text: bytes, where: str, most_values: int = MAX_VALUES) -> dict[str, object]:
    """A JSON object; ModelFileError starting with `where` if it is anything else or has too many values."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ModelFileError(f"{where}: {quoted(twice)} occurs twice")
        return content

    def constant(name: str) -> NoReturn:
        raise ModelFileError(f"{where}: holds {name}, which is no JSON number")

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ModelFileError(f"{where}: holds {digits[:40]}, which is no finite number")
        return value

    # Every value stands after one of these bytes: counted in no time, while each value may cost 200 bytes of memory.
    values = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if values > most_values:
        raise ModelFileError(f"{where}: up to {values} values; {most_values} are allowed")
    if len(text) > MAX_WIDE_BYTES and not text.isascii():
        raise ModelFileError(f"{where}: {len(text)} bytes, not all ASCII; {MAX_WIDE_BYTES} are allowed then")
    has_surrogates = b"\\ud" in text or b"\\uD" in text
    try:
        decoded = text.decode("utf-8")
        del text  # half of the memory, if the caller keeps none
        content = json.loads(decoded, object_pairs_hook=unique, parse_constant=constant, parse_float=number)
        if has_surrogates:  # half a pair is a string that can neither be printed nor be a file name
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ModelFileError(f"{where}: holds half a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{where}: is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{where}: must be a JSON object, not {type(content).__name__}")
    return content
