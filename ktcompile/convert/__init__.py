"""Convert any model that can be opened to a GGUF file or a folder of safetensors, a few tensors' rows at a time."""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import torch

from ktcompile.capture import computed, empty_model
from ktcompile.checkpoint import Checkpoint
from ktcompile.convert import to_gguf, to_safetensors
from ktcompile.convert.chunks import Chunk, Progress, Quantize, write
from ktcompile.convert.metadata import (
    TOKENIZER_FILES,
    config_fields,
    folder_config,
    gguf_metadata,
    write_json,
    write_tokenizer,
)
from ktcompile.convert.report import Planned, Report, notes, size
from ktcompile.errors import ModelFileError
from ktcompile.files import atomic, atomic_folder
from ktcompile.weights import WeightSource
from ktcompile.weights.quoted import quoted

__all__ = ["TARGETS", "Progress", "Report", "convert", "quantizer"]

TARGETS = (*to_gguf.FILE_TYPES, *to_safetensors.TARGETS)
"""What a model may be converted to: GGUF by block type, or a folder of safetensors."""

_MODEL_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json"
)

Run = Callable[[Sequence[Path], Callable[[], Iterable[Chunk]], int], None]


def quantizer() -> Quantize:
    """What rounds to block types: the entry point `native` of the group `ktcompile.quantizers`, or another one."""
    points = sorted(entry_points(group="ktcompile.quantizers"), key=lambda point: (point.name != "native", point.name))
    if not points:
        raise ModelFileError("no quantizer is installed; reinstall ktcompile")
    found: Quantize = points[0].load()
    return found


