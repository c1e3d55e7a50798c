"""Files that appear whole or not at all: written beside the final name, made durable, renamed. Where caches are."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """The folder for what is kept for this user and can be made again; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ktcompile"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """The name of a temporary file in the folder of `path`, to be written inside the `with`.

    At its end the file is synced and renamed to `path`, replacing what was there; on any exception it is removed and
    `path` is as before. A process that is killed leaves a file `.NAME.*.partial`, never `path`. Raises OSError.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:200]}.", suffix=".partial")
    partial = Path(name)
    try:
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp makes it private; the result is an ordinary file
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(handle)
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """The same for a folder of files: a new temporary folder beside `path`, renamed to it at the end.

    `path` must not exist, or be an empty folder. With `replace` it may hold files: it is then renamed to a name
    `.NAME.*.partial` for the moment until the new one has its name, and removed. Raises OSError.
    """
    partial = _new_folder(path)
    try:
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if replace and path.exists():
            _exchange(partial, path)
        else:
            partial.replace(path)
    except BaseException:
        remove_folder(partial)
        raise
    sync(path.parent)


def _exchange(partial: Path, path: Path) -> None:
    old = _new_folder(path)
    path.replace(old)
    try:
        partial.replace(path)
    except BaseException:
        old.replace(path)
        raise
    remove_folder(old)


def _new_folder(path: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:200]}.", suffix=".partial"))
    folder.chmod(0o777 & ~_umask())
    return folder


def remove_folder(path: Path) -> None:
    """Remove a folder of plain files, as far as that goes; links are removed, not followed."""
    with suppress(OSError):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def sync(path: Path) -> None:
    """Wait until the file, or the list of names in the folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # Reading it means setting it, for a moment and the whole process; Linux tells it in /proc without that.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
