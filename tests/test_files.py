"""A file is whole under its final name, or not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ktcompile.files import atomic, atomic_folder


def fail_after_writing(path: Path, error: BaseException) -> None:
    with atomic(path) as partial:
        partial.write_bytes(b"half")
        raise error


def fail_after_writing_a_folder(path: Path, error: BaseException) -> None:
    with atomic_folder(path) as partial:
        (partial / "a").write_bytes(b"1")
        raise error


def write_folder(path: Path) -> None:
    with atomic_folder(path) as partial:
        (partial / "a").write_bytes(b"1")
        assert list(path.parent.glob("*/a")) != [path / "a"]


def lose(path: Path) -> None:
    with atomic(path) as partial:
        partial.unlink()


def test_the_file_appears_at_the_end_with_ordinary_rights(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with atomic(path) as partial:
        partial.write_bytes(b"half")
        assert not path.exists() and partial.parent == tmp_path
    assert path.read_bytes() == b"half"
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "plain"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"before")
    with pytest.raises(error):
        fail_after_writing(path, error())
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"before")
    with atomic(path) as partial:
        partial.write_bytes(b"after")
    assert path.read_bytes() == b"after"


def test_a_temporary_file_taken_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lose(tmp_path / "out.bin")
    assert os.listdir(tmp_path) == []


def test_no_such_folder_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        fail_after_writing(tmp_path / "none" / "out.bin", ValueError())


def test_a_long_name_still_fits(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    with atomic(path) as partial:
        partial.write_bytes(b"1")
    assert path.read_bytes() == b"1"


def test_a_folder_appears_at_the_end_and_not_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        fail_after_writing_a_folder(path, KeyboardInterrupt())
    assert os.listdir(tmp_path) == []
    write_folder(path)
    assert os.listdir(path) == ["a"] and os.listdir(tmp_path) == ["model"]


def test_a_folder_with_files_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "mine").write_bytes(b"1")
    with pytest.raises(OSError):
        write_folder(path)
    assert os.listdir(path) == ["mine"] and os.listdir(tmp_path) == ["model"]


def test_killed_in_the_middle_there_is_no_file_under_the_final_name(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ktcompile.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as p:\n"
        "    p.write_bytes(b'half'); print('writing', flush=True); time.sleep(60)"
    )
    path = tmp_path / "out.bin"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    child.stdout.close()
    assert not path.exists()
    assert all(name.endswith(".partial") for name in os.listdir(tmp_path))