def convert(
    checkpoint: Checkpoint,
    out: str | Path,
    to: str,
    *,
    quantize: Quantize | None = None,
    threads: int | None = None,
    shard_bytes: int = to_safetensors.SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> Report:
    """Write `checkpoint` to `out`, a .gguf file or a folder, in the encoding `to` of TARGETS.

    `out` appears when it is complete and is as before if anything fails. `force` replaces it; of a folder only one that
    holds nothing but a model. `threads`: default all this process may use. Working memory is a few chunks of fp32, at
    most 1 GiB or one expert if that is larger.
    Raises ModelFileError, before anything is written for what can be known then: also if the source lacks parameters
    that the model has, since half a model is none.
    """
    start = time.perf_counter()
    path = Path(out)
    if to not in TARGETS:
        raise ModelFileError(f"a model cannot be converted to {to!r}; there are {', '.join(TARGETS)}")
    if checkpoint.source is None:
        raise ModelFileError(f"{checkpoint.path}: a configuration without weights; there is nothing to convert")
    source = checkpoint.source
    _check_paths(checkpoint, path, to, force)
    _check_complete(checkpoint, source)
    rounding = quantize or quantizer()
    run = partial(write, threads=threads or len(os.sched_getaffinity(0)), progress=progress)
    with _told(path):
        if to in to_gguf.FILE_TYPES:
            tensors, written = _to_gguf(checkpoint, source, path, to, rounding, run)
        else:
            tensors, written = _to_folder(checkpoint, source, path, to, rounding, run, shard_bytes)
    return Report(
        path,
        bytes_in=sum(source.spec(key).nbytes for key in list(source.keys())),
        bytes_out=written,
        weights=sum(tensor.values for tensor in tensors),
        seconds=time.perf_counter() - start,
        types=Counter(tensor.encoding for tensor in tensors),
        copied=sum(tensor.copied is not None for tensor in tensors),
        notes=tuple(notes(source, tensors)),
    )


def _to_gguf(
    checkpoint: Checkpoint, source: WeightSource, path: Path, to: str, quantize: Quantize, run: Run
) -> tuple[Sequence[Planned], int]:
    """Write the file; its tensors and its bytes."""
    metadata = gguf_metadata(checkpoint, to)
    architecture = str(metadata.pop("general.architecture"))
    tensors = to_gguf.plan(source, architecture, config_fields(checkpoint), to)
    total = sum(tensor.nbytes for tensor in tensors)
    _check_space(path, total)
    with atomic(path) as new:
        offsets = to_gguf.write_header(new, architecture, metadata, tensors)
        run([new], partial(to_gguf.chunks, source, tensors, offsets, quantize), total)
    return tensors, path.stat().st_size


def _to_folder(
    checkpoint: Checkpoint, source: WeightSource, path: Path, to: str, quantize: Quantize, run: Run, shard_bytes: int
) -> tuple[Sequence[Planned], int]:
    """Write the folder; its tensors and the bytes of its files."""
    tensors = to_safetensors.plan(source, to, checkpoint.config.model_type)
    total = sum(tensor.nbytes for tensor in tensors)
    _check_space(path, total)
    shards = to_safetensors.layout(tensors, shard_bytes)
    with atomic_folder(path, replace=True) as new:
        write_json(new / "config.json", folder_config(checkpoint, to, tensors))
        write_json(new / "generation_config.json", json.loads(checkpoint.generation.to_json_string()))
        write_tokenizer(checkpoint, new)
        to_safetensors.create(new, shards)
        chunks = partial(to_safetensors.chunks, source, tensors, shards, quantize)
        run([new / shard.name for shard in shards], chunks, total)
    return tensors, sum(file.stat().st_size for file in path.iterdir())


# ------------------------------------------------------------------------------------------------ before


def _check_paths(checkpoint: Checkpoint, path: Path, to: str, force: bool) -> None:
    """Refuse what cannot be written there, or would destroy something."""
    is_file = to in to_gguf.FILE_TYPES
    if is_file != (path.suffix == ".gguf"):
        raise ModelFileError(f"{path}: {to} is {'a file: NAME.gguf' if is_file else 'a folder of safetensors files'}")
    if not path.parent.is_dir():
        raise ModelFileError(f"{path}: there is no folder {path.parent}")
    if _is_read(checkpoint, path):
        raise ModelFileError(f"{path}: is the model that is being read; give another name")
    if not os.path.lexists(path):
        return
    if path.is_dir() == is_file:
        raise ModelFileError(f"{path}: is a {'folder' if is_file else 'file'}; give another name")
    if not force and (is_file or any(path.iterdir())):
        raise ModelFileError(f"{path}: is already there; --force replaces it")
    strays = [] if is_file else [entry.name for entry in path.iterdir() if not _is_ours(entry.name)]
    if strays:
        raise ModelFileError(
            f"{path}: holds {quoted(strays[0])}, which is no part of a model; --force does not remove it"
        )


def _check_complete(checkpoint: Checkpoint, source: WeightSource) -> None:
    """Refuse a source without all parameters of the Hugging Face model, such as a folder without its routed experts."""
    names = set(empty_model(checkpoint.config, torch.bfloat16).state_dict())
    names -= {*computed(names), *(("lm_head.weight",) if checkpoint.config.tie_word_embeddings else ())}
    absent = sorted(names.difference(source.keys()))
    if not absent:
        return
    kinds = Counter(re.sub(r"\.layers\.\d+\.", ".layers.*.", name) for name in absent)
    shown = ", ".join(f"{kind} ({count})" if "*" in kind else kind for kind, count in kinds.items())
    raise ModelFileError(
        f"{checkpoint.path}: lacks {len(absent)} of the {len(names)} parameters of the model, and half a model cannot "
        f"be converted: {shown}; if they are in a GGUF file, give it with --gguf"
    )


def _is_ours(name: str) -> bool:
    return bool(_MODEL_FILES.fullmatch(name) or TOKENIZER_FILES.fullmatch(name))


def _is_read(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether `path` is the source, one of its files, or the folder of one."""
    files = [file.path.resolve() for file in getattr(checkpoint.source, "files", ())]
    return path.resolve() in {Path(checkpoint.path).resolve(), *files, *(file.parent for file in files)}


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ModelFileError(f"{path}: needs {size(needed)}, {size(free)} are free there; nothing was written")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say what could not be written in one line."""
    try:
        yield
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be written: {error.strerror}; nothing is left of it") from error
