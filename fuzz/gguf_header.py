"""Fuzz everything that reads a GGUF header: the parser, the name map, the configuration, the tokenizer, `inspect`.

The input is a whole file. ModelFileError is the only exception that a file may cause. Options are libFuzzer's:
fuzz/run.sh gives a time, a corpus folder and a place for findings.
"""

import os
import sys
from pathlib import Path

import atheris
import numpy  # noqa: F401  (imported before instrumentation: only our own branches guide the fuzzer)
import tokenizers  # noqa: F401
import torch

with atheris.instrument_imports(include=["ktcompile.weights", "ktcompile.gguf_config", "ktcompile.inspect"]):
    from ktcompile.errors import ModelFileError
    from ktcompile.gguf_config import config_fields, generation_fields
    from ktcompile.inspect import inspect_text
    from ktcompile.weights import GGUFSource, values
    from ktcompile.weights.gguf_header import read_header

from hostile import EVERYTHING, GGUF, gguf_file, gguf_model
from seeds import write_seeds

from ktcompile.tokenizer import tokenizer_from_gguf
from ktcompile.weights.file import ModelFile

MOST_BYTES = 64 << 10
FILE = os.memfd_create("input.gguf")
PATH = f"/proc/self/fd/{FILE}"


def one_input(data: bytes) -> None:
    """Read the bytes as a GGUF file in every way that ktcompile has."""
    os.ftruncate(FILE, 0)
    os.pwrite(FILE, data, 0)
    for read in (_header, _model, _tokenizer, _page):
        try:
            read(PATH)
        except ModelFileError as error:
            _check_text(str(error))
            assert PATH in str(error) and len(str(error)) < 4_000, str(error)


def _check_text(text: str) -> None:
    """It can be printed, and nothing in it moves the cursor."""
    assert text.replace("\n", "").isprintable(), repr(text)


def _header(path: str) -> None:
    read_header(ModelFile(Path(path)))


def _model(path: str) -> None:
    source = GGUFSource(path)
    config_fields(source.metadata, path, source.stored())
    generation_fields(source.metadata, path)
    source.unused()
    for key in source.keys():  # noqa: SIM118  (no mapping)
        try:
            values(source, key)
        except ModelFileError:
            continue


def _tokenizer(path: str) -> None:
    tokenizer_from_gguf(GGUFSource(path).metadata, path)


def _page(path: str) -> None:
    _check_text(inspect_text(path))


def main() -> None:
    """Write the seeds, then fuzz."""
    torch.set_num_threads(1)
    cases = {name: raw for name, (raw, _) in GGUF.items() if len(raw) < MOST_BYTES}
    options = write_seeds(sys.argv, {"small": gguf_file(), "everything": EVERYTHING, "model": gguf_model(), **cases})
    atheris.Setup(options, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
