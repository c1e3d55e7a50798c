"""Fuzz the rules parser: RulesError, naming the file, is the only exception that a text may cause.

A text that is accepted must be the same pipeline after a round trip through `dump`.
"""

import sys

import atheris
import torch  # noqa: F401  (imported before instrumentation: only our own branches and yaml's guide the fuzzer)

with atheris.instrument_imports(include=["ktcompile.pipeline", "ktcompile.passes", "yaml"]):
    from ktcompile.pipeline import parse_rules, shipped

from hostile import RULES, RULES_AGAINST_A_MODEL
from seeds import write_seeds
from strategies import RULES as ONE_OF_EVERYTHING

from ktcompile.errors import RulesError

MOST_BYTES = 4 << 10


def one_input(data: bytes) -> None:
    """Parse the bytes as a rules file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    try:
        made = parse_rules(text, "my.yaml")
    except RulesError as error:
        str(error).encode()  # what is printed can be printed
        assert ": " in str(error) and len(str(error)) < 4_000, str(error)
        return
    assert parse_rules(made.dump(), "again.yaml") == made


def main() -> None:
    """Write the seeds, then fuzz."""
    from importlib.resources import files

    ours = {name: (files("ktcompile.rules") / f"{name}.yaml").read_bytes() for name in shipped()}
    cases = {name: raw for name, raw in RULES.items() if len(raw) < MOST_BYTES}
    models = {name: text.encode() for name, text in RULES_AGAINST_A_MODEL.items()}
    seeds = {"everything": ONE_OF_EVERYTHING.encode(), **ours, **cases, **models}
    atheris.Setup(write_seeds(sys.argv, seeds), one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
