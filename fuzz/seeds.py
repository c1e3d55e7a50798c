"""Write the seeds of a fuzz target."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_seeds(arguments: Sequence[str], seeds: Mapping[str, bytes]) -> list[str]:
    """Put one file a seed into the first folder among libFuzzer's arguments, which are returned as they are."""
    folder = next((Path(a) for a in arguments[1:] if not a.startswith("-") and Path(a).is_dir()), None)
    for raw in seeds.values() if folder else ():
        (Path(str(folder)) / hashlib.sha256(raw).hexdigest()[:16]).write_bytes(raw)
    return list(arguments)
