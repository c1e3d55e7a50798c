"""A model file is read piece by piece, and says so when it is no longer what it was."""

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.errors import ModelFileError
from ktcompile.weights.file import ModelFile
from ktcompile.weights.source import Part, TensorSpec, block_index, everywhere, pieces

SHAPE = (3, 5, 7)
STORED = torch.arange(105, dtype=torch.int16).view(SHAPE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_bytes(b"head" + STORED.numpy().tobytes())
    return path


@st.composite
def indices(draw: st.DrawFn) -> tuple[int | slice, ...]:
    """Integers and slices with positive steps, for some of the leading axes."""
    out: list[int | slice] = []
    for size in SHAPE[: draw(st.integers(0, 3))]:
        if draw(st.booleans()):
            out.append(draw(st.integers(0, size - 1)))
            continue
        start = draw(st.integers(0, size - 1))
        out.append(slice(start, draw(st.integers(start + 1, size)), draw(st.sampled_from([None, 1, 2, 3]))))
    return tuple(out)


@given(indices())
def test_an_index_reads_what_torch_would(
    tmp_path_factory: pytest.TempPathFactory, index: tuple[int | slice, ...]
) -> None:
    path = tmp_path_factory.getbasetemp() / "indexed"
    path.write_bytes(b"head" + STORED.numpy().tobytes())
    found = ModelFile(path).tensor(4, SHAPE, torch.int16, index)
    assert found.shape == STORED[index].shape and torch.equal(found, STORED[index])


def test_only_the_asked_bytes_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = ModelFile(path), []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: read.append((at, to[0].nbytes)) or real(fd, to, at))
    file.tensor(4, SHAPE, torch.int16, (1, slice(2, 4)))
    assert read == [(4 + 2 * (35 + 14), 2 * 14)]


def test_reads_do_not_share_memory(path: Path) -> None:
    file = ModelFile(path)
    first = file.tensor(4, SHAPE, torch.int16)
    first.zero_()
    assert torch.equal(file.tensor(4, SHAPE, torch.int16), STORED)


@pytest.mark.parametrize("length", [0, 3, 4, 100, 213])
def test_a_file_that_becomes_shorter_is_an_error_and_no_signal(path: Path, length: int) -> None:
    file = ModelFile(path)
    os.truncate(path, length)
    with pytest.raises(ModelFileError, match=r"model: (was written to|byte)"):
        file.tensor(4, SHAPE, torch.int16)


def test_a_file_that_ends_while_it_is_read_says_where(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ModelFile(path)
    state = file._stat()
    os.truncate(path, 50)
    monkeypatch.setattr(file, "_stat", lambda: state)
    with pytest.raises(ModelFileError, match="byte 50: the file ends here; 210 bytes from byte 4 are needed"):
        file.tensor(4, SHAPE, torch.int16)


def test_a_file_that_is_written_to_is_an_error(path: Path) -> None:
    file = ModelFile(path)
    status = path.stat()
    with path.open("r+b") as other:
        other.write(b"HEAD")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ModelFileError, match="was written to after it was opened"):
        file.read(0, 4)


def test_a_file_that_is_replaced_or_removed_stays_readable(path: Path) -> None:
    file = ModelFile(path)
    other = path.with_name("other")
    other.write_bytes(b"x")
    os.replace(other, path)
    assert torch.equal(file.tensor(4, SHAPE, torch.int16), STORED)
    path.unlink()
    assert file.read(0, 4) == b"head"


def test_an_empty_absent_or_unreadable_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, words in (("empty", "the file is empty"), ("absent", "No such file"), (".", "Is a directory")):
        with pytest.raises(ModelFileError, match=words):
            ModelFile(tmp_path / name)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6)),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from([1, 2]),
)
def test_pieces_cover_a_part_once(shape: tuple[int, int, int], most: int, transpose: bool, step: int) -> None:
    stored = torch.arange(shape[0] * shape[1] * shape[2]).view(shape)
    rows, cols = (shape[2], shape[1]) if transpose else shape[1:]
    where = (slice(0, shape[0]), slice(0, (rows - 1) * step + 1, step), slice(0, cols))
    part = Part("p", TensorSpec(shape, torch.int64, "i64", stored.nbytes), where, transpose=transpose)
    out = torch.full((shape[0], rows * step, cols), -1)
    total = 0
    for piece in pieces(part, most):
        found = stored[piece.index]
        assert found.shape == piece.spec.shape
        place = out[piece.where]
        found = found.transpose(-2, -1) if transpose else found
        assert (place == -1).all(), "a piece lies over another"
        place.copy_(found.reshape(place.shape))
        total += piece.spec.nbytes
    expected = stored.transpose(-2, -1) if transpose else stored
    assert torch.equal(out[:, : (rows - 1) * step + 1 : step], expected) and total == stored.nbytes


def test_pieces_of_scaled_parts_begin_at_a_block() -> None:
    spec = TensorSpec((300, 64), torch.float32, "fp8_block128", 300 * 64)
    part = Part("p", spec, everywhere((300, 64)), scale="s")
    rows = [piece.where[0] for piece in pieces(part, random.Random(0).randint(1, 8192))]
    assert [(r.start, r.stop) for r in rows] == [(0, 128), (128, 256), (256, 300)]
    assert block_index((slice(0, 2), slice(128, 300)), 3, 128) == (slice(0, 2), slice(1, 3))
    with pytest.raises(ValueError, match="cannot be cut there"):
        block_index((slice(1, 2),), 2, 128)
